"""Images to train and to evaluate on: loading, checking, augmenting.

`load_image_data(DataArguments(...))` gives both splits, `build_transform` what turns an image into the model's input,
and `with_image_transform` joins the two into a data set that a Trainer takes as it is.
"""

from .digits import load_digits_data
from .loading import DataArguments, load_image_data
from .splits import ImageData
from .transforms import ImageTransform, SeededImages, build_transform, with_image_transform

__all__ = [
    "DataArguments",
    "ImageData",
    "ImageTransform",
    "SeededImages",
    "build_transform",
    "load_digits_data",
    "load_image_data",
    "with_image_transform",
]
