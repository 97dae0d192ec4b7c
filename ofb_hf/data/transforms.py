"""From a PIL image to the model's input, with and without augmentation; PIL and numpy only, never
torchvision."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from .augmentation_args import AugmentationArguments
from .decoding import to_rgb
from .mixing import pixel_statistics
from .randaugment import MIDDLE_GRAY, RESAMPLINGS, ColorJitter, RandAugment
from .seeding import seed_example

AUGMENTATIONS = ("auto", "none", "light", "standard", "deit")
SMALL_IMAGE = 64
JITTER = 0.3
LIGHT_SHARE = 0.1
LIGHT_DEGREES = 10.0
CROP_SCALE = (0.35, 1.0)
DEIT_CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
GRAY_LEVELS = 256


def build_transform(
    image_processor: Any,
    augmentation: str,
    train: bool,
    *,
    augmentation_args: AugmentationArguments | None = None,
    eval_crop_pct: float | None = None,
) -> "ImageTransform":
    """A callable from PIL image to tensor (3, H, W), float32, with the sizes and numbers of an
    image processor.

    Without augmentation the result is what the processor returns for the image in RGB, so a
    published model sees in `pipeline("image-classification")` the pixels it was evaluated on.

    Args:
        image_processor: of transformers, one that resizes, crops, rescales and normalizes.
        augmentation: "none"; "light": small shifts, turns and changes of scale; "standard": crops,
            flips, brightness and contrast; "auto": standard; "deit": DeiT's recipe. Its tensors are
            uint8: normalization and the rest of the recipe are `BatchAugmentation`'s.
        train: False ignores the augmentation.
        augmentation_args: what "deit" does; the recipe's numbers if left out.
        eval_crop_pct: without augmentation, timm's way instead of the processor's: the shorter side
            becomes H / eval_crop_pct (0.875: 256 for 224), then the middle is cut out.

    Raises:
        ValueError: for an unknown augmentation, an eval_crop_pct out of range, and for a processor
            whose output has no fixed size, is not made of three channels, or takes more steps than
            these.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"augmentation is {augmentation!r}; allowed are {', '.join(AUGMENTATIONS)}."
        )
    if eval_crop_pct is not None and not 0 < eval_crop_pct <= 1:
        raise ValueError(
            f"eval_crop_pct is {eval_crop_pct}; it must lie above 0 and be at most 1, e.g. 0.875."
        )
    evaluation = ImageTransform(image_processor)
    _check_same_pixels(evaluation, image_processor)
    if not train or augmentation == "none":
        return (
            evaluation
            if eval_crop_pct is None
            else CropPctTransform(image_processor, eval_crop_pct)
        )
    if augmentation == "deit":
        return DeiTTransform(image_processor, augmentation_args or AugmentationArguments())
    kinds = {"light": LightTransform, "standard": StandardTransform, "auto": StandardTransform}
    return kinds[augmentation](image_processor)


def cropping(image_processor: Any, crop_pct: float) -> Any:
    """A copy of an image processor that evaluates with `eval_crop_pct` by itself, as far as
    transformers can.

    Where an odd number of pixels is cut off, it leaves out another one than timm. Sizes that are
    not square stay as they are.
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
    transform: Callable[[Image.Image], Tensor],
    image_column: str,
    label_column: str,
) -> Dataset:
    """The same rows as {"pixel_values": tensor (3, H, W), "labels": int}, transformed when they are
    read."""
    rows = dataset.select_columns([image_column, label_column])
    return rows.with_transform(RowTransform(transform, image_column, label_column))


class SeededImages(torch.utils.data.Dataset):
    """Images for training, {"pixel_values": tensor (3, H, W), "labels": int}, augmented
    reproducibly.

    Random transforms depend on seed, epoch and row alone, so a run that was interrupted and resumed
    sees the very images it would have seen, whatever its loader had fetched ahead. The Trainer's
    callback calls `set_epoch`.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Image.Image], Tensor],
        image_column: str,
        label_column: str,
        seed: int,
    ):
        self.rows = dataset.select_columns([image_column, label_column])
        self.transform = RowTransform(transform, image_column, label_column)
        self.seed = seed
        # workers that live on see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draws other random transforms from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several rows at once, as DataLoader asks for a batch."""
        rows = self.rows[indices]
        # Without workers this is the process that trains: its random numbers are restored.
        with torch.random.fork_rng(devices=[]):
            return [
                self._transformed(rows, position, index) for position, index in enumerate(indices)
            ]

    def _transformed(self, rows: dict[str, list], position: int, index: int) -> dict[str, Any]:
        seed_example(self.seed, int(self._epoch), index)
        # The transform takes and returns columns: lists, here of one entry.
        columns = {name: values[position : position + 1] for name, values in rows.items()}
        row = self.transform(columns)
        return {name: values[0] for name, values in row.items()}


