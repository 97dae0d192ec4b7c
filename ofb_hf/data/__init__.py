"""Images to train on and to evaluate on: loading, checking, augmenting.

`load_image_data(DataArguments(...))` returns both splits, `build_transform` returns the function
from an image to the model's input, and `with_image_transform` joins the two to a data set for a
Trainer. With `streaming=True` the training split is a `StreamedSplit`, and `ImageStream` reads and
augments it while a model trains.
"""

from ..hub_retries import StreamBrokenError
from .access import DatasetAccessError
from .augmentation_args import AugmentationArguments
from .decoding import TooManyBadImagesError
from .digits import load_digits_data
from .loading import DataArguments, load_image_data
from .mixing import BatchAugmentation
from .splits import ImageData, align_labels, require_decodable
from .streaming import ImageStream, StreamedSplit
from .transforms import (
    ImageTransform,
    SeededImages,
    build_transform,
    cropping,
    with_image_transform,
)

__all__ = [
    "AugmentationArguments",
    "BatchAugmentation",
    "DataArguments",
    "DatasetAccessError",
    "ImageData",
    "ImageStream",
    "ImageTransform",
    "SeededImages",
    "StreamBrokenError",
    "StreamedSplit",
    "TooManyBadImagesError",
    "align_labels",
    "build_transform",
    "cropping",
    "load_digits_data",
    "load_image_data",
    "require_decodable",
    "with_image_transform",
]
