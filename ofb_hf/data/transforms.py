"""Transforms from a PIL image to the model's input, with and without augmentation.

They use PIL and numpy only: torchvision is not needed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from .._moved import refusing_renamed
from .augmentation_args import AugmentationArguments
from .decoding import (
    MAX_BAD_SHARE,
    BadRows,
    TooManyBadImagesError,
    readable,
    to_rgb,
    why_unreadable,
)
from .processors import (
    CHANNELS,
    GRAY_LEVELS,
    Covering,
    ShortestEdge,
    crop_start,
    describe_difference,
    does,
    mean_color,
    normalization_table,
    output_size,
    resampling,
    resize_target,
)
from .randaugment import MIDDLE_GRAY, RESAMPLINGS, ColorJitter, RandAugment
from .row_blocks import ImageTable, stored_row
from .seeding import seed_example

# of names that the module had in version 0.1
__getattr__ = refusing_renamed(__name__)

logger = logging.get_logger(__name__)

Transform = Callable[[Image.Image], Tensor]

AUGMENTATIONS = ("auto", "none", "light", "standard", "deit")
# "standard": images up to this size are shifted, larger ones cropped and resized.
SMALL_IMAGE = 64
SHIFTED_FRACTION = 8  # by up to one eighth of a side
JITTER = 0.3  # largest relative change of brightness and contrast
# "light": the largest shift as a fraction of a side, and the largest relative change of scale.
LIGHT_CHANGE = 0.1
LIGHT_DEGREES = 10.0
# Random crops: area as a fraction of the image's, aspect ratio, and how often to try. DeiT's area
# and ratio are those of timm and torchvision; "standard" leaves more of an image.
CROP_SCALE = (0.35, 1.0)
DEIT_CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


def build_transform(
    image_processor: Any,
    augmentation: str,
    train: bool,
    *,
    augmentation_args: AugmentationArguments | None = None,
    eval_crop_pct: float | None = None,
) -> "ImageTransform":
    """Return a callable from a PIL image to a tensor (3, H, W) with the numbers of a processor.

    Without augmentation the tensor is float32 and what the processor returns for the image in RGB,
    so `pipeline("image-classification")` shows a published model the pixels it was evaluated on.

    Args:
        image_processor: of transformers; it may resize, crop, rescale and normalize.
        augmentation: "none"; "light": small shifts, turns and changes of scale; "standard": crops,
            flips, brightness and contrast; "auto": the same as standard; "deit": DeiT's recipe,
            whose tensors are uint8, because `BatchAugmentation` normalizes them and does the rest.
        train: False ignores the augmentation.
        augmentation_args: what "deit" does; by default the numbers of the recipe.
        eval_crop_pct: without augmentation, timm's way instead of the processor's: the shorter side
            becomes H / eval_crop_pct (0.875: 256 for 224), then the middle is cut out.

    Raises:
        ValueError: for an unknown augmentation, an eval_crop_pct out of range, and for a processor
            whose output has no fixed size or not three channels, or that takes other steps.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"augmentation is {augmentation!r}; allowed are {', '.join(AUGMENTATIONS)}."
        )
    if eval_crop_pct is not None and not 0 < eval_crop_pct <= 1:
        raise ValueError(
            f"eval_crop_pct is {eval_crop_pct}; it must lie above 0 and be at most 1, e.g. 0.875."
        )
    # Checked in any case: augmented images have to look like those that the processor makes later.
    evaluation = ImageTransform(image_processor)
    _check_same_pixels(evaluation, image_processor)
    if not train or augmentation == "none":
        if eval_crop_pct is None:
            return evaluation
        return CropPctTransform(image_processor, eval_crop_pct)
    if augmentation == "deit":
        return DeiTTransform(image_processor, augmentation_args or AugmentationArguments())
    if augmentation == "light":
        return LightTransform(image_processor)
    return StandardTransform(image_processor)


