"""RandAugment: what each operation does to pixels, what magnitudes mean, how often and how randomly
it is applied."""

import base64
import pickle
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from factories import golden
from PIL import Image

from ofb_hf.data import randaugment
from ofb_hf.data.randaugment import (
    OPERATIONS,
    ColorJitter,
    RandAugment,
    apply_operation,
    strength_of,
)

PUBLISHED = golden("randaugment.json")
DEIT = "rand-m9-mstd0.5-inc1"
FIXED = ("AutoContrast", "Equalize", "Invert")
EXACT = (*FIXED, "Posterize", "Solarize", "SolarizeAdd")
SIGNED = (
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
)
GEOMETRIC = SIGNED[:5]
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILL = (124, 116, 104)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth colors plus noise, between black and white but touching neither."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    smooth = np.stack([30 + 170 * x, 220 - 160 * y, 60 + 90 * (x + y)], axis=-1)
    noisy = smooth + np.random.default_rng(seed).normal(0, 18, smooth.shape)
    return Image.fromarray(noisy.clip(12, 243).round().astype(np.uint8))


def levels(image: Image.Image) -> np.ndarray:
    """Pixels as (H, W, 3) integers that do not overflow."""
    return np.asarray(image).astype(int)


# --------------------------------------------------------------------------------- published pixels


def decoded(text: str) -> np.ndarray:
    """An array of the fixture."""
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(
        PUBLISHED["height"], PUBLISHED["width"], 3
    )


@pytest.mark.parametrize(
    "case", PUBLISHED["cases"], ids=lambda case: f"{case['operation']}-{case['magnitude']}"
)
def test_operations_make_the_published_pixels(case):
    name, image = case["operation"], Image.fromarray(decoded(PUBLISHED["image"]))
    strength = strength_of(name, case["magnitude"] or 0, case["sign"])
    resample = Image.Resampling[(case["resample"] or "bicubic").upper()]
    actual = levels(apply_operation(image, name, strength, tuple(PUBLISHED["fill"]), resample))
    expected = decoded(case["pixels"]).astype(int)
    assert np.abs(actual - expected).max() <= (0 if name in EXACT else 1)
    assert np.abs(expected - levels(image)).mean() > 1  # the fixture shows something


def test_the_published_pixels_cover_every_operation():
    shown = {(case["operation"], case["magnitude"]) for case in PUBLISHED["cases"]}
    assert shown == {
        (name, m) for name in OPERATIONS for m in ([None] if name in FIXED else [5, 9])
    }
    assert len(OPERATIONS) == 15


# ---------------------------------------------------------------------------- formulas, from pixels


def stretched(band: np.ndarray) -> np.ndarray:
    """Autocontrast of one channel: darkest to 0, brightest to 255, rounded down."""
    low, high = band.min(), band.max()
    return ((band - low) * (255 / (high - low)) + 1e-9).astype(int).clip(0, 255)


