"""Decoding image files to RGB, and counting those that cannot be decoded."""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The fraction of bad images among few says little about all, and among more it still varies.
ENOUGH_SEEN = 100
# How far above the limit the number of bad images may be, in standard deviations. It is compared
# after every image, millions of times in a run of days, which must not stop by chance...
AT_ANY_TIME = 8.0
# ...and once for a part of an epoch.
ONCE = 4.0
# Fraction of the training images that may be bad.
MAX_BAD_SHARE = 0.01
# How many bad images of an epoch are named in the log.
NAMED = 5
# transformers clips them to 255, and nothing is left to train on.
SIXTEEN_BITS = (
    "Some images have 16 bits per pixel. Their upper 8 bits are used, in training and in "
    'evaluation; `pipeline("image-classification")` of transformers would see nearly all of it '
    "white, so store images with 8 bits before they are given to it: the accuracy that is measured "
    "here holds for these."
)


class TooManyBadImagesError(ValueError):
    """Report that more images cannot be decoded than `max_bad_share` allows."""


def decode_image(content: bytes | None) -> Image.Image:
    """Return the image in RGB, turned as its EXIF orientation says.

    `datasets` and the pipelines of transformers decode in the same way, so a streamed image has the
    pixels of a loaded one, and a model in use sees what it was trained on. (timm and torchvision's
    ImageFolder ignore EXIF.)

    Args:
        content: the bytes of an image file; None or empty if there is no such file.

    Raises:
        Exception: of any type that the decoder of the format raises for bytes that are no complete
            image.
    """
    if not content:
        raise ValueError("the file is empty, missing, or may not be read")
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.getexif().get(Image.ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in RGB; of 16 bits, the upper 8 remain, and that is logged once.

    Raises:
        ValueError: for modes whose numbers have no known range (32-bit integers and floats), which
            would turn black or white.
    """
    if image.mode == "RGB":  # `convert` would make a copy
        return image
    if image.mode.startswith("I;16"):
        logger.warning_once(SIXTEEN_BITS)
        levels = np.asarray(image).astype(np.uint16)  # (H, W), in the byte order of this machine
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its mode is {image.mode}, numbers of no known range; save it with 8 or 16 bits per "
            "channel"
        )
    return image.convert("RGB")


class BadImages:
    """Count images, and those that cannot be decoded, over all workers of a process.

    Args:
        workers: how many workers count.
        max_share: fraction of an epoch's images that may be bad.
    """

    def __init__(self, workers: int, max_share: float):
        # (workers, 2): images seen and images that are bad. Every worker has a row of its own, so
        # that none overwrites what another has counted.
        self.counts = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()
        self.max_share = max_share
        self.names: list[str] = []
        self._epoch = -1
        self._view: memoryview | None = None

    @property
    def seen(self) -> int:
        """The images seen in this epoch, good and bad."""
        return int(self.counts[:, 0].sum())

    @property
    def bad(self) -> int:
        """The images of this epoch that could not be decoded."""
        return int(self.counts[:, 1].sum())

    def reset(self) -> None:
        """Begin an epoch."""
        self.counts.zero_()

    def saw(self, worker: int, epoch: int, name: str, error: Exception | None) -> None:
        """Count one image; log the first bad ones of an epoch.

        Args:
            worker: who counts. epoch: the number of the epoch.
            name: of the image, for the log.
            error: why it cannot be decoded, None if it can.

        Raises:
            TooManyBadImagesError: if clearly more than `max_share` are bad.
        """
        # Plain Python on the memory that the workers share: between two images the code of numpy
        # has left the CPU's caches, and three calls of it take 1/40 of the time of an image.
        if self._view is None:
            self._view = memoryview(self.counts.numpy())
        self._view[worker, 0] += 1
        self._view[worker, 1] += error is not None
        if epoch != self._epoch:
            self._epoch, self.names = epoch, []
        if error is not None and len(self.names) < NAMED:
            self.names.append(name)
            _log_bad(name, error)
        seen, bad = map(sum, zip(*self._view.tolist(), strict=True))  # over the workers
        if seen >= ENOUGH_SEEN:
            self.require_few(seen, bad, AT_ANY_TIME)

    def require_few(self, seen: int, bad: int, deviations: float = 0.0) -> None:
        """Raise TooManyBadImagesError if too many images are bad.

        Args:
            seen, bad: the counts.
            deviations: how much to allow for chance, in standard deviations; 0 where all images
                were counted.
        """
        # Rare events: the variance of their number is the number expected (Poisson).
        allowed = self.max_share * seen
        allowed += deviations * math.sqrt(allowed)
        if bad > allowed:
            what = f"{bad} of {seen} images of this epoch"
            raise _too_many(what, bad / seen, self.max_share, self.names)


class BadRows:
    """Remember which rows of a loaded split cannot be decoded, over all workers of a process.

    Args:
        count: the number of rows.
        max_share: fraction of them that may be bad.
    """

    def __init__(self, count: int, max_share: float):
        # (count,) in shared memory: a row counts once, whichever workers meet it in which epochs.
        self.is_bad = torch.zeros(count, dtype=torch.bool).share_memory_()
        self.max_share = max_share
        self.names: list[str] = []

    def found(self, index: int, name: str, error: Exception) -> None:
        """Count a bad row, and log the first ones.

        Args:
            index: of the row. name: of the image. error: why it cannot be decoded.

        Raises:
            TooManyBadImagesError: if more than `max_share` of all rows are bad.
        """
        if self.is_bad[index]:
            return
        self.is_bad[index] = True
        if len(self.names) < NAMED:
            self.names.append(name)
            _log_bad(name, error)
        self.require_few()

    def require_few(self) -> int:
        """Return how many rows are bad, or raise TooManyBadImagesError if they are too many."""
        bad = int(self.is_bad.sum())
        count = len(self.is_bad)
        if bad > self.max_share * count:
            what = f"{bad} of {count} training images"
            raise _too_many(what, bad / count, self.max_share, self.names)
        return bad


def readable(content: bytes | None) -> tuple[Image.Image | None, Exception | None]:
    """Return an image in RGB and None, or None and why it cannot be decoded."""
    try:
        return decode_image(content), None
    except (
        Exception
    ) as error:  # decoders raise errors of any type, from SyntaxError to struct.error
        return None, error


def why_unreadable(error: Exception) -> str:
    """Return why an image cannot be decoded, in one line."""
    if isinstance(error, UnidentifiedImageError):  # which names an object in memory
        return "no image of a known format"
    return f"{type(error).__name__}: {error}"


def _log_bad(name: str, error: Exception) -> None:
    logger.warning(
        f"{name} cannot be decoded ({why_unreadable(error)}); another image takes its place."
    )


def _too_many(what: str, share: float, max_share: float, names: list[str]) -> TooManyBadImagesError:
    examples = ", ".join(names) or "see the warnings above"
    return TooManyBadImagesError(
        f"{what} cannot be decoded: {share:.1%}, and max_bad_share is {max_share:.1%}. For "
        f"example: {examples}. Repair the files, or raise --max_bad_share if a model may be "
        "trained without them."
    )