def cropping(image_processor: Any, crop_pct: float) -> Any:
    """Return a copy of an image processor that evaluates with `eval_crop_pct` by itself.

    Where an odd number of pixels is cut off, it cuts one pixel further than timm does. A processor
    with a size that is not square is returned as it is, because transformers cannot express it.
    """
    transform = ImageTransform(image_processor)
    if transform.height != transform.width:
        return image_processor
    changes = {
        "size": {"shortest_edge": math.floor(transform.height / crop_pct)},
        "crop_size": {"height": transform.height, "width": transform.width},
        "do_center_crop": True,
        "do_resize": True,
    }
    return type(image_processor).from_dict(image_processor.to_dict() | changes)


def with_image_transform(
    dataset: Dataset,
    transform: Transform,
    image_column: str,
    label_column: str,
) -> Dataset:
    """Return rows {"pixel_values": tensor (3, H, W), "labels": int}, transformed when read.

    Reading a row raises ValueError, with its name, if its image cannot be decoded. `SeededImages`
    puts others in the places of such images.
    """
    rows = ImageTable(dataset, image_column, label_column).dataset
    return rows.with_transform(RowTransform(transform, image_column, label_column))


class SeededImages(torch.utils.data.Dataset):
    """Give images for training, {"pixel_values": tensor (3, H, W), "labels": int}, reproducibly.

    Random transforms depend on seed, epoch and row alone, so an interrupted and resumed run sees
    the images that it would have seen, whatever its loader had fetched ahead. The Trainer's
    callback calls `set_epoch` and `end_epoch`. The next good image takes the place of one that
    cannot be decoded, as in a stream.

    Args:
        dataset: rows with an image column and a label column.
        transform: from a PIL image to a tensor.
        image_column, label_column: the names of these columns.
        seed: of the run.
        max_bad_share: fraction of the rows that may be undecodable.

    Raises:
        TooManyBadImagesError: when read, if more rows than that are undecodable.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        image_column: str,
        label_column: str,
        seed: int,
        max_bad_share: float = MAX_BAD_SHARE,
    ):
        self.rows = ImageTable(dataset, image_column, label_column)
        self.transform = transform
        self.seed = seed
        self.bad_rows = BadRows(len(self.rows), max_bad_share)
        # In shared memory, because workers that live on through all epochs have to see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Use the random transforms of an epoch from now on."""
        self._epoch.fill_(epoch)

    def end_epoch(self, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> str | None:
        """Log how many images could not be decoded so far; arguments and errors as of a stream.

        Every process has to call this together.
        """
        if sum_over_ranks is not None:
            bad_on = sum_over_ranks(self.bad_rows.is_bad.to(torch.int64))  # (N,) numbers of ranks
            self.bad_rows.is_bad.copy_(bad_on > 0)
        bad = self.bad_rows.require_few()
        if not bad:
            return None
        message = (
            f"{bad} of {len(self)} training images could not be decoded; others took their places."
        )
        logger.warning(message)
        return message

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return several rows at a time: DataLoader asks for a batch in this way."""
        # Without workers this is the process that trains: its random numbers are restored.
        with torch.random.fork_rng(devices=[]):
            return [self._example(index) for index in indices]

    def _example(self, index: int) -> dict[str, Any]:
        image, label = self._first_good(index)
        seed_example(self.seed, int(self._epoch), index)
        return {"pixel_values": self.transform(image), "labels": int(label)}

    def _first_good(self, index: int) -> tuple[Image.Image, int]:
        """Return image and label of a row, or of the next one that can be decoded."""
        if not 0 <= index < len(self):  # iteration without a sampler ends with this
            raise IndexError(f"index {index} is out of range for {len(self)} rows.")
        for row_index in range(index, index + len(self)):
            place = row_index % len(self)
            row = self.rows[place]
            image, error = readable(row.image)
            if error is None:
                return image, row.label
            self.bad_rows.found(place, row.name, error)
        raise TooManyBadImagesError(f"none of {len(self)} images can be decoded.")


@dataclass(frozen=True)
class RowTransform:
    """Apply an image transform to rows as `datasets` passes them: a dict of lists, in and out.

    Images are encoded, as `row_blocks.stored_row` takes them.
    """

    transform: Transform
    image_column: str
    label_column: str

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Return {"pixel_values": tensors (3, H, W), "labels": integers}.

        Raises:
            ValueError: for an image that cannot be decoded.
        """
        return {
            "pixel_values": [self._pixels(image) for image in rows[self.image_column]],
            "labels": [int(label) for label in rows[self.label_column]],
        }

    def _pixels(self, stored: Any) -> Tensor:
        row = stored_row(stored, None, "an image without a name")
        image, error = readable(row.image)
        if error is not None:
            raise ValueError(
                f"{row.name} cannot be decoded ({why_unreadable(error)}); repair the file or take "
                "it out."
            )
        return self.transform(image)


class ImageTransform:
    """Evaluate: resize, crop, rescale and normalize any PIL image as an image processor does.

    Subclasses augment: they replace `prepare`.

    Raises:
        ValueError: for a processor without a fixed output size; when called, for an image of
            another size if the processor does not resize.
        TypeError: when called with an object that is not a PIL image.
    """

    def __init__(self, image_processor: Any):
        size = getattr(image_processor, "size", None) or {}
        crop_size = getattr(image_processor, "crop_size", None)
        self.resize_to = resize_target(size) if does(image_processor, "do_resize") else None
        self.crops = does(image_processor, "do_center_crop") and crop_size is not None
        self.height, self.width = output_size(crop_size if self.crops else size)
        self.resample = resampling(image_processor)
        self.table = normalization_table(image_processor)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the tensor (3, H, W) of a PIL image of any mode, as `to_tensor` makes it."""
        return self.to_tensor(self.levels(image))

    def levels(self, image: Image.Image) -> np.ndarray:
        """Return the gray levels (H, W, 3), uint8, of a PIL image of any mode, prepared."""
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"got {type(image).__name__}, expected a PIL image; check the image column for "
                "empty rows."
            )
        image = self.prepare(to_rgb(image))
        if image.size != (self.width, self.height):
            raise ValueError(
                f"the image has {image.width} x {image.height} pixels, but the model takes "
                f"{self.width} x {self.height} and the image processor does not resize; set its "
                "do_resize."
            )
        return np.asarray(image)

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return an RGB image of the model's size, from an RGB image of any size."""
        if self.resize_to is not None:
            height, width = self.resize_to(image)
            image = image.resize((width, height), self.resample)
        return _center_crop(image, self.height, self.width) if self.crops else image

    def to_tensor(self, levels: np.ndarray) -> Tensor:
        """Return (3, H, W), float32, normalized, of gray levels (H, W, 3), uint8."""
        # Every pixel is one of 256 levels: looking the result up is exact, and faster than
        # computing it.
        channels = [self.table[c].take(levels[..., c]) for c in range(CHANNELS)]  # (H, W) each
        return torch.from_numpy(np.stack(channels))


class CropPctTransform(ImageTransform):
    """Evaluate as timm does: resize a little larger, then cut out the middle.

    Only the sizes, the interpolation and the normalization of the image processor are used. What is
    cut out has `crop_pct` of the side of a square image; the aspect ratio of an image is kept.
    """

    def __init__(self, image_processor: Any, crop_pct: float):
        super().__init__(image_processor)
        height = math.floor(self.height / crop_pct)
        width = math.floor(self.width / crop_pct)
        # For a square output timm rounds the longer side down, otherwise to the nearest pixel.
        self.resize_to = ShortestEdge(height) if height == width else Covering(height, width)

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return an RGB image of the model's size, from an RGB image of any size."""
        height, width = self.resize_to(image)
        image = image.resize((width, height), self.resample)
        # timm cuts at the nearest pixel (of two, at the even one), transformers at the one before.
        left = round((width - self.width) / 2)
        top = round((height - self.height) / 2)
        return _crop(image, left, top, self.width, self.height)


class LightTransform(ImageTransform):
    """Augment digits and characters: shift and scale by up to 10 %, turn by up to 10 degrees.

    They are not mirrored: most characters would become other ones.
    """

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return an RGB image of the model's size; empty corners take the background's color."""
        image = super().prepare(image)
        turn, zoom, right, down = _uniform(4, -1, 1)
        angle = math.radians(LIGHT_DEGREES * turn)
        scale = 1 + LIGHT_CHANGE * zoom
        a = math.cos(angle) / scale
        b = math.sin(angle) / scale
        # PIL asks for the inverse, where a pixel of the result comes from: undo the shift, then
        # turn and scale around the center. (x', y') = R (x - from) + center, R = (a b; -b a).
        x = image.width / 2
        y = image.height / 2
        x_from = x + LIGHT_CHANGE * image.width * right
        y_from = y + LIGHT_CHANGE * image.height * down
        x_offset = x - a * x_from - b * y_from
        y_offset = y + b * x_from - a * y_from
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            (a, b, x_offset, -b, a, y_offset),
            Image.Resampling.BILINEAR,
            fillcolor=_background(image),
        )


class StandardTransform(ImageTransform):
    """Augment photos: crop at random, mirror every other one, change brightness and contrast.

    Outputs of up to 64 pixels are not cropped but shifted by up to 1/8 of a side, with black where
    nothing is.
    """

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return an RGB image of the model's size, from an RGB image of any size."""
        is_small = max(self.height, self.width) <= SMALL_IMAGE
        image = super().prepare(image) if is_small else self._random_crop(image)
        mirror, brighter, sharper = _uniform(3, -1, 1)
        if mirror > 0:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        brightness = 1 + JITTER * brighter
        contrast = 1 + JITTER * sharper
        image = _jitter(image, brightness, contrast)
        return self._random_shift(image) if is_small else image

    def _random_shift(self, image: Image.Image) -> Image.Image:
        right, down = _uniform(2, 0, 1)
        left = _shift(right, image.width)
        top = _shift(down, image.height)
        return _crop(image, left, top, image.width, image.height)

    def _random_crop(self, image: Image.Image) -> Image.Image:
        left, top, width, height = _random_box(image.width, image.height)
        # Unlike in `DeiTTransform`, pixels around the box blend in at its edges.
        box = (left, top, left + width, top + height)
        return image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)


