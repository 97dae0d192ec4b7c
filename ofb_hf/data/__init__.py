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
from .drawing import ImageBatches, draw, evaluated_rows, labelled_batches
from .loading import EVAL_SHARE, DataArguments, load_image_data
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
from .unlabeled import FoundImages, ImageArguments, class_numbers, find_images

__all__ = [
    "EVAL_SHARE",
    "AugmentationArguments",
    "BatchAugmentation",
    "DataArguments",
    "DatasetAccessError",
    "FoundImages",
    "ImageArguments",
    "ImageBatches",
    "ImageData",
    "ImageStream",
    "ImageTransform",
    "SeededImages",
    "StreamBrokenError",
    "StreamedSplit",
    "TooManyBadImagesError",
    "align_labels",
    "build_transform",
    "class_numbers",
    "cropping",
    "draw",
    "evaluated_rows",
    "find_images",
    "labelled_batches",
    "load_digits_data",
    "load_image_data",
    "require_decodable",
    "with_image_transform",
]
