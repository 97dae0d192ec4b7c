"""RandAugment (arXiv:1909.13719) by timm's policy strings, such as DeiT's `rand-m9-mstd0.5-inc1`,
and colour jitter.

The operations, and what a magnitude means to each, are those of timm 1.0: a policy does here what
it does there. Every random number comes from torch's global generator, never from `random` or
numpy.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10
MAX_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_SHIFT = 0.45
MAX_ADDED = 110
GRAY_LEVELS = 256
MIDDLE_GRAY = (128, 128, 128)
RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
EXAMPLE = "rand-m9-mstd0.5-inc1"
# Key of a policy's part -> (field of RandAugment, type, smallest, largest).
POLICY_PARTS = {
    "m": ("magnitude", float, 0, MAX_MAGNITUDE),
    "n": ("num_operations", int, 1, 100),
    "p": ("probability", float, 0, 1),
    "mstd": ("magnitude_std", float, 0, 100),
    "inc": ("increasing", bool, 0, 1),
}


def _factor(share: float, sign: int, increasing: bool) -> float:
    return max(0.1, 1 + sign * share * 0.9) if increasing else share * 1.8 + 0.1


def _bits(share: float, sign: int, increasing: bool) -> int:
    return 4 - int(share * 4) if increasing else int(share * 4)


def _threshold(share: float, sign: int, increasing: bool) -> int:
    return GRAY_LEVELS - int(share * GRAY_LEVELS) if increasing else int(share * GRAY_LEVELS)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    # The largest magnitude keeps no bit: black. ImageOps.posterize refuses that in newer versions
    # of Pillow.
    step = 2 ** (8 - bits)
    return image.point([level // step * step for level in range(GRAY_LEVELS)] * 3)


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    return image.point(
        [level + added if level < GRAY_LEVELS // 2 else level for level in range(GRAY_LEVELS)] * 3
    )


# (image, strength) -> image.
LEVEL_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": _posterize,
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": _solarize_add,
}
ENHANCEMENTS = {
    "Brightness": ImageEnhance.Brightness,
    "Contrast": ImageEnhance.Contrast,
    "Color": ImageEnhance.Color,
    "Sharpness": ImageEnhance.Sharpness,
}
# (strength, width, height) -> (a, b, c, d, e, f): the pixel at (x, y) comes from (a x + b y + c, d
# x + e y + f).
AFFINE_MAPS: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "ShearX": lambda shear, width, height: (1, shear, 0, 0, 1, 0),
    "ShearY": lambda shear, width, height: (1, 0, 0, shear, 1, 0),
    "TranslateXRel": lambda shift, width, height: (1, 0, shift * width, 0, 1, 0),
    "TranslateYRel": lambda shift, width, height: (1, 0, 0, 0, 1, shift * height),
}
OPERATIONS = (*LEVEL_OPERATIONS, *ENHANCEMENTS, *AFFINE_MAPS, "Rotate")
# (share of the largest magnitude, sign, increasing) -> strength.
STRENGTHS: dict[str, Callable[[float, int, bool], float]] = {
    "Posterize": _bits,
    "Solarize": _threshold,
    "SolarizeAdd": lambda share, sign, increasing: int(share * MAX_ADDED),
    "Rotate": lambda share, sign, increasing: sign * share * MAX_DEGREES,
    **dict.fromkeys(ENHANCEMENTS, _factor),
    **dict.fromkeys(("ShearX", "ShearY"), lambda share, sign, increasing: sign * share * MAX_SHEAR),
    **dict.fromkeys(
        ("TranslateXRel", "TranslateYRel"), lambda share, sign, increasing: sign * share * MAX_SHIFT
    ),
}


def strength_of(
    name: str, magnitude: float, sign: int = 1, increasing: bool = True
) -> float | None:
    """What a magnitude from 0 to 10 means to an operation, in the operation's own unit.

    Degrees for Rotate, pixels per pixel for shears, a share of the side for translations, bits that
    are kept for Posterize, the lowest inverted level for Solarize, added levels for SolarizeAdd, a
    factor (1 changes nothing) for Color, Contrast, Brightness and Sharpness; None for the
    operations that know only one strength.

    Args:
        sign: 1 or -1, the direction; Posterize, Solarize and SolarizeAdd have only one.
        increasing: whether a larger magnitude always changes more; otherwise Posterize keeps more
            bits, Solarize inverts fewer levels, and factors run from 0.1 to 1.9.
    """
    return (
        STRENGTHS[name](magnitude / MAX_MAGNITUDE, sign, increasing) if name in STRENGTHS else None
    )


def apply_operation(
    image: Image.Image,
    name: str,
    strength: float | None,
    fill: tuple[int, ...] = MIDDLE_GRAY,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """RGB image -> RGB image of the same size; pixels that come from outside the image take the
    color `fill`."""
    if name in LEVEL_OPERATIONS:
        return LEVEL_OPERATIONS[name](image, strength)
    if name in ENHANCEMENTS:
        return ENHANCEMENTS[name](image).enhance(strength)
    if name == "Rotate":
        return image.rotate(strength, resample, fillcolor=fill)
    source = AFFINE_MAPS[name](strength, *image.size)
    return image.transform(image.size, Image.Transform.AFFINE, source, resample, fillcolor=fill)


@dataclass(frozen=True)
class RandAugment:
    """Some of the 15 operations after one another, each drawn from all of them and skipped with a
    certain probability.

    Attributes:
        magnitude: how strong operations are, 0 to 10.
        num_operations: how many are drawn for an image; the same one may come twice.
        probability: with which a drawn operation is applied.
        magnitude_std: standard deviation of the magnitude, which stays within 0 and 10.
        increasing: see `strength_of`.
        fill: color of pixels that come from outside the image.
        resample: interpolation of rotations, shears and translations; None: bilinear or bicubic, at
            random.
    """

    magnitude: float = MAX_MAGNITUDE
    num_operations: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    increasing: bool = False
    fill: tuple[int, ...] = MIDDLE_GRAY
    resample: Image.Resampling | None = None

    @classmethod
    def from_policy(
        cls,
        policy: str,
        fill: tuple[int, ...] = MIDDLE_GRAY,
        resample: Image.Resampling | None = None,
    ) -> "RandAugment":
        """From timm's notation: `rand`, then parts in any order, joined by dashes, each a key and a
        number.

        Keys: m (magnitude, 10 if left out), n (operations per image, 2), p (probability, 0.5), mstd
        (standard deviation of the magnitude, 0), inc (1: increasing, 0).

        Raises:
            ValueError: for another policy than `rand`, and for parts that are unknown, repeated or
                out of range.
        """
        name, *parts = policy.split("-")
        if name != "rand":
            raise ValueError(
                f"the policy {policy!r} begins with {name!r}; only `rand` is known, e.g. {EXAMPLE}."
            )
        values = {}
        for part in parts:
            field, value = _parse_part(part, policy)
            if field in values:
                raise ValueError(
                    f"the policy {policy!r} gives the {field} twice; leave one of them out."
                )
            values[field] = value
        return cls(**values, fill=fill, resample=resample)

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image -> RGB image of the same size."""
        for index in torch.randint(len(OPERATIONS), (self.num_operations,)).tolist():
            image = self._sometimes(image, OPERATIONS[index])
        return image

    def _sometimes(self, image: Image.Image, name: str) -> Image.Image:
        skipped, direction, interpolation = torch.rand(3).tolist()
        magnitude = self.magnitude + self.magnitude_std * torch.randn(()).item()
        if skipped >= self.probability:
            return image
        magnitude = min(max(magnitude, 0), MAX_MAGNITUDE)
        strength = strength_of(name, magnitude, 1 if direction < 0.5 else -1, self.increasing)
        resample = RESAMPLINGS[interpolation < 0.5] if self.resample is None else self.resample
        return apply_operation(image, name, strength, self.fill, resample)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, in random order, each times a factor from 1 - strength
    to 1 + strength."""

    strength: float

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image -> RGB image of the same size."""
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        factors = (low + (high - low) * torch.rand(3)).tolist()
        for index in torch.randperm(3).tolist():
            image = apply_operation(
                image, ("Brightness", "Contrast", "Color")[index], factors[index]
            )
        return image


def _parse_part(part: str, policy: str) -> tuple[str, float]:
    """`mstd0.5` -> ("magnitude_std", 0.5)."""
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
    if match is None or match[1] not in POLICY_PARTS:
        raise ValueError(
            f"the policy {policy!r} has the part {part!r}; allowed are {', '.join(POLICY_PARTS)}, "
            f"each with a number "
            f"behind it, e.g. {EXAMPLE}."
        )
    field, kind, smallest, largest = POLICY_PARTS[match[1]]
    value = float(match[2])
    if not smallest <= value <= largest or kind(value) != value:
        what = "a number" if kind is float else "a whole number"
        raise ValueError(
            f"the policy {policy!r} has the part {part!r}; {what} from {smallest} to {largest} is "
            f"allowed."
        )
    return field, kind(value)