@dataclass(frozen=True)
class RowTransform:
    """Applies an image transform to the rows that `datasets` hands over: a dict of lists, in and
    out."""

    transform: Callable[[Image.Image], Tensor]
    image_column: str
    label_column: str

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """{image column, label column} -> {"pixel_values": tensors (3, H, W), "labels":
        integers}."""
        return {
            "pixel_values": [self.transform(image) for image in rows[self.image_column]],
            "labels": [int(label) for label in rows[self.label_column]],
        }


class ImageTransform:
    """Evaluation: resize, crop, rescale and normalize as the image processor does, on any PIL
    image.

    Raises:
        ValueError: for a processor without a fixed output size; when called, for an image of
            another size if the processor does not resize.
        TypeError: when called with something that is no PIL image.
    """

    def __init__(self, image_processor: Any):
        size = getattr(image_processor, "size", None) or {}
        crop = (
            getattr(image_processor, "crop_size", None)
            if getattr(image_processor, "do_center_crop", None)
            else None
        )
        self.resize_to = (
            _resize_target(size) if getattr(image_processor, "do_resize", None) else None
        )
        self.crops = crop is not None
        self.height, self.width = _output_size(crop if self.crops else size)
        resample = getattr(image_processor, "resample", None)
        self.resample = (
            Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
        )
        self.table = _normalization_table(image_processor)

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode -> (3, H, W), as `to_tensor` makes it."""
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"got {type(image).__name__}, expected a PIL image; check the image column for "
                f"empty rows."
            )
        image = self.prepare(to_rgb(image))
        if image.size != (self.width, self.height):
            raise ValueError(
                f"the image has {image.width} x {image.height} pixels, but the model takes "
                f"{self.width} x "
                f"{self.height} and the image processor does not resize; set its do_resize."
            )
        return self.to_tensor(np.asarray(image))

    def to_tensor(self, levels: np.ndarray) -> Tensor:
        """Gray levels (H, W, 3), uint8 -> (3, H, W), float32."""
        # All pixels are one of 256 levels by now: looking the result up is exact, and faster than
        # computing it.
        return torch.from_numpy(np.stack([self.table[c].take(levels[..., c]) for c in range(3)]))

    def prepare(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image of the model's size."""
        if self.resize_to is not None:
            height, width = self.resize_to(image)
            image = image.resize((width, height), self.resample)
        return _center_crop(image, self.height, self.width) if self.crops else image


