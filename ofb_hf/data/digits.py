"""The embedded demonstration data: scans of handwritten digits, small enough for a CPU and already
on the disk."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from .splits import ImageData, hold_out

NUM_EVAL = 397
BRIGHTEST = 16


def load_digits_data() -> ImageData:
    """scikit-learn's handwritten digits: 8 x 8 pixels, ten classes, 1400 images to train and 397 to
    evaluate.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the embedded digits come with scikit-learn, which is not installed; run `pip install "
            '"ofb-hf[demo]"`, '
            "or name your own data with --dataset_name or --data_dir."
        ) from error
    scans, labels = load_digits(return_X_y=True)
    pixels = np.round(scans.reshape(-1, 8, 8) * (255 / BRIGHTEST)).astype(np.uint8)
    names = [str(digit) for digit in range(10)]
    dataset = Dataset.from_dict(
        {
            "image": [PILImage.fromarray(scan).convert("RGB") for scan in pixels],
            "label": labels.tolist(),
        },
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )
    train, held_out = hold_out(labels.tolist(), NUM_EVAL)
    return ImageData(
        "digits", dataset.select(train), dataset.select(held_out), "image", "label", names
    )
