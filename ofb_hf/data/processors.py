"""What an image processor of transformers does to an image, as sizes and numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

GRAY_LEVELS = 256
CHANNELS = 3
# Three levels of each channel show any scale, shift and order of channels.
PROBE_COLORS = ((0, 128, 255), (128, 255, 0), (255, 0, 128))
SizeOf = Callable[[Image.Image], tuple[int, int]]


def does(image_processor: Any, step: str) -> bool:
    """Return whether an image processor takes a step: "do_resize", "do_normalize", ..."""
    return bool(getattr(image_processor, step, None))


# Sizes


@dataclass(frozen=True)
class FixedSize:
    """Resize to one size, whatever the image: returns (height, width)."""

    height: int
    width: int

    def __call__(self, image: Image.Image) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class ShortestEdge:
    """Resize the shorter edge to a length, and keep the aspect ratio: returns (height, width)."""

    edge: int

    def __call__(self, image: Image.Image) -> tuple[int, int]:
        short, long = sorted(image.size)
        other = int(self.edge * long / short)  # rounded down, as in transformers
        if image.width <= image.height:
            return other, self.edge
        return self.edge, other


@dataclass(frozen=True)
class Covering:
    """Resize to the smallest size with the image's aspect ratio that covers height and width."""

    height: int
    width: int

    def __call__(self, image: Image.Image) -> tuple[int, int]:
        shrink = min(image.height / self.height, image.width / self.width)
        return round(image.height / shrink), round(image.width / shrink)


def resize_target(size: Any) -> SizeOf:
    """Return the function from an image to the (height, width) that it is resized to.

    Args:
        size: the `size` of an image processor.

    Raises:
        ValueError: unless it has height and width, or shortest_edge alone.
    """
    if size.get("height") and size.get("width"):
        return FixedSize(size["height"], size["width"])
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return ShortestEdge(size["shortest_edge"])
    raise ValueError(
        f"the image processor's size is {dict(size)}; expected height and width, or shortest_edge. "
        "Set it to the size of the model's input."
    )


def output_size(size: Any) -> tuple[int, int]:
    """Return the (height, width) of a processor's output.

    Args:
        size: its `crop_size` if it crops, else its `size`.

    Raises:
        ValueError: if images of different sizes come out.
    """
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise ValueError(
        f"the image processor gives images of different sizes ({dict(size)}, no crop_size; a "
        "crop_pct is not read); a batch needs one size. Set its size to height and width, or its "
        "do_center_crop and crop_size."
    )


def resampling(image_processor: Any) -> Image.Resampling:
    """Return the interpolation with which a processor resizes."""
    value = getattr(image_processor, "resample", None)
    return Image.Resampling.BILINEAR if value is None else Image.Resampling(value)


# Levels


def pixel_statistics(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of three channels, in gray levels.

    (level - mean) / std is what the processor makes of a level.

    Raises:
        ValueError: unless the processor has one number for all channels, or three.
    """
    scale = image_processor.rescale_factor if does(image_processor, "do_rescale") else 1.0
    mean = [0.0]
    std = [1.0]
    if does(image_processor, "do_normalize"):
        mean = _channel_values(image_processor, "image_mean")
        std = _channel_values(image_processor, "image_std")
    return _in_levels(mean, scale), _in_levels(std, scale)


def mean_color(image_processor: Any, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the color that a processor maps to zero; a default if it does not normalize."""
    if not does(image_processor, "do_normalize"):
        return default
    mean, _ = pixel_statistics(image_processor)
    levels = np.clip(np.rint(mean), 0, GRAY_LEVELS - 1)
    return tuple(int(level) for level in levels)


def normalization_table(image_processor: Any) -> np.ndarray:
    """Return what a processor makes of each gray level in each channel: (3, 256) float32.

    It rounds where the processor rounds.
    """
    levels = np.arange(GRAY_LEVELS, dtype=np.float32)  # (256,)
    levels = levels[None, :].repeat(CHANNELS, axis=0)  # (3, 256)
    if does(image_processor, "do_rescale"):
        scaled = levels.astype(np.float64) * image_processor.rescale_factor
        levels = scaled.astype(np.float32)
    if does(image_processor, "do_normalize"):
        mean = np.asarray(_channel_values(image_processor, "image_mean"), dtype=np.float32)
        std = np.asarray(_channel_values(image_processor, "image_std"), dtype=np.float32)
        levels = levels - mean[:, None]  # (3, 256) - (1, 1) or (3, 1)
        levels = levels / std[:, None]
    return levels


def _channel_values(image_processor: Any, name: str) -> list[float]:
    """Return one value for all channels, or three."""
    values = getattr(image_processor, name)
    if values is None:
        raise ValueError(
            f"the image processor's {name} is None, and do_normalize is True; give its value for "
            "each channel, or set do_normalize to False."
        )
    if isinstance(values, int | float):
        values = [float(values)]
    values = list(values)
    if len(values) not in (1, CHANNELS):
        raise ValueError(
            f"the image processor's {name} has {len(values)} values; expected three, for RGB "
            "images."
        )
    return values


def _in_levels(values: list[float], scale: float) -> tuple[float, ...]:
    for_all_channels = values * (CHANNELS // len(values))
    return tuple(value / scale for value in for_all_channels)


def crop_start(available: int, wanted: int) -> int:
    """Return where a centered crop begins; below 0 if the image is smaller than the crop."""
    # transformers rounds down both when it crops and when it pads; floor division does the same for
    # negative numbers.
    return (available - wanted) // 2


def describe_difference(expected: np.ndarray, actual: np.ndarray, table: np.ndarray) -> str | None:
    """Return how an output differs from a processor's, None if it is the same but for rounding.

    Args:
        expected: the processor's output, (3, H, W). actual: the other one.
        table: the processor's `normalization_table`.
    """
    if expected.shape != actual.shape:
        return f"its output has the shape {expected.shape} instead of {actual.shape}"
    # Backends round differently when they resize: by one gray level. An unknown step changes far
    # more than that.
    gray_level = float(np.abs(np.diff(table, axis=1)).max())
    gap = float(np.abs(expected - actual).mean())
    if gap > gray_level:
        return f"its output differs by {gap / gray_level:.1f} gray levels on average"
    return None


def describe_other_pixels(image_processor: Any, other: Any, height: int, width: int) -> str | None:
    """Return how another processor's pixels differ from those of a processor, None if they do not.

    Both are tried on images of one color each. How they resize and crop a photo is not compared,
    only the size that comes out.

    Args:
        image_processor: with RGB outputs; `other`: any other one.
        height, width: of the images to try.
    """
    table = normalization_table(image_processor)
    for color in PROBE_COLORS:
        image = Image.new("RGB", (width, height), color)
        ours, theirs = (
            each(image, return_tensors="pt")["pixel_values"][0].float().numpy()
            for each in (image_processor, other)
        )
        difference = describe_difference(theirs, ours, table)
        if difference is not None:
            return difference
    return None
