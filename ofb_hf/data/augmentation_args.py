"""How strongly images for training are changed: DeiT's recipe (arXiv:2012.12877, table 9) as
flags."""

import math
from dataclasses import dataclass, field

from .randaugment import RandAugment


@dataclass
class AugmentationArguments:
    """What the augmentation 'deit' does; the defaults are DeiT's, but for repeated augmentation.

    `auto_augment` and `color_jitter` change single images, the others whole batches (see
    `BatchAugmentation`).

    Raises:
        ValueError: for numbers out of range and for policies that are not understood.
    """

    auto_augment: str | None = field(
        default="rand-m9-mstd0.5-inc1",
        metadata={
            "help": "RandAugment in timm's notation: m magnitude (0 to 10), n operations per "
            "image, p probability of "
            "each, mstd standard deviation of the magnitude, inc1 = a larger magnitude always "
            "changes more. 'none' "
            "for colour jitter instead."
        },
    )
    color_jitter: float = field(
        default=0.3,
        metadata={
            "help": "Largest relative change of brightness, contrast and saturation. Only without "
            "auto_augment."
        },
    )
    random_erasing: float = field(
        default=0.25,
        metadata={"help": "Probability with which a rectangle of an image becomes noise."},
    )
    mixup: float = field(
        default=0.8,
        metadata={
            "help": "Alpha of mixup: the share of an image is Beta(alpha, alpha). 0 = no mixup."
        },
    )
    cutmix: float = field(
        default=1.0,
        metadata={
            "help": "Alpha of cutmix: the share that stays of an image is Beta(alpha, alpha). 0 = "
            "no cutmix."
        },
    )
    mixup_switch_prob: float = field(
        default=0.5,
        metadata={
            "help": "Probability with which a batch is cutmixed, where mixup and cutmix are both "
            "on."
        },
    )
    repeated_augmentation: int = field(
        default=1,
        metadata={
            "help": "Repeated augmentation (DeiT: 3), with streaming: images come this often in "
            "succession, augmented "
            "differently, and an epoch has one of so many parts of the images."
        },
    )

    def __post_init__(self):
        if self.auto_augment == "none":
            self.auto_augment = None
        if self.auto_augment is not None:
            try:
                RandAugment.from_policy(self.auto_augment)
            except ValueError as error:
                raise ValueError(
                    f"auto_augment is {self.auto_augment!r}: {error} Or 'none'."
                ) from error
        for name in ("random_erasing", "mixup_switch_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it is a probability, from 0 to 1.")
        for name in ("color_jitter", "mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be 0 (off) or larger.")
        if self.repeated_augmentation < 1:
            raise ValueError(
                f"repeated_augmentation is {self.repeated_augmentation}; it must be at least 1 "
                f"(off)."
            )
