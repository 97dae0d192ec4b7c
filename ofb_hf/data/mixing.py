"""Augmentation of whole batches on their device: normalize, erase and mix, with torch only.

Every random number comes from an explicit `torch.Generator` on the device of the images. No
function waits for the device: random numbers and what follows from them stay in tensors.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .augmentation_args import AugmentationArguments
from .processors import pixel_statistics

# The numbers of timm, which DeiT is trained with. Area as a fraction of the image's; aspect ratio
# as height by width.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


@dataclass(frozen=True)
class BatchAugmentation:
    """Normalize a batch, then erase rectangles of its images, then mix its images and labels.

    By default it only normalizes.

    Attributes:
        mean, std: three numbers each, in gray levels (see `pixel_statistics`).
        num_classes: length of soft labels.
        random_erasing: probability that a rectangle of an image is erased.
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
        """Make it with the numbers of an image processor.

        Args:
            label_smoothing: must be 0 if the loss smooths the labels.

        Raises:
            ValueError: for an image processor of other than three channels.
        """
        mean, std = pixel_statistics(image_processor)
        return cls(
            mean,
            std,
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
        """Return augmented images (B, 3, H, W), float32, and their labels.

        Args:
            images: gray levels (B, 3, H, W), uint8 or float.
            labels: class indices (B,). They become probabilities, (B, num_classes), if images are
                mixed or labels smoothed.
            generator: on the device of the images.
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


@torch.no_grad()
def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (level - mean) / std per channel, a new float32 tensor.

    Args:
        images: (B, 3, H, W), uint8 or float.
        mean, std: three numbers each, in gray levels.
    """
    images = images.to(torch.float32, copy=True)
    # One channel after the other: Python numbers are arguments of the kernels, whereas a tensor of
    # three numbers would have to be copied to the device.
    for channel, channel_mean, channel_std in zip(images.unbind(1), mean, std, strict=True):
        channel.sub_(channel_mean).div_(channel_std)
    return images


@torch.no_grad()
def random_erasing_(
    images: Tensor, probability: float = 0.25, *, generator: torch.Generator
) -> Tensor:
    """Replace a rectangle in some of the images by noise N(0, 1), in place (arXiv:1708.04896).

    Area (2 % to a third of the image) and logarithm of the aspect ratio (height by width, 0.3 to
    1 / 0.3) are uniform. As in timm, up to ten rectangles are drawn until one is lower and narrower
    than the image; if none is, the image stays whole.

    Args:
        images: (B, C, H, W), floating point.
        probability: that an image is changed.
        generator: on the device of the images.
    """
    batch, _, height, width = images.shape
    device = images.device
    # (attempts, B) each
    area, ratio = torch.rand(2, ERASING_ATTEMPTS, batch, generator=generator, device=device)
    # (B,) each
    chosen, y, x = torch.rand(3, batch, generator=generator, device=device)
    area = height * width * _scale(area, *ERASED_AREA)
    log_low, log_high = map(math.log, ERASED_ASPECT)
    ratio = _scale(ratio, log_low, log_high).exp()
    heights = (area * ratio).sqrt().round()  # (attempts, B)
    widths = (area / ratio).sqrt().round()  # (attempts, B)
    fits = (heights < height) & (widths < width)  # (attempts, B)
    first = fits.int().argmax(0, keepdim=True)  # (1, B): the first attempt that fits
    h = heights.gather(0, first)[0]  # (B,)
    w = widths.gather(0, first)[0]  # (B,)
    top = (y * (height - h + 1)).floor()  # (B,)
    left = (x * (width - w + 1)).floor()  # (B,)
    rows = _interval(height, top, h)  # (B, H)
    columns = _interval(width, left, w)  # (B, W)
    erased = (chosen < probability) & fits.any(0)  # (B,)
    inside = rows[:, :, None] & columns[:, None, :]  # (B, H, 1) & (B, 1, W) -> (B, H, W)
    inside = inside & erased[:, None, None]
    inside = inside[:, None]  # (B, 1, H, W): the same for all channels
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
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
    """Mix every image, and its label, with the one at the mirrored place in the batch.

    One draw is for the whole batch. Mixup (arXiv:1710.09412): lambda x image + (1 - lambda) x
    other. Cutmix (arXiv:1905.04899): a box of about 1 - lambda of the area comes from the other
    image, and labels follow the area that it covers in fact. The image in the middle of an odd
    batch is mixed with itself.

    Args:
        images: (B, C, H, W), floating point, on the generator's device.
        labels: (B,) class indices.
        num_classes: length of the soft labels.
        mixup, cutmix: lambda is Beta(alpha, alpha) with this alpha; 0 = off.
        switch_prob: probability of cutmix, if both are on.
        label_smoothing: fraction of every label that is spread evenly over all classes.
        generator: on the device of the images.

    Returns:
        Mixed images (B, C, H, W) and soft labels (B, num_classes), float32, whose rows sum to 1.
    """
    targets = torch.nn.functional.one_hot(labels, num_classes).float()  # (B, num_classes)
    targets = (1 - label_smoothing) * targets + label_smoothing / num_classes
    if max(mixup, cutmix) <= 0:
        return images, targets
    weights = _mixing_weights(images, mixup, cutmix, switch_prob, generator)  # (H, W)
    mixed = torch.lerp(images.flip(0), images, weights.to(images.dtype))
    mixed_targets = torch.lerp(targets.flip(0), targets, weights.mean())
    return mixed, mixed_targets


def _mixing_weights(
    images: Tensor, mixup: float, cutmix: float, switch_prob: float, generator: torch.Generator
) -> Tensor:
    """Return the weight of an image in its mixture, for every pixel: (H, W).

    It is one number for all pixels (mixup), or 0 in a box and 1 around it (cutmix).
    """
    height, width = images.shape[-2:]
    switch, y, x = torch.rand(3, generator=generator, device=images.device)
    if mixup > 0:
        weight = _symmetric_beta(mixup, images.device, generator)
        mixing = weight.expand(height, width)
    if cutmix > 0:
        side = (1 - _symmetric_beta(cutmix, images.device, generator)).sqrt()
        box = _cut(height, y, side)[:, None] & _cut(width, x, side)  # (H, 1) & (W,) -> (H, W)
        cutting = (~box).float()
    if mixup > 0 and cutmix > 0:
        # Both are computed, because asking which one is taken would wait for the device.
        return torch.where(switch < switch_prob, cutting, mixing)
    return mixing if mixup > 0 else cutting


def _symmetric_beta(alpha: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return one draw from Beta(alpha, alpha), alpha > 0: a scalar.

    torch's samplers of Beta take no generator. Here t is a draw from Student's distribution with
    2 alpha degrees of freedom, divided by sqrt(2 alpha), by Bailey's polar method (Math. Comp. 62,
    1994). (1 + t / sqrt(1 + t^2)) / 2 is then a draw from Beta(alpha, alpha).
    """
    u, v = torch.rand(2, generator=generator, device=device)
    radius = torch.expm1(-u.log() / alpha).sqrt()
    angle = 2 * math.pi * v
    t = radius * torch.cos(angle)
    return (1 + t.atan().sin()) / 2  # sin(atan(t)) is t / sqrt(1 + t^2), also for an infinite t


def _cut(length: int, center: Tensor, fraction: Tensor) -> Tensor:
    """Return which places of a side lie in a box that may reach over its ends: (length,), boolean.

    Args:
        center: of the box. fraction: of the side that the box takes up. Scalars from 0 to 1.
    """
    size = (length * fraction).floor()
    start = (length * center).floor() - size // 2
    return _interval(length, start, size)


def _interval(length: int, start: Tensor, size: Tensor) -> Tensor:
    """Return which of the places 0 .. length - 1 lie in [start, start + size), boolean.

    Args:
        start, size: (...), for a result (..., length).
    """
    places = torch.arange(length, device=start.device)  # (length,)
    is_after_start = places >= start[..., None]
    is_before_end = places < (start + size)[..., None]
    return is_after_start & is_before_end


def _scale(uniform: Tensor, low: float, high: float) -> Tensor:
    """Return numbers between two bounds, from numbers in [0, 1)."""
    return low + (high - low) * uniform