class CropPctTransform(ImageTransform):
    """Evaluation as in timm: resize so that the middle can be cut out of it, whatever the image
    processor does instead.

    The cut part takes up `crop_pct` of a square image's side; no image is squashed.
    """

    def __init__(self, image_processor: Any, crop_pct: float):
        super().__init__(image_processor)
        height, width = math.floor(self.height / crop_pct), math.floor(self.width / crop_pct)
        # Not the same for squares, whose longer side timm rounds down.
        self.resize_to = _ShortestEdge(height) if height == width else _Covering(height, width)

    def prepare(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image of the model's size."""
        height, width = self.resize_to(image)
        image = image.resize((width, height), self.resample)
        # timm cuts at the nearest pixel (at the even one of two), transformers at the one before.
        left, top = round((width - self.width) / 2), round((height - self.height) / 2)
        return image.crop((left, top, left + self.width, top + self.height))


class LightTransform(ImageTransform):
    """For digits and characters: shifts and changes scale by up to 10 %, turns by up to 10 degrees,
    never flips."""

    def prepare(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image of the model's size; empty corners take the
        background's color."""
        image = super().prepare(image)
        turn, zoom, right, down = _uniform(4, -1, 1)
        angle, scale = math.radians(LIGHT_DEGREES * turn), 1 + LIGHT_SHARE * zoom
        a, b = math.cos(angle) / scale, math.sin(angle) / scale
        # PIL asks where a target pixel comes from: undo the shift, then turn and scale around the
        # center.
        x, y = image.width / 2, image.height / 2
        x_from, y_from = (
            x + LIGHT_SHARE * image.width * right,
            y + LIGHT_SHARE * image.height * down,
        )
        inverse = (a, b, x - a * x_from - b * y_from, -b, a, y + b * x_from - a * y_from)
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            inverse,
            Image.Resampling.BILINEAR,
            fillcolor=_background(image),
        )


class StandardTransform(ImageTransform):
    """For photos: a random part of the image, mirrored in one of two cases, with other brightness
    and contrast.

    Outputs of up to 64 pixels are shifted by up to 1/8 (black comes in); larger ones are resized
    from a random crop.
    """

    def prepare(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image of the model's size."""
        is_small = max(self.height, self.width) <= SMALL_IMAGE
        image = super().prepare(image) if is_small else self._random_crop(image)
        mirror, brightness, contrast = _uniform(3, -1, 1)
        if mirror > 0:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = _jitter(image, 1 + JITTER * brightness, 1 + JITTER * contrast)
        return self._random_shift(image) if is_small else image

    def _random_shift(self, image: Image.Image) -> Image.Image:
        margins = [max(1, round(side / 8)) for side in image.size]
        left, top = (
            math.floor(u * (2 * m + 1)) - m for u, m in zip(_uniform(2, 0, 1), margins, strict=True)
        )
        return image.crop((left, top, left + image.width, top + image.height))

    def _random_crop(self, image: Image.Image) -> Image.Image:
        left, top, width, height = _random_box(image.width, image.height)
        box = (left, top, left + width, top + height)
        return image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)


class DeiTTransform(ImageTransform):
    """For photos, as DeiT trains: a random crop, mirrored in one of two cases, then RandAugment or
    colour jitter.

    Returns uint8 gray levels. Interpolation is the image processor's; what comes from outside an
    image is its mean.
    """

    def __init__(self, image_processor: Any, args: AugmentationArguments):
        super().__init__(image_processor)
        self.change_colors: Callable[[Image.Image], Image.Image] = ColorJitter(args.color_jitter)
        if args.auto_augment is not None:
            resample = self.resample if self.resample in RESAMPLINGS else None
            self.change_colors = RandAugment.from_policy(
                args.auto_augment, _mean_color(image_processor), resample
            )

    def prepare(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image of the model's size."""
        left, top, width, height = _random_box(image.width, image.height, DEIT_CROP_SCALE)
        # Cut first: a resize with a box would blend in what lies around it.
        image = image.crop((left, top, left + width, top + height)).resize(
            (self.width, self.height), self.resample
        )
        if _uniform(1, 0, 1)[0] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.change_colors(image)

    def to_tensor(self, levels: np.ndarray) -> Tensor:
        """Gray levels (H, W, 3), uint8 -> (3, H, W), uint8."""
        return torch.from_numpy(levels.transpose(2, 0, 1).copy())


def _random_box(
    width: int, height: int, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part: its area and its aspect ratio (in logarithms)
    are uniform."""
    log_ratio = [math.log(ratio) for ratio in CROP_RATIO]
    for _ in range(CROP_ATTEMPTS):
        area, ratio, x, y = _uniform(4, 0, 1)
        area = width * height * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(log_ratio[0] + ratio * (log_ratio[1] - log_ratio[0]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(x * (width - w + 1)), math.floor(y * (height - h + 1)), w, h
    # A very long image: the largest part in the middle whose aspect ratio is still allowed.
    w = max(1, min(width, round(height * CROP_RATIO[1])))
    h = max(1, min(height, round(width / CROP_RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _jitter(image: Image.Image, brightness: float, contrast: float) -> Image.Image:
    """Scales the levels, then their distance to the mean gray; one table serves both steps and all
    channels."""
    levels = (np.arange(GRAY_LEVELS) * brightness).clip(0, GRAY_LEVELS - 1)
    mean = np.average(levels, weights=image.convert("L").histogram())
    levels = (
        (mean + (levels - mean) * contrast).clip(0, GRAY_LEVELS - 1).round().astype(int).tolist()
    )
    return image.point(levels * 3)


def _background(image: Image.Image) -> tuple[int, ...]:
    """The lower median of the four corners, per channel."""
    right, bottom = image.width - 1, image.height - 1
    corners = [
        image.getpixel(corner) for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom))
    ]
    return tuple(sorted(levels)[1] for levels in zip(*corners, strict=True))


def _mean_color(image_processor: Any) -> tuple[int, ...]:
    """What the processor maps to zero; a middle gray if it does not normalize."""
    if not getattr(image_processor, "do_normalize", None):
        return MIDDLE_GRAY
    return tuple(
        min(GRAY_LEVELS - 1, max(0, round(level))) for level in pixel_statistics(image_processor)[0]
    )


def _uniform(count: int, low: float, high: float) -> list[float]:
    """Random numbers from torch's global generator: it follows the seed and differs between loader
    workers."""
    return (low + (high - low) * torch.rand(count, dtype=torch.float64)).tolist()


@dataclass(frozen=True)
class _FixedSize:
    height: int
    width: int

    def __call__(self, image: Image.Image) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class _ShortestEdge:
    edge: int

    def __call__(self, image: Image.Image) -> tuple[int, int]:
        short, long = sorted(image.size)
        other = int(self.edge * long / short)
        return (other, self.edge) if image.width <= image.height else (self.edge, other)


@dataclass(frozen=True)
class _Covering:
    """The smallest size in the proportions of the image that covers height and width."""

    height: int
    width: int

    def __call__(self, image: Image.Image) -> tuple[int, int]:
        shrink = min(image.height / self.height, image.width / self.width)
        return round(image.height / shrink), round(image.width / shrink)


def _resize_target(size: Any) -> Callable[[Image.Image], tuple[int, int]]:
    """From an image to the (height, width) that the processor resizes it to."""
    if size.get("height") and size.get("width"):
        return _FixedSize(size["height"], size["width"])
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return _ShortestEdge(size["shortest_edge"])
    raise ValueError(
        f"the image processor's size is {dict(size)}; expected height and width, or shortest_edge. "
        "Set it to the size of the model's input."
    )


def _output_size(size: Any) -> tuple[int, int]:
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise ValueError(
        f"the image processor gives images of different sizes ({dict(size)}, no crop); a batch "
        f"needs one size. Set "
        "its size to height and width, or its do_center_crop and crop_size."
    )


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of an image; black is added around an image that is too small."""
    left, top = _crop_start(image.width, width), _crop_start(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _crop_start(available: int, wanted: int) -> int:
    # transformers rounds down both when it cuts and when it pads; floor division does the same for
    # negative numbers.
    return (available - wanted) // 2


def _normalization_table(image_processor: Any) -> np.ndarray:
    """What the processor makes of each gray level in each channel: (3, 256) float32, rounded where
    it rounds."""
    levels = np.arange(GRAY_LEVELS, dtype=np.float32)[None, :].repeat(3, axis=0)
    if getattr(image_processor, "do_rescale", None):
        levels = (levels.astype(np.float64) * image_processor.rescale_factor).astype(np.float32)
    if getattr(image_processor, "do_normalize", None):
        mean, std = (_per_channel(image_processor, name) for name in ("image_mean", "image_std"))
        levels = (levels - mean) / std
    return levels


def _per_channel(image_processor: Any, name: str) -> np.ndarray:
    value = np.asarray(getattr(image_processor, name), dtype=np.float32).reshape(-1, 1)
    if value.shape not in ((1, 1), (3, 1)):
        raise ValueError(
            f"the image processor's {name} has {len(value)} values; expected three, for RGB images."
        )
    return value


def _check_same_pixels(transform: ImageTransform, image_processor: Any) -> None:
    """Refuses processors that do something we do not know of, by trying one on a smooth image of
    awkward shape."""
    wider = 0 if transform.resize_to is None else transform.width // 3 + 1
    height, width = transform.height + wider // 2, transform.width + wider
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ramps = np.stack([255 * x, 255 * (1 - y), 127 * (x + y)], axis=-1)
    probe = Image.fromarray(ramps.round().astype(np.uint8))
    actual = transform(probe)
    expected = image_processor(probe, return_tensors="pt")["pixel_values"][0].float()
    gray_level = float(np.abs(np.diff(transform.table, axis=1)).max())
    if expected.shape != actual.shape:
        difference = (
            f"its output has the shape {tuple(expected.shape)} instead of {tuple(actual.shape)}"
        )
    # Backends round differently when they resize: one gray level. An unknown step is far above
    # that.
    elif (gap := (expected - actual).abs().mean().item()) > gray_level:
        difference = f"its output differs by {gap / gray_level:.1f} gray levels on average"
    else:
        return
    raise ValueError(
        f"{type(image_processor).__name__} does more than resize, crop, rescale and normalize "
        f"({difference}), so "
        "training could not show the model what it will see in use. Use a ViTImageProcessor with "
        "the same numbers."
    )