class DeiTTransform(ImageTransform):
    """Augment photos as DeiT does: a random crop, mirrored with probability 1/2, then RandAugment.

    Without a policy for RandAugment, colors are changed at random. Tensors are gray levels, uint8.
    The interpolation is the image processor's; pixels from outside an image have its mean color.
    """

    def __init__(self, image_processor: Any, args: AugmentationArguments):
        super().__init__(image_processor)
        self.change_colors: Callable[[Image.Image], Image.Image] = ColorJitter(args.color_jitter)
        if args.auto_augment is not None:
            # PIL turns and shears with these interpolations only; None chooses one at random.
            resample = self.resample if self.resample in RESAMPLINGS else None
            fill = mean_color(image_processor, default=MIDDLE_GRAY)
            self.change_colors = RandAugment.from_policy(args.auto_augment, fill, resample)

    def prepare(self, image: Image.Image) -> Image.Image:
        """Return an RGB image of the model's size, from an RGB image of any size."""
        left, top, width, height = _random_box(image.width, image.height, DEIT_CROP_SCALE)
        # Cropped first, as timm does: a resize with a box would blend in pixels around the box.
        image = _crop(image, left, top, width, height)
        image = image.resize((self.width, self.height), self.resample)
        if _uniform(1, 0, 1)[0] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.change_colors(image)

    def to_tensor(self, levels: np.ndarray) -> Tensor:
        """Return (3, H, W), uint8, of gray levels (H, W, 3), uint8."""
        return torch.from_numpy(levels.transpose(2, 0, 1).copy())  # the copy is contiguous


