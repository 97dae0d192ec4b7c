"""What is done to whole batches, on the device that they are on: normalise, erase, mix. torch only.

Every random number comes from an explicit `torch.Generator`, which has to live on the device of the
images. Nothing here waits for the device: numbers that depend on chance stay in tensors.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .augmentation_args import AugmentationArguments

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


@dataclass(frozen=True)
class BatchAugmentation:
    """Normalisation, random erasing, mixup or cutmix, in this order; without the last three,
    normalisation alone.

    Attributes:
        mean, std: three numbers each, in gray levels (see `pixel_statistics`).
        num_classes: length of the soft labels.
        random_erasing: probability for an image.
        mixup, cutmix, mixup_switch_prob, label_smoothing: see `mixup_cutmix`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.0

    @classmethod
    def from_arguments(
        cls,
        image_processor: Any,
        num_classes: int,
        args: AugmentationArguments,
        label_smoothing: float = 0.0,
    ) -> "BatchAugmentation":
        """With the numbers of an image processor. A loss that smooths labels itself wants no
        smoothing here.

        Raises:
            ValueError: for an image processor of other than three channels.
        """
        return cls(
            *pixel_statistics(image_processor),
            num_classes,
            random_erasing=args.random_erasing,
            mixup=args.mixup,
            cutmix=args.cutmix,
            mixup_switch_prob=args.mixup_switch_prob,
            label_smoothing=label_smoothing,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Gray levels (B, 3, H, W), uint8 or float, and labels (B,) -> float32 images and labels.

        Labels become soft, (B, num_classes), where images are mixed or labels smoothed; otherwise
        they stay.
        """
        images = normalize(images, self.mean, self.std)
        if self.random_erasing > 0:
            random_erasing_(images, self.random_erasing, generator=generator)
        if max(self.mixup, self.cutmix, self.label_smoothing) > 0:
            images, labels = mixup_cutmix(
                images,
                labels,
                self.num_classes,
                mixup=self.mixup,
                cutmix=self.cutmix,
                switch_prob=self.mixup_switch_prob,
                label_smoothing=self.label_smoothing,
                generator=generator,
            )
        return images, labels


def pixel_statistics(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in gray levels: (level - mean) / std is what the
    processor makes of one.

    Raises:
        ValueError: unless it has one number for all channels, or three.
    """
    scale = image_processor.rescale_factor if getattr(image_processor, "do_rescale", None) else 1.0
    mean, std = [0.0], [1.0]
    if getattr(image_processor, "do_normalize", None):
        mean, std = (
            _as_list(getattr(image_processor, name)) for name in ("image_mean", "image_std")
        )
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) not in (1, 3):
            raise ValueError(
                f"the image processor's {name} has {len(values)} values; expected three, for RGB "
                f"images."
            )
    return tuple(
        tuple(value / scale for value in values * (3 // len(values))) for values in (mean, std)
    )


@torch.no_grad()
def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(level - mean) / std per channel: (B, 3, H, W), uint8 or float -> a new float32 tensor of the
    same shape."""
    images = images.to(torch.float32, copy=True)
    # One channel after the other: Python numbers travel with the kernels, a tensor of three would
    # have to be copied.
    for channel, channel_mean, channel_std in zip(images.unbind(1), mean, std, strict=True):
        channel.sub_(channel_mean).div_(channel_std)
    return images


@torch.no_grad()
def random_erasing_(
    images: Tensor, probability: float = 0.25, *, generator: torch.Generator
) -> Tensor:
    """Replaces a rectangle in some of the images (B, C, H, W) by noise N(0, 1), in place
    (arXiv:1708.04896).

    Area (2 % to a third of the image) and logarithm of the aspect ratio (height by width, 0.3 to 1
    / 0.3) are uniform. As in timm, up to ten rectangles are drawn until one is lower and narrower
    than the image; else it stays whole.
    """
    batch, _, height, width = images.shape
    area, ratio = torch.rand(2, ERASING_ATTEMPTS, batch, generator=generator, device=images.device)
    chosen, y, x = torch.rand(3, batch, generator=generator, device=images.device)
    area = height * width * _scale(area, *ERASED_AREA)
    ratio = _scale(ratio, *map(math.log, ERASED_ASPECT)).exp()
    heights, widths = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(0, keepdim=True)
    h, w = heights.gather(0, first)[0], widths.gather(0, first)[0]
    rows = _interval(height, (y * (height - h + 1)).floor(), h)
    columns = _interval(width, (x * (width - w + 1)).floor(), w)
    erased = (chosen < probability) & fits.any(0)
    inside = rows[:, None, :, None] & columns[:, None, None, :] & erased[:, None, None, None]
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return images.copy_(torch.where(inside, noise, images))


@torch.no_grad()
def mixup_cutmix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch_prob: float = 0.5,
    label_smoothing: float = 0.0,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mixes every image with the one at the mirrored place in the batch, and the labels alike.

    One draw serves the whole batch. Mixup (arXiv:1710.09412): lambda x image + (1 - lambda) x
    other. Cutmix (arXiv:1905.04899): a box of about 1 - lambda of the area comes from the other
    image; labels follow the area that it really covers. A batch of one, and the middle of an odd
    batch, stay as they are.

    Args:
        images: (B, C, H, W), floating point, on the generator's device.
        labels: (B,) class indices.
        mixup, cutmix: lambda is Beta(alpha, alpha); 0 = never.
        switch_prob: how often cutmix is taken, if both are on.
        label_smoothing: share of every label that is spread evenly over all classes.

    Returns:
        Mixed images (B, C, H, W) and soft labels (B, num_classes), float32, whose rows sum to 1.
    """
    targets = torch.nn.functional.one_hot(labels, num_classes).float()
    targets = (1 - label_smoothing) * targets + label_smoothing / num_classes
    if max(mixup, cutmix) <= 0:
        return images, targets
    weights = _mixing_weights(images, mixup, cutmix, switch_prob, generator)
    mixed = torch.lerp(images.flip(0), images, weights.to(images.dtype))
    return mixed, torch.lerp(targets.flip(0), targets, weights.mean())


def _mixing_weights(
    images: Tensor, mixup: float, cutmix: float, switch_prob: float, generator: torch.Generator
) -> Tensor:
    """The share of its own that a pixel keeps, (H, W): the same everywhere, or 0 in a box and 1
    around it."""
    height, width = images.shape[-2:]
    switch, y, x = torch.rand(3, generator=generator, device=images.device)
    if mixup > 0:
        mixing = _symmetric_beta(mixup, images.device, generator).expand(height, width)
    if cutmix > 0:
        side = (1 - _symmetric_beta(cutmix, images.device, generator)).sqrt()
        box = _cut(height, y, side)[:, None] & _cut(width, x, side)
        cutting = (~box).float()
    if mixup > 0 and cutmix > 0:
        return torch.where(switch < switch_prob, cutting, mixing)
    return mixing if mixup > 0 else cutting


def _symmetric_beta(alpha: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """One draw from Beta(alpha, alpha), alpha > 0.

    torch's own samplers of Beta take no generator. Here T is Student's t with 2 alpha degrees of
    freedom, divided by sqrt(2 alpha), by Bailey's polar method (Math. Comp. 62, 1994); (1 + T /
    sqrt(1 + T^2)) / 2 is then Beta(alpha, alpha).
    """
    u, v = torch.rand(2, generator=generator, device=device)
    t = torch.expm1(-u.log() / alpha).sqrt() * torch.cos(2 * math.pi * v)
    return (1 + t.atan().sin()) / 2  # sin(atan(t)) is t / sqrt(1 + t^2), also for an infinite t


def _cut(length: int, center: Tensor, share: Tensor) -> Tensor:
    """Which places lie in a part of the length around a center (both from 0 to 1): (length,), cut
    off at the ends."""
    size = (length * share).floor()
    return _interval(length, (length * center).floor() - size // 2, size)


def _interval(length: int, start: Tensor, size: Tensor) -> Tensor:
    """Which of the places 0 .. length - 1 lie in [start, start + size): (...) -> (..., length),
    boolean."""
    places = torch.arange(length, device=start.device)
    return (places >= start[..., None]) & (places < (start + size)[..., None])


def _scale(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _as_list(value: Any) -> list[float]:
    return [float(value)] if isinstance(value, (int, float)) else list(value)
