"""RandAugment (arXiv:1909.13719) by timm's policies, e.g. `rand-m9-mstd0.5-inc1`; color jitter.

The operations, and what a magnitude means to each, are those of timm 1.0, so a policy has the same
effect. Every random number comes from torch's global generator, never from `random` or numpy.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageOps

from .processors import GRAY_LEVELS

# From a fraction of the largest magnitude, a sign, and whether a larger magnitude always changes
# more, to the strength of an operation.
Strength = Callable[[float, int, bool], float]
# From an image and a strength to an image.
Operation = Callable[[Image.Image, float], Image.Image]
# From strength, width and height to (a, b, c, d, e, f): the pixel at (x, y) comes from
# (a x + b y + c, d x + e y + f).
AffineMap = Callable[[float, int, int], tuple[float, ...]]

MAX_MAGNITUDE = 10
# What the largest magnitude means: of Rotate, of shears in pixels per pixel, of translations as a
# fraction of the side, and of SolarizeAdd in gray levels.
MAX_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_SHIFT = 0.45
MAX_ADDED = 110
MIDDLE_GRAY = (128, 128, 128)
RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
EXAMPLE = "rand-m9-mstd0.5-inc1"
# Key in a policy -> (field of RandAugment, type, smallest, largest).
POLICY_PARTS = {
    "m": ("magnitude", float, 0, MAX_MAGNITUDE),
    "n": ("num_operations", int, 1, 100),
    "p": ("probability", float, 0, 1),
    "mstd": ("magnitude_std", float, 0, 100),
    "inc": ("increasing", bool, 0, 1),
}


def _factor(fraction: float, sign: int, increasing: bool) -> float:
    if increasing:
        return max(0.1, 1 + sign * fraction * 0.9)
    return fraction * 1.8 + 0.1


def _bits(fraction: float, sign: int, increasing: bool) -> int:
    bits = int(fraction * 4)
    return 4 - bits if increasing else bits


def _threshold(fraction: float, sign: int, increasing: bool) -> int:
    level = int(fraction * GRAY_LEVELS)
    return GRAY_LEVELS - level if increasing else level


def _added(fraction: float, sign: int, increasing: bool) -> int:
    return int(fraction * MAX_ADDED)


def _degrees(fraction: float, sign: int, increasing: bool) -> float:
    return sign * fraction * MAX_DEGREES


def _shear(fraction: float, sign: int, increasing: bool) -> float:
    return sign * fraction * MAX_SHEAR


def _shift(fraction: float, sign: int, increasing: bool) -> float:
    return sign * fraction * MAX_SHIFT


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    # The largest magnitude keeps no bit, and the image is black. ImageOps.posterize refuses that in
    # newer versions of Pillow.
    step = 2 ** (8 - bits)
    table = [level // step * step for level in range(GRAY_LEVELS)]
    return image.point(table * 3)


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    middle = GRAY_LEVELS // 2
    darker = [level + added for level in range(middle)]
    brighter = list(range(middle, GRAY_LEVELS))
    return image.point((darker + brighter) * 3)


# Operations that change gray levels only. The first three have no strength.
LEVEL_OPERATIONS: dict[str, Operation] = {
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
AFFINE_MAPS: dict[str, AffineMap] = {
    "ShearX": lambda shear, width, height: (1, shear, 0, 0, 1, 0),
    "ShearY": lambda shear, width, height: (1, 0, 0, shear, 1, 0),
    "TranslateXRel": lambda shift, width, height: (1, 0, shift * width, 0, 1, 0),
    "TranslateYRel": lambda shift, width, height: (1, 0, 0, 0, 1, shift * height),
}
JITTERED = ("Brightness", "Contrast", "Color")
OPERATIONS = (*LEVEL_OPERATIONS, *ENHANCEMENTS, *AFFINE_MAPS, "Rotate")
STRENGTHS: dict[str, Strength] = {
    "Posterize": _bits,
    "Solarize": _threshold,
    "SolarizeAdd": _added,
    "Rotate": _degrees,
    "ShearX": _shear,
    "ShearY": _shear,
    "TranslateXRel": _shift,
    "TranslateYRel": _shift,
    **dict.fromkeys(ENHANCEMENTS, _factor),
}


def strength_of(
    name: str, magnitude: float, sign: int = 1, increasing: bool = True
) -> float | None:
    """Return what a magnitude means to an operation, in the operation's own unit.

    Args:
        name: of the operation.
        magnitude: 0 to 10.
        sign: 1 or -1, the direction; Posterize, Solarize and SolarizeAdd have only one.
        increasing: whether a larger magnitude always changes more; otherwise Posterize keeps more
            bits, Solarize inverts fewer levels, and factors run from 0.1 to 1.9.

    Returns:
        Degrees for Rotate, pixels per pixel for shears, a fraction of the side for translations,
        the remaining bits for Posterize, the lowest inverted level for Solarize, added levels for
        SolarizeAdd, a factor (1 changes nothing) for Color, Contrast, Brightness and Sharpness;
        None for operations without a strength.
    """
    if name not in STRENGTHS:
        return None
    return STRENGTHS[name](magnitude / MAX_MAGNITUDE, sign, increasing)


def apply_operation(
    image: Image.Image,
    name: str,
    strength: float | None,
    fill: tuple[int, ...] = MIDDLE_GRAY,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Return an RGB image of the same size, changed by one operation.

    Args:
        strength: as `strength_of` returns it.
        fill: color of pixels that come from outside the image.
        resample: interpolation of rotations, shears and translations.
    """
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
    """Change an image by some random ones of the 15 operations.

    Attributes:
        magnitude: how strong operations are, 0 to 10.
        num_operations: how many are drawn for an image; the same one may be drawn twice.
        probability: that a drawn operation is applied.
        magnitude_std: standard deviation of the magnitude, which is cut off at 0 and 10.
        increasing: see `strength_of`.
        fill: color of pixels that come from outside the image.
        resample: interpolation of rotations, shears and translations; None for bilinear or bicubic
            at random.
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
        """Make it from timm's notation.

        Args:
            policy: `rand`, then parts in any order, joined by dashes, each a key and a number. Keys
                and defaults: m (magnitude, 10), n (operations per image, 2), p (probability, 0.5),
                mstd (standard deviation of the magnitude, 0), inc (1 for increasing, 0).
            fill, resample: as for the class.

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
        """Return a changed RGB image of the same size."""
        for index in torch.randint(len(OPERATIONS), (self.num_operations,)).tolist():
            image = self._sometimes(image, OPERATIONS[index])
        return image

    def _sometimes(self, image: Image.Image, name: str) -> Image.Image:
        """Return the image, changed by an operation with a certain probability."""
        # All are drawn in any case, so that the numbers of later operations do not depend on them.
        skipped, direction, interpolation = torch.rand(3).tolist()
        magnitude = self.magnitude + self.magnitude_std * torch.randn(()).item()
        if skipped >= self.probability:
            return image
        magnitude = min(max(magnitude, 0), MAX_MAGNITUDE)
        sign = 1 if direction < 0.5 else -1
        strength = strength_of(name, magnitude, sign, self.increasing)
        resample = self.resample
        if resample is None:
            resample = RESAMPLINGS[interpolation < 0.5]
        return apply_operation(image, name, strength, self.fill, resample)


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast and saturation of an image, in random order.

    Attributes:
        strength: factors are uniform from 1 - strength (at least 0) to 1 + strength.
    """

    strength: float

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a changed RGB image of the same size."""
        low = max(0.0, 1 - self.strength)
        high = 1 + self.strength
        factors = (low + (high - low) * torch.rand(3)).tolist()
        for index in torch.randperm(3).tolist():
            image = apply_operation(image, JITTERED[index], factors[index])
        return image


def _parse_part(part: str, policy: str) -> tuple[str, float]:
    """Return field and value of a part of a policy: "mstd0.5" -> ("magnitude_std", 0.5)."""
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
    if match is None or match[1] not in POLICY_PARTS:
        raise ValueError(
            f"the policy {policy!r} has the part {part!r}; allowed are {', '.join(POLICY_PARTS)}, "
            f"each with a number behind it, e.g. {EXAMPLE}."
        )
    field, kind, smallest, largest = POLICY_PARTS[match[1]]
    value = float(match[2])
    if not smallest <= value <= largest or kind(value) != value:
        what = "a number" if kind is float else "a whole number"
        raise ValueError(
            f"the policy {policy!r} has the part {part!r}; {what} from {smallest} to {largest} is "
            "allowed."
        )
    return field, kind(value)