def equalized(band: np.ndarray) -> np.ndarray:
    """A level becomes the number of darker pixels, in steps of 1/255 of all pixels but the
    brightest."""
    counts = np.bincount(band.ravel(), minlength=256)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    darker = np.concatenate([[0], counts.cumsum()[:-1]])
    return ((darker + step // 2) // step).clip(0, 255)[band]


def gray(pixels: np.ndarray) -> np.ndarray:
    """Luma of ITU-R 601, (H, W, 1)."""
    return (pixels @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(int)[..., None]


def smoothed(pixels: np.ndarray) -> np.ndarray:
    """Each pixel with weight 5 and its eight neighbors with weight 1; the border stays."""
    out, (height, width, _) = pixels.copy(), pixels.shape
    window = [
        pixels[1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx]
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    ]
    out[1:-1, 1:-1] = ((sum(window) + 4 * window[4]) / 13 + 0.5).astype(int)
    return out


def blended(neutral: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """factor 0: neutral, 1: the pixels, beyond: away from neutral."""
    return (neutral + factor * (pixels - neutral)).clip(0, 255).astype(int)


def by_formula(name: str, pixels: np.ndarray, strength: float | None) -> np.ndarray:
    """What an operation on levels makes of (H, W, 3) pixels."""
    if name in ("AutoContrast", "Equalize"):
        change = stretched if name == "AutoContrast" else equalized
        return np.stack([change(pixels[..., c]) for c in range(3)], axis=-1)
    if name == "Invert":
        return 255 - pixels
    if name == "Posterize":
        return pixels & (256 - 2 ** (8 - strength))
    if name == "Solarize":
        return np.where(pixels >= strength, 255 - pixels, pixels)
    if name == "SolarizeAdd":
        return np.where(pixels < 128, (pixels + strength).clip(0, 255), pixels)
    neutral = {
        "Brightness": np.zeros_like(pixels),
        "Contrast": np.full_like(pixels, round(gray(pixels).mean())),
        "Color": gray(pixels),
        "Sharpness": smoothed(pixels),
    }
    return blended(neutral[name], pixels, strength)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in GEOMETRIC])
@pytest.mark.parametrize("magnitude", [0, 2.5, 5, 9, 10])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_on_levels_follow_their_formulas(name, magnitude, sign):
    image = picture(seed=int(4 * magnitude))
    strength = strength_of(name, magnitude, sign)
    expected = by_formula(name, levels(image), strength)
    actual = levels(apply_operation(image, name, strength))
    assert np.abs(actual - expected).max() <= (0 if name in EXACT and name != "AutoContrast" else 1)


def sampled(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of (H, W, 3) at points in pixels, whose centers lie at halves; FILL outside
    the image."""
    height, width, _ = pixels.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = np.floor(x - 0.5).astype(int), np.floor(y - 0.5).astype(int)
    dx, dy = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]
    columns = [(left + i).clip(0, width - 1) for i in (0, 1)]
    above, below = (
        pixels[row, columns[0]] * (1 - dx) + pixels[row, columns[1]] * dx
        for row in (top.clip(0, height - 1), (top + 1).clip(0, height - 1))
    )
    return np.where(inside[..., None], above * (1 - dy) + below * dy, FILL)


def source_of(name: str, strength: float, x: np.ndarray, y: np.ndarray, width: int, height: int):
    """Where in the image a point of the result comes from."""
    if name == "Rotate":  # counterclockwise on the screen, around the middle
        angle, x, y = np.deg2rad(strength), x - width / 2, y - height / 2
        return (
            np.cos(angle) * x - np.sin(angle) * y + width / 2,
            np.sin(angle) * x + np.cos(angle) * y + height / 2,
        )
    moved_x = {"ShearX": strength * y, "TranslateXRel": strength * width}.get(name, 0)
    moved_y = {"ShearY": strength * x, "TranslateYRel": strength * height}.get(name, 0)
    return x + moved_x, y + moved_y


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("magnitude", [1.5, 5, 9])
@pytest.mark.parametrize("sign", [1, -1])
def test_geometric_operations_take_pixels_from_where_they_should(name, magnitude, sign):
    image, strength = picture(41, 29), strength_of(name, magnitude, sign)
    y, x = np.mgrid[0 : image.height, 0 : image.width] + 0.5
    points = source_of(name, strength, x, y, *image.size)
    actual = levels(apply_operation(image, name, strength, FILL, BILINEAR))
    expected = sampled(levels(image), *points)
    # A point on the very border may count as outside or inside.
    border = np.minimum(np.abs(points[0] % image.width), np.abs(points[1] % image.height)) < 1e-6
    assert border.mean() < 0.1
    assert np.abs(actual - expected)[~border].max() <= 1.01
    outside = (actual == FILL).all(-1).mean()
    assert outside > 0.02 * magnitude / 5
    bicubic = levels(apply_operation(image, name, strength, FILL, BICUBIC))
    assert (bicubic == FILL).all(-1).mean() == pytest.approx(outside, abs=0.01)
    assert not np.array_equal(bicubic, actual)


# --------------------------------------------------------------------------------------- magnitudes

# Operation: strengths at the magnitudes 0, 5, 9 and 10 that change more the larger they are.
INCREASING = {
    "Rotate": (0, 15, 27, 30),
    "Posterize": (4, 2, 1, 0),
    "Solarize": (256, 128, 26, 0),
    "SolarizeAdd": (0, 55, 99, 110),
    "Color": (1, 1.45, 1.81, 1.9),
    "Contrast": (1, 1.45, 1.81, 1.9),
    "Brightness": (1, 1.45, 1.81, 1.9),
    "Sharpness": (1, 1.45, 1.81, 1.9),
    "ShearX": (0, 0.15, 0.27, 0.3),
    "ShearY": (0, 0.15, 0.27, 0.3),
    "TranslateXRel": (0, 0.225, 0.405, 0.45),
    "TranslateYRel": (0, 0.225, 0.405, 0.45),
}
# The same in the original RandAugment's sense, where it differs.
ORIGINAL = {
    "Posterize": (0, 2, 3, 4),
    "Solarize": (0, 128, 230, 256),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), (0.1, 1.0, 1.72, 1.9)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_magnitudes_mean_what_the_tables_say(name):
    if name in FIXED:
        assert strength_of(name, 7) is None
        return
    increasing, original = (
        [strength_of(name, m, 1, inc) for m in (0, 5, 9, 10)] for inc in (True, False)
    )
    assert increasing == pytest.approx(INCREASING[name], abs=1e-9)
    assert original == pytest.approx(ORIGINAL.get(name, INCREASING[name]), abs=1e-9)
    mirrored = [strength_of(name, m, -1) for m in (0, 5, 9, 10)]
    if name in GEOMETRIC:
        assert mirrored == [-value for value in increasing]
    elif name in SIGNED:
        assert mirrored == pytest.approx([2 - value for value in increasing])
    else:
        assert mirrored == increasing


# inverts more, not farther
@pytest.mark.parametrize("name", [name for name in INCREASING if name != "Solarize"])
def test_increasing_operations_change_more_with_magnitude(name):
    image = picture(96, 96)
    for sign in (1, -1) if name in SIGNED else (1,):
        images = [
            apply_operation(image, name, strength_of(name, magnitude, sign))
            for magnitude in (1, 4, 7, 10)
        ]
        changes = [np.abs(levels(changed) - levels(image)).mean() for changed in images]
        assert changes == sorted(changes)
        assert changes[0] < changes[-1]


# ----------------------------------------------------------------------------------- policy strings


def test_policies_are_read():
    assert RandAugment.from_policy(DEIT) == RandAugment(9, 2, 0.5, 0.5, True)
    assert RandAugment.from_policy("rand") == RandAugment(10, 2, 0.5, 0.0, False)
    read = RandAugment.from_policy("rand-inc0-p0.25-n3-m7.5", FILL, BICUBIC)
    assert read == RandAugment(7.5, 3, 0.25, 0.0, False, FILL, BICUBIC)
    assert RandAugment.from_policy(DEIT).fill == (128, 128, 128)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("augmix-m3", "begins with 'augmix'; only `rand` is known"),
        ("", "begins with ''"),
        ("rand-m9-w0", "has the part 'w0'; allowed are m, n, p, mstd, inc"),
        ("rand-mmax12", "'mmax12'"),
        ("rand-m9-tweights", "'tweights'"),
        ("rand-m9-", "has the part ''"),
        ("rand-m", "'m'; allowed are"),
        ("rand-m-9", "'m'; allowed are"),
        ("rand-m9x", "'m9x'; allowed are"),
        ("rand-m11", "'m11'; a number from 0 to 10 is allowed"),
        ("rand-n0", "'n0'; a whole number from 1 to 100"),
        ("rand-n2.5", "'n2.5'; a whole number"),
        ("rand-p1.5", "'p1.5'; a number from 0 to 1"),
        ("rand-mstd101", "'mstd101'; a number from 0 to 100"),
        ("rand-inc2", "'inc2'; a whole number from 0 to 1"),
        ("rand-m9-m8", "gives the magnitude twice"),
    ],
)
def test_other_policies_are_refused_by_name(policy, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RandAugment.from_policy(policy)


# ------------------------------------------------------------------------------------------- chance


class Recorder:
    """Takes the place of `apply_operation`, changes nothing, and remembers."""

    def __init__(self):
        self.calls = []

    def __call__(self, image, name, strength, fill=None, resample=None):
        self.calls.append((name, strength, fill, resample))
        return image

    def strengths(self, name):
        """Of one operation, as an array."""
        return np.array([call[1] for call in self.calls if call[0] == name])


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(randaugment, "apply_operation", recorder := Recorder())
    return recorder


def test_operations_are_drawn_evenly_and_applied_half_of_the_time(recorder):
    augment, image = RandAugment.from_policy(DEIT), picture(2, 2)
    per_image = Counter()
    for _ in range(6000):
        before = len(recorder.calls)
        augment(image)
        per_image[len(recorder.calls) - before] += 1
    assert [per_image[n] / 6000 for n in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    shares = Counter(call[0] for call in recorder.calls)
    assert set(shares) == set(OPERATIONS)
    assert all(abs(count / len(recorder.calls) - 1 / 15) < 0.015 for count in shares.values())
    resampled = Counter(call[3] for call in recorder.calls)
    assert resampled[BILINEAR] / len(recorder.calls) == pytest.approx(0.5, abs=0.03)
    assert resampled[BILINEAR] + resampled[BICUBIC] == len(recorder.calls)


def test_all_drawn_operations_come_with_probability_one_and_none_with_zero(recorder):
    for _ in range(50):
        RandAugment.from_policy("rand-n3-p1")(picture(2, 2))
        RandAugment.from_policy("rand-n3-p0")(picture(2, 2))
    assert len(recorder.calls) == 150


def test_magnitudes_scatter_around_theirs_and_stay_below_ten(recorder, monkeypatch):
    monkeypatch.setattr(randaugment, "OPERATIONS", ("Rotate",))
    augment = RandAugment.from_policy("rand-m9-mstd0.5-inc1-p1-n100")
    for _ in range(60):
        augment(picture(2, 2))
    degrees = recorder.strengths("Rotate")
    magnitudes = np.abs(degrees) / 3
    assert (degrees > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert magnitudes.max() == 10
    # beyond two standard deviations
    assert (magnitudes == 10).mean() == pytest.approx(0.0228, abs=0.008)
    assert np.median(magnitudes) == pytest.approx(9, abs=0.03)
    assert np.quantile(magnitudes, [0.1587, 0.8413]) == pytest.approx([8.5, 9.5], abs=0.05)


def test_magnitudes_stay_above_zero_and_are_fixed_without_scatter(recorder, monkeypatch):
    monkeypatch.setattr(randaugment, "OPERATIONS", ("SolarizeAdd",))
    RandAugment.from_policy("rand-m1-mstd3-p1-n100")(picture(2, 2))
    added = recorder.strengths("SolarizeAdd")
    assert added.min() == 0
    assert (added == 0).mean() == pytest.approx(0.4, abs=0.15)
    recorder.calls.clear()
    RandAugment.from_policy("rand-m9-p1-n100")(picture(2, 2))
    assert set(recorder.strengths("SolarizeAdd")) == {99}


def test_fill_resampling_and_the_sense_of_magnitudes_reach_the_operations(recorder):
    augment = RandAugment.from_policy("rand-m9-p1-n100-inc1", FILL, BILINEAR)
    augment(picture(2, 2))
    assert {call[2:] for call in recorder.calls} == {(FILL, BILINEAR)}
    assert set(recorder.strengths("Posterize")) == {1}
    recorder.calls.clear()
    RandAugment.from_policy("rand-m9-p1-n100")(picture(2, 2))
    assert set(recorder.strengths("Posterize")) == {3}


def test_operations_follow_one_another(monkeypatch):
    monkeypatch.setattr(randaugment, "OPERATIONS", ("Invert",))
    image = picture()
    assert np.array_equal(RandAugment(num_operations=2, probability=1.0)(image), image)
    assert np.array_equal(
        levels(RandAugment(num_operations=3, probability=1.0)(image)), 255 - levels(image)
    )


@pytest.mark.parametrize("augment", [RandAugment.from_policy(DEIT + "-n4-p1"), ColorJitter(0.3)])
def test_chance_is_torchs_alone_and_follows_its_seed(augment):
    image = picture()
    torch.manual_seed(3)
    first = [levels(augment(image)) for _ in range(8)]
    assert len({pixels.tobytes() for pixels in first}) > 6
    random.seed(5)
    np.random.seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist()
    torch.manual_seed(3)
    copied = pickle.loads(pickle.dumps(augment))
    assert copied == augment
    assert all(np.array_equal(levels(copied(image)), pixels) for pixels in first)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (33, 17)])
def test_images_of_any_size_keep_it(size):
    image = picture(*size)
    for name in OPERATIONS:
        for magnitude in (0, 5, 10):
            for sign in (1, -1):
                changed = apply_operation(image, name, strength_of(name, magnitude, sign), FILL)
                assert (changed.size, changed.mode) == (size, "RGB")


# ------------------------------------------------------------------------------------ colour jitter


def test_jitter_draws_three_factors_in_any_order(recorder):
    for _ in range(1500):
        ColorJitter(0.3)(picture(2, 2))
    names = [call[0] for call in recorder.calls]
    orders = Counter(tuple(names[i : i + 3]) for i in range(0, len(names), 3))
    assert len(orders) == 6
    assert min(orders.values()) > 180
    for name in ("Brightness", "Contrast", "Color"):
        factors = recorder.strengths(name)
        assert len(factors) == 1500
        assert 0.7 <= factors.min() < 0.71 < 1.29 < factors.max() <= 1.3
        assert factors.mean() == pytest.approx(1, abs=0.02)


def test_jitter_without_strength_changes_nothing_and_factors_stay_positive(recorder):
    for _ in range(200):
        ColorJitter(1.5)(picture(2, 2))
        ColorJitter(0.0)(picture(2, 2))
    factors = np.array([call[1] for call in recorder.calls]).reshape(-1, 2, 3)
    assert (factors[:, 1] == 1).all()
    assert 0 <= factors[:, 0].min() < 0.1
    assert 2.4 < factors[:, 0].max() <= 2.5


def test_a_factor_of_one_leaves_every_pixel():
    image = picture()
    assert np.array_equal(ColorJitter(0.0)(image), image)


# ---------------------------------------------------------------------------------- next to timm


def timm_module():
    """timm's RandAugment, where timm can be imported."""
    try:
        from timm.data import auto_augment
    # a torchvision of another build raises a RuntimeError
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    return auto_augment


@pytest.mark.parametrize("increasing", [True, False])
def test_operations_equal_those_of_timm(increasing, monkeypatch):
    timm, image = timm_module(), picture()
    renamed = dict(zip(timm._RAND_TRANSFORMS, timm._RAND_INCREASING_TRANSFORMS, strict=True))
    assert set(renamed) == set(OPERATIONS)
    for name in OPERATIONS:
        for magnitude in np.arange(0, 10, 0.75):
            for sign, draw in ((1, 0.1), (-1, 0.9)):
                monkeypatch.setattr(random, "random", lambda draw=draw: draw)
                theirs = timm.AugmentOp(
                    renamed[name] if increasing else name,
                    prob=1.0,
                    magnitude=magnitude,
                    hparams={"img_mean": FILL, "interpolation": BICUBIC},
                )
                if name == "Posterize" and strength_of(name, magnitude, sign, increasing) == 0:
                    continue  # black; newer versions of Pillow refuse it
                ours = apply_operation(
                    image, name, strength_of(name, magnitude, sign, increasing), FILL, BICUBIC
                )
                assert np.array_equal(ours, theirs(image)), (name, magnitude, sign)