def _shift(uniform: float, length: int) -> int:
    """Return a shift of up to an eighth of a length to both sides, from a number in [0, 1)."""
    most = max(1, round(length / SHIFTED_FRACTION))
    return math.floor(uniform * (2 * most + 1)) - most


def _random_box(
    width: int, height: int, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random part of an image.

    Its area and the logarithm of its aspect ratio are uniform, as in torchvision and timm.

    Args:
        width, height: of the image.
        scale: smallest and largest area, as fractions of the image's.
    """
    log_low, log_high = map(math.log, CROP_RATIO)
    for _ in range(CROP_ATTEMPTS):
        larger, wider, x, y = _uniform(4, 0, 1)
        fraction = scale[0] + larger * (scale[1] - scale[0])
        area = width * height * fraction
        ratio = math.exp(log_low + wider * (log_high - log_low))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = math.floor(x * (width - w + 1))
            top = math.floor(y * (height - h + 1))
            return left, top, w, h
    # A very long image: the largest part in the middle whose aspect ratio is still allowed.
    widest = round(height * CROP_RATIO[1])
    highest = round(width / CROP_RATIO[0])
    w = max(1, min(width, widest))
    h = max(1, min(height, highest))
    return (width - w) // 2, (height - h) // 2, w, h


def _jitter(image: Image.Image, brightness: float, contrast: float) -> Image.Image:
    """Scale the gray levels of an image, then their distances to the mean gray.

    Both steps are one table of 256 levels, the same for all channels.
    """
    brightest = GRAY_LEVELS - 1
    levels = (np.arange(GRAY_LEVELS) * brightness).clip(0, brightest)
    # The mean after the first step, from the gray image's histogram instead of its pixels.
    mean = np.average(levels, weights=image.convert("L").histogram())
    levels = (mean + (levels - mean) * contrast).clip(0, brightest)
    table = levels.round().astype(int).tolist()
    return image.point(table * CHANNELS)


def _background(image: Image.Image) -> tuple[int, ...]:
    """Return the lower median of the four corners, per channel."""
    right = image.width - 1
    bottom = image.height - 1
    corners = [
        image.getpixel((0, 0)),
        image.getpixel((right, 0)),
        image.getpixel((0, bottom)),
        image.getpixel((right, bottom)),
    ]
    # A median, because a character may touch a corner.
    by_channel = zip(*corners, strict=True)
    return tuple(sorted(levels)[1] for levels in by_channel)


def _uniform(count: int, low: float, high: float) -> list[float]:
    """Return random numbers of torch's global generator, which `seed_example` seeds."""
    numbers = torch.rand(count, dtype=torch.float64)
    return (low + (high - low) * numbers).tolist()


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return the middle of an image; black is added around an image that is too small."""
    left = crop_start(image.width, width)
    top = crop_start(image.height, height)
    return _crop(image, left, top, width, height)


def _crop(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def _check_same_pixels(transform: ImageTransform, image_processor: Any) -> None:
    """Raise ValueError for a processor that takes unknown steps.

    It is tried on a smooth image whose sides are neither those of the output nor in its ratio.
    """
    wider = 0 if transform.resize_to is None else transform.width // 3 + 1
    height = transform.height + wider // 2
    width = transform.width + wider
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]  # (H, W) each, from 0 to 1
    ramps = np.stack([255 * x, 255 * (1 - y), 127 * (x + y)], axis=-1)  # (H, W, 3)
    probe = Image.fromarray(ramps.round().astype(np.uint8))
    actual = transform(probe)
    expected = image_processor(probe, return_tensors="pt")["pixel_values"][0].float()
    difference = describe_difference(expected.numpy(), actual.numpy(), transform.table)
    if difference is not None:
        raise ValueError(
            f"{type(image_processor).__name__} does more than resize, crop, rescale and normalize "
            f"({difference}), so training could not show the model what it will see in use. Use a "
            "ViTImageProcessor with the same numbers."
        )
