"""From the bytes of an image file to an RGB image, and a record of the files for which that
fails."""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A share of few images says little, and of more it still varies. After every image a run of days is
# judged millions of times, and must not stop by chance; a part of an epoch is judged once.
ENOUGH_SEEN = 100
AT_ANY_TIME, ONCE = 8.0, 4.0  # standard deviations above the limit
NAMED = 5


class TooManyBadImagesError(ValueError):
    """So many images cannot be decoded that something else is wrong."""


def decode_image(content: bytes | None) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says.

    That is what `datasets` does when it decodes, and transformers' pipelines: a streamed image has
    the pixels of a loaded one, and the model sees in use what it was trained on. (timm and
    torchvision's ImageFolder ignore EXIF.)

    Raises:
        Exception: of whatever type the decoder of the format has, for bytes that are no complete
            image.
    """
    if not content:
        raise ValueError("the file is empty or missing")
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.getexif().get(Image.ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB; of 16 bits the upper 8 count.

    Raises:
        ValueError: for modes whose numbers have no known range (32-bit integers and floats), which
            would turn black or white.
    """
    if image.mode == "RGB":  # which `convert` would copy
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its mode is {image.mode}, numbers of no known range; save it with 8 or 16 bits per "
            f"channel"
        )
    return image.convert("RGB")


class BadImages:
    """Counts images that were seen, and those that could not be decoded, over all workers of a
    process.

    Args:
        workers: how many count, each in a place of its own.
        max_share: of an epoch's images that may be bad.
    """

    def __init__(self, workers: int, max_share: float):
        self.counts = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()
        self.max_share = max_share
        self.names: list[str] = []
        self._epoch = -1
        self._view: memoryview | None = None

    @property
    def seen(self) -> int:
        """Images seen in this epoch, good and bad."""
        return int(self.counts[:, 0].sum())

    @property
    def bad(self) -> int:
        """Images of this epoch that could not be decoded."""
        return int(self.counts[:, 1].sum())

    def reset(self) -> None:
        """Begins an epoch."""
        self.counts.zero_()

    def saw(self, worker: int, epoch: int, name: str, error: Exception | None) -> None:
        """Records one image and, if it is bad, why. The first few of an epoch are named.

        Raises:
            TooManyBadImagesError: if clearly more than `max_share` are bad.
        """
        # Plain Python on the memory that the workers share: between two images the code of numpy
        # has left the CPU's caches, and three calls of it take as long as a fortieth of an image.
        if self._view is None:
            self._view = memoryview(self.counts.numpy())
        self._view[worker, 0] += 1
        self._view[worker, 1] += error is not None
        if epoch != self._epoch:
            self._epoch, self.names = epoch, []
        if error is not None and len(self.names) < NAMED:
            self.names.append(name)
            why = f"{type(error).__name__}: {error}"
            logger.warning(f"{name} cannot be decoded ({why}); another image takes its place.")
        seen, bad = map(sum, zip(*self._view.tolist(), strict=True))
        if seen >= ENOUGH_SEEN:
            self.require_few(seen, bad, AT_ANY_TIME)

    def require_few(self, seen: int, bad: int, deviations: float = 0.0) -> None:
        """Judges counts.

        Args:
            deviations: how much to allow for chance, in standard deviations; 0 where all images
                were counted.

        Raises:
            TooManyBadImagesError: if too many are bad.
        """
        allowed = self.max_share * seen
        allowed += deviations * math.sqrt(allowed)
        if bad > allowed:
            raise TooManyBadImagesError(
                f"{bad} of {seen} images of this epoch cannot be decoded: {bad / seen:.1%}, and "
                f"max_bad_share is "
                f"{self.max_share:.1%}. For example: "
                f"{', '.join(self.names) or 'see the warnings above'}. Repair the "
                "files, or raise --max_bad_share if a model may be trained without them."
            )
