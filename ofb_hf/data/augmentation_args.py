"""Arguments of the augmentation "deit": the recipe of DeiT (arXiv:2012.12877, table 9)."""

import math
from dataclasses import dataclass, field

from .randaugment import RandAugment


@dataclass
class AugmentationArguments:
    """Store how strongly "deit" changes images; the defaults are DeiT's, except repeats.

    `auto_augment` and `color_jitter` change single images (`DeiTTransform`), `random_erasing`,
    `mixup` and `cutmix` whole batches (`BatchAugmentation`).

    Raises:
        ValueError: for numbers out of range and for unknown policies.
    """

    auto_augment: str | None = field(
        default="rand-m9-mstd0.5-inc1",
        metadata={
            "help": "RandAugment in timm's notation: m magnitude (0 to 10), n operations per "
            "image, p probability of each, mstd standard deviation of the magnitude, inc1 = a "
            "larger magnitude always changes more. 'none' for color jitter instead."
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
        metadata={"help": "Probability that a rectangle of an image is replaced by noise."},
    )
    mixup: float = field(
        default=0.8,
        metadata={
            "help": "Alpha of mixup: an image has the weight Beta(alpha, alpha) in its mixture "
            "with another. 0 = no mixup."
        },
    )
    cutmix: float = field(
        default=1.0,
        metadata={
            "help": "Alpha of cutmix: the fraction of an image that is not replaced by a box of "
            "another is Beta(alpha, alpha). 0 = no cutmix."
        },
    )
    mixup_switch_prob: float = field(
        default=0.5,
        metadata={"help": "Probability of cutmix for a batch, where mixup and cutmix are both on."},
    )
    repeated_augmentation: int = field(
        default=1,
        metadata={
            "help": "Repeated augmentation (DeiT: 3), with streaming: every image comes N times "
            "in succession, augmented differently, and an epoch has one Nth of the images."
        },
    )

    def __post_init__(self):
        # "none" on the command line, where None cannot be written.
        if self.auto_augment == "none":
            self.auto_augment = None
        if self.auto_augment is not None:
            # The policy is parsed here for its errors, and again where it is used.
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
                "(off)."
            )
