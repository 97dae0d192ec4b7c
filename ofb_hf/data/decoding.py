"""From the bytes of an image file to an RGB image, and a record of the files for which that fails."""

import io
import math

import torch
from PIL import Image, ImageOps
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A share of fewer images says little, and one of more still varies: a run is not stopped for less than four standard
# deviations above the limit, until all images were seen.
ENOUGH_SEEN = 100
DEVIATIONS = 4
NAMED = 5


class TooManyBadImagesError(ValueError):
    """So many images cannot be decoded that something else is wrong."""


def decode_image(content: bytes | None) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says.

    That is what `datasets` does when it decodes, and transformers' pipelines: a streamed image has the pixels of a
    loaded one, and the model sees in use what it was trained on. (timm and torchvision's ImageFolder ignore EXIF.)

    Raises:
        Exception: of whatever type the decoder of the format has, for bytes that are no complete image.
    """
    if not content:
        raise ValueError("the file is empty or missing")
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.getexif().get(Image.ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")


class BadImages:
    """Counts images that were seen, and those that could not be decoded, over all workers of a process.

    Args:
        workers: how many count, each in a place of its own.
        max_share: of an epoch's images that may be bad; in_all: how many images an epoch has.
    """

    def __init__(self, workers: int, max_share: float, in_all: int):
        self.counts = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()
        self.max_share, self.in_all = max_share, in_all
        self.names: list[str] = []
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
        self.names = []

    def saw(self, worker: int, name: str, error: Exception | None) -> None:
        """Records one image and, if it is bad, why.

        Raises:
            TooManyBadImagesError: if too many are bad: clearly more than `max_share`, or more at the end of the epoch.
        """
        # Plain Python on the memory that the workers share: between two images the code of numpy has left the CPU's
        # caches, and three calls of it take as long as a fortieth of an image.
        if self._view is None:
            self._view = memoryview(self.counts.numpy())
        self._view[worker, 0] += 1
        self._view[worker, 1] += error is not None
        if error is not None and len(self.names) < NAMED:
            self.names.append(name)
            why = f"{type(error).__name__}: {error}"
            logger.warning(f"{name} cannot be decoded ({why}); another image takes its place.")
        seen, bad = map(sum, zip(*self._view.tolist(), strict=True))
        allowed = self.max_share * seen
        if seen < self.in_all:
            allowed += DEVIATIONS * math.sqrt(allowed)
        if bad > allowed and seen >= min(ENOUGH_SEEN, self.in_all):
            raise TooManyBadImagesError(
                f"{bad} of {seen} images of this epoch cannot be decoded: {bad / seen:.1%}, and max_bad_share is "
                f"{self.max_share:.1%}. For example: {', '.join(self.names) or 'see the warnings above'}. Repair the "
                "files, or raise --max_bad_share if a model may be trained without them."
            )
