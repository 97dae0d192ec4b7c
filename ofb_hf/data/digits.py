"""The embedded demonstration data: scans of handwritten digits, a part of scikit-learn."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from .splits import ImageData, hold_out

NUM_EVAL = 397  # of 1797; 1400 remain for training
BRIGHTEST = 16  # scikit-learn's levels are 0 to 16


def load_digits_data() -> ImageData:
    """Return scikit-learn's handwritten digits: 1400 images to train and 397 to evaluate.

    They have ten classes and 8 x 8 gray pixels, here as RGB.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the embedded digits come with scikit-learn, which is not installed; run "
            '`pip install "ofb-hf[demo]"`, or name your own data with --dataset_name or --data_dir.'
        ) from error
    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8)  # (N, 64) -> (N, 8, 8)
    levels = np.round(scans * (255 / BRIGHTEST)).astype(np.uint8)
    names = [str(digit) for digit in range(10)]
    dataset = Dataset.from_dict(
        {
            "image": [PILImage.fromarray(scan).convert("RGB") for scan in levels],
            "label": labels.tolist(),
        },
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )
    train, held_out = hold_out(labels.tolist(), NUM_EVAL)
    return ImageData(
        name="digits",
        train=dataset.select(train),
        eval=dataset.select(held_out),
        image_column="image",
        label_column="label",
        label_names=names,
    )
