"""Draw images at random, skip those that cannot be decoded, and keep the others small.

What is kept of an image are its gray levels after resizing and cropping, one byte each; a batch
becomes floating-point numbers when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decoding import decode_image, why_unreadable
from .processors import CHANNELS
from .row_blocks import Row
from .splits import SPLIT_SEED
from .transforms import ImageTransform

# Fraction of the drawn images that may be unreadable.
MAX_UNREADABLE = 0.1
MOST_NAMED = 3
THREADS = 4
# Images that wait in memory as they were read, before they are resized.
AT_A_TIME = 64


@dataclass(frozen=True)
class Drawn:
    """Hold drawn images.

    Attributes:
        levels: gray levels of prepared images, (N, H, W, 3) uint8.
        labels: of the images, as they are stored.
        skipped: names of the images that cannot be decoded, each with the reason.
    """

    levels: np.ndarray
    labels: list[Any]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.labels)


class ImageBatches(Sequence[Tensor]):
    """Batches of images, (B, 3, H, W) in float32, made when they are asked for.

    Args:
        levels: gray levels of prepared images, (N, H, W, 3) uint8.
        transform: turns them into numbers.
        size: images of a batch; the last one may have fewer.
        starts: first images of the batches, all by default.
    """

    def __init__(
        self,
        levels: np.ndarray,
        transform: ImageTransform,
        size: int,
        starts: Sequence[int] | None = None,
    ):
        self.levels = levels
        self.transform = transform
        self.size = size
        self.starts = range(0, len(levels), size) if starts is None else starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int | slice) -> "Tensor | ImageBatches":
        if isinstance(index, slice):
            return ImageBatches(self.levels, self.transform, self.size, self.starts[index])
        start = self.starts[index]
        images = self.levels[start : start + self.size]
        return torch.stack([self.transform.to_tensor(image) for image in images])


def draw(
    images: Sequence[Row],
    count: int,
    transform: ImageTransform,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Drawn:
    """Draw images at random, none of them twice; others take the places of unreadable ones.

    Args:
        images: encoded images.
        count: how many to draw, all of them if there are fewer.
        transform: resizes and crops.
        seed: decides which ones, and in which order.
        progress: is called with the number of images that are there.

    Raises:
        ValueError: if more than `MAX_UNREADABLE` of the drawn images cannot be decoded.
    """
    order = np.random.RandomState(seed).permutation(len(images))
    wanted = min(count, len(images))
    levels = np.empty((wanted, transform.height, transform.width, CHANNELS), dtype=np.uint8)
    labels: list[Any] = []
    skipped: list[str] = []
    seen = 0
    with ThreadPoolExecutor(THREADS) as pool:
        while len(labels) < wanted and seen < len(order):
            some = order[seen : seen + min(AT_A_TIME, wanted - len(labels))]
            seen += len(some)
            for read in pool.map(lambda index: _read(images, index, transform), some):
                if read.problem is not None:
                    skipped.append(read.problem)
                    continue
                levels[len(labels)] = read.levels
                labels.append(read.label)
            progress(len(labels))
            # From here on it does not matter whether all others are readable.
            if len(skipped) * (1 - MAX_UNREADABLE) > MAX_UNREADABLE * wanted:
                break
    if len(skipped) > MAX_UNREADABLE * seen:
        named = "; ".join(skipped[:MOST_NAMED])
        raise ValueError(
            f"{len(skipped)} of {seen} images cannot be decoded, and at most "
            f"{MAX_UNREADABLE:.0%} may be: {named}{', ...' if len(skipped) > MOST_NAMED else '.'} "
            "Take them out, or give other images."
        )
    return Drawn(levels[: len(labels)], labels, skipped)


def labelled_batches(
    images: Sequence[Row],
    numbers: Sequence[int],
    transform: ImageTransform,
    size: int,
    skipped: list[str],
) -> Iterator[tuple[Tensor, list[Any]]]:
    """Decode images while they are used: yield batches (B, 3, H, W) with labels as stored.

    Args:
        images: encoded images.
        numbers: which of them.
        transform: makes tensors.
        size: images of a batch; those with unreadable ones are smaller.
        skipped: gets the images that cannot be decoded.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            tensors: list[Tensor] = []
            labels: list[Any] = []
            for read in pool.map(lambda index: _read(images, index, transform), some):
                if read.problem is not None:
                    skipped.append(read.problem)
                    continue
                tensors.append(transform.to_tensor(read.levels))
                labels.append(read.label)
            if tensors:
                yield torch.stack(tensors), labels


def evaluated_rows(count: int, limit: int) -> list[int]:
    """Return which rows of a split are evaluated on: always the same ones, as `splits.limit`."""
    if limit >= count:
        return list(range(count))
    return np.random.RandomState(SPLIT_SEED).permutation(count)[:limit].tolist()


@dataclass(frozen=True)
class _Read:
    """What became of one image: its gray levels (H, W, 3) and label, or why there are none."""

    levels: np.ndarray | None = None
    label: Any = None
    problem: str | None = None


def _read(images: Sequence[Row], index: int, transform: ImageTransform) -> _Read:
    name = f"image {index}"
    try:
        row = images[index]
        name = row.name
        return _Read(transform.levels(decode_image(row.image)), row.label)
    except Exception as error:  # decoders raise errors of any type
        return _Read(problem=f"{name} ({why_unreadable(error)})")
