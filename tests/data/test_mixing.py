"""Batches on their way into the model: exact normalisation, erased rectangles, mixed pairs and
their soft labels."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot
from transformers import HfArgumentParser, ViTImageProcessorPil

from ofb_hf.data.augmentation_args import AugmentationArguments
from ofb_hf.data.mixing import (
    BatchAugmentation,
    mixup_cutmix,
    normalize,
    random_erasing_,
)
from ofb_hf.data.processors import pixel_statistics

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIZE = {"height": 16, "width": 16}
PROCESSORS = {
    "half": ViTImageProcessorPil(size=SIZE),
    "imagenet": ViTImageProcessorPil(size=SIZE, **IMAGENET),
    "not normalized": ViTImageProcessorPil(size=SIZE, do_normalize=False),
    "not rescaled": ViTImageProcessorPil(
        size=SIZE, do_rescale=False, image_mean=[100, 110, 120], image_std=50
    ),
    "raw": ViTImageProcessorPil(size=SIZE, do_rescale=False, do_normalize=False),
    "other factor": ViTImageProcessorPil(size=SIZE, rescale_factor=1 / 127.5),
}


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own, on the CPU."""
    return torch.Generator().manual_seed(seed)


def uniform_images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gray levels, uint8."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kolmogorov and Smirnov's statistic: the largest gap between two empirical distribution
    functions."""
    places = np.concatenate([ours, theirs])
    below = [
        np.searchsorted(np.sort(draws), places, side="right") / len(draws)
        for draws in (ours, theirs)
    ]
    return float(np.abs(below[0] - below[1]).max())


# ------------------------------------------------------------------------------------ normalisation


@pytest.mark.parametrize("name", PROCESSORS)
def test_normalisation_is_the_image_processors(name):
    processor, images = PROCESSORS[name], uniform_images(3, 3, 16, 16)
    expected = torch.cat(
        [processor(image, return_tensors="pt")["pixel_values"] for image in images]
    ).float()
    statistics = pixel_statistics(processor)
    actual = normalize(images, *statistics)
    assert actual.dtype == torch.float32
    assert [len(values) for values in statistics] == [3, 3]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(normalize(images.double(), *statistics), actual)


def test_normalisation_leaves_its_input_alone():
    images = uniform_images(2, 3, 4, 4).float()
    before = images.clone()
    normalize(images, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert torch.equal(images, before)


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="image_std has 2 values; expected three"):
        pixel_statistics(ViTImageProcessorPil(image_std=[0.5, 0.5]))


# ----------------------------------------------------------------------------------- random erasing


def erase(count: int, height: int, width: int, probability: float = 1.0, seed: int = 0):
    """Black images after erasing, and their rectangles (count, 4): top, left, height, width; zeros
    if there is none."""
    images = random_erasing_(
        torch.zeros(count, 3, height, width), probability, generator=seeded(seed)
    )
    changed = (images != 0).numpy()
    assert (changed == changed[:, :1]).all()  # the same place in all channels
    boxes = []
    for mask in changed[:, 0]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        if len(rows):
            assert (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) == (
                len(rows),
                len(columns),
            )
        boxes.append((rows[0], columns[0], len(rows), len(columns)) if len(rows) else (0, 0, 0, 0))
    return images, np.array(boxes)


def drawn_rectangles(count: int, height: int, width: int) -> np.ndarray:
    """Height and width of rectangles by the published procedure, one after the other; (count,
    2)."""
    rng, sizes = np.random.default_rng(0), []
    while len(sizes) < count:
        area, ratio = (
            rng.uniform(0.02, 1 / 3) * height * width,
            np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3))),
        )
        size = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if size[0] < height and size[1] < width:
            sizes.append(size)
    return np.array(sizes)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (64, 32)])
def test_rectangles_have_the_published_sizes(height, width):
    _, boxes = erase(4000, height, width)
    assert boxes[:, 2:].min() > 0
    assert (boxes[:, 2] < height).all()
    assert (boxes[:, 3] < width).all()
    expected = drawn_rectangles(20_000, height, width)
    for ours, theirs in (
        (boxes[:, 2:].prod(1), expected.prod(1)),
        (boxes[:, 2] / boxes[:, 3], np.divide(*expected.T)),
    ):
        assert distance(ours, theirs) < 0.035
    area, ratio = boxes[:, 2:].prod(1) / (height * width), boxes[:, 2] / boxes[:, 3]
    assert 0.014 < area.min() < 0.03
    assert 0.3 < area.max() < 0.35
    assert 0.2 < ratio.min() < 0.35
    assert 1 / 0.35 < ratio.max() < 1 / 0.2


def test_sides_of_rectangles_are_rounded():
    _, boxes = erase(4000, 10, 14)
    for ours, theirs in zip(boxes[:, 2:].T, drawn_rectangles(20_000, 10, 14).T, strict=True):
        assert distance(ours, theirs) < 0.035


def test_rectangles_lie_anywhere_in_the_image():
    _, boxes = erase(4000, 48, 40)
    for axis, length in ((0, 48), (1, 40)):
        start, end = boxes[:, axis], boxes[:, axis] + boxes[:, axis + 2]
        assert (start.min(), end.max()) == (0, length)
        place = (start + 0.5) / (length - boxes[:, axis + 2] + 1)  # uniform, whatever the size
        assert distance(place, np.linspace(0, 1, 4001)) < 0.07
        assert place.mean() == pytest.approx(0.5, abs=0.02)
    assert (
        abs(np.corrcoef(boxes[:, 0] / (49 - boxes[:, 2]), boxes[:, 1] / (41 - boxes[:, 3]))[0, 1])
        < 0.06
    )


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erased_images_are_as_frequent_as_asked_for(probability):
    _, boxes = erase(4000, 12, 12, probability)
    assert (boxes[:, 2] > 0).mean() == pytest.approx(probability, abs=0.025 * (0 < probability < 1))


def test_a_quarter_is_erased_if_nothing_is_asked_for():
    images = random_erasing_(torch.zeros(4000, 1, 8, 8), generator=seeded())
    assert images.any(-1).any(-1).float().mean().item() == pytest.approx(0.25, abs=0.025)


def test_erased_pixels_become_noise_and_the_others_stay():
    images = torch.full((400, 3, 24, 24), 100.0)
    random_erasing_(images, 1.0, generator=seeded())
    noise = images[images != 100]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.unique().numel() > 0.9 * noise.numel()
    assert (images == 100).float().mean() > 0.6


def test_erasing_is_in_place_and_leaves_tiny_images_alone():
    images = torch.zeros(50, 3, 16, 16)
    assert random_erasing_(images, 1.0, generator=seeded()) is images
    assert images.any()
    tiny = torch.zeros(50, 3, 1, 1)
    # no rectangle is smaller than this
    assert not random_erasing_(tiny, 1.0, generator=seeded()).any()


# --------------------------------------------------------------------------------- mixup and cutmix


def mix(
    seed: int = 0, size: tuple[int, int] = (2, 2), **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of a black and a white image: what the white one keeps (H, W), and the labels' share
    of its class."""
    images = torch.stack([torch.zeros(1, *size), torch.ones(1, *size)])
    mixed, targets = mixup_cutmix(
        images, torch.tensor([0, 1]), 2, generator=seeded(seed), **options
    )
    assert torch.allclose(mixed[0] + mixed[1], torch.ones(1, *size))
    assert torch.allclose(targets[0], targets[1].flip(0))
    return mixed[1, 0], targets[1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_lambda_of_mixup_is_beta_distributed(alpha):
    kept, shares = zip(*(mix(seed, mixup=alpha, cutmix=0.0) for seed in range(3000)), strict=True)
    kept, shares = torch.stack(kept), torch.stack(shares)
    assert (kept == kept[:, :1, :1]).all()
    torch.testing.assert_close(kept[:, 0, 0], shares)
    assert distance(shares.numpy(), np.random.default_rng(0).beta(alpha, alpha, 100_000)) < 0.035
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def cut_shares(count: int, height: int, width: int, alpha: float) -> np.ndarray:
    """What stays of an image by the published procedure, boxes being cut off at the image's border;
    (count,)."""
    rng = np.random.default_rng(0)
    side = np.sqrt(1 - rng.beta(alpha, alpha, count))
    covered = []
    for length in (height, width):
        size, center = (length * side).astype(int), rng.integers(0, length, count)
        start = center - size // 2
        covered.append(np.clip(start + size, 0, length) - np.clip(start, 0, length))
    return 1 - covered[0] * covered[1] / (height * width)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "alpha"), [(16, 24, 1.0), (15, 9, 0.5)])
def test_cutmix_takes_a_box_and_labels_follow_its_area(height, width, alpha):
    draws = [mix(seed, (height, width), mixup=0.0, cutmix=alpha) for seed in range(3000)]
    for kept, share in draws:
        box = kept == 0
        assert ((kept == 1) | box).all()
        assert torch.equal(box, box.any(1)[:, None] & box.any(0))  # a rectangle ...
        for side in (box.any(1), box.any(0)):
            assert side.int().diff().abs().sum() <= 2  # ... without gaps
        assert share.item() == pytest.approx(1 - box.float().mean().item(), abs=1e-6)
    shares = np.array([share.item() for _, share in draws])
    assert distance(shares.round(5), cut_shares(100_000, height, width, alpha).round(5)) < 0.035
    boxes = torch.stack([kept == 0 for kept, _ in draws]).float().mean(0)
    # anywhere, as often above as below
    torch.testing.assert_close(boxes, boxes.flip(0), atol=0.05, rtol=0)
    torch.testing.assert_close(boxes, boxes.flip(1), atol=0.05, rtol=0)


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.8, 1.0])
def test_cutmix_takes_its_turn_with_mixup(probability):
    draws = [mix(seed, (8, 8), switch_prob=probability)[0] for seed in range(1500)]
    cut = np.mean([set(kept.unique().tolist()) <= {0.0, 1.0} for kept in draws])
    assert cut == pytest.approx(probability, abs=0.05 * (0 < probability < 1) + 0.005)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_pairs_are_mirrored_places_of_the_batch(batch, alphas):
    images = torch.randn(batch, 3, 8, 8, generator=seeded())
    labels, before = torch.arange(batch), images.clone()
    options = {"mixup": alphas[0], "cutmix": alphas[1], "label_smoothing": 0.1}
    mixed, targets = mixup_cutmix(images, labels, 7, generator=seeded(4), **options)
    assert torch.equal(images, before)
    assert (mixed.shape, mixed.dtype) == (images.shape, torch.float32)
    assert (targets.shape, targets.dtype) == ((batch, 7), torch.float32)
    torch.testing.assert_close(targets.sum(1), torch.ones(batch))
    share = (targets[0, 0].item() - 0.1 / 7) / 0.9 if batch > 1 else 1.0
    assert batch == 1 or 0.01 < share < 0.99
    expected = (
        0.9 * (share * one_hot(labels, 7) + (1 - share) * one_hot(labels.flip(0), 7)) + 0.1 / 7
    )
    torch.testing.assert_close(targets, expected)
    if alphas[0]:
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    else:
        own, other = mixed == images, mixed == images.flip(0)
        assert (own | other).all()
        assert other.float().mean() > 0.01
    assert torch.equal(mixed[batch // 2], images[batch // 2]) == (batch % 2 == 1)


def test_soft_labels_carry_the_smoothing_of_the_loss():
    images, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    logits = torch.randn(6, 3)
    _, smooth = mixup_cutmix(images, labels, 3, label_smoothing=0.1, generator=seeded())
    _, sharp = mixup_cutmix(images, labels, 3, generator=seeded())
    torch.testing.assert_close(
        cross_entropy(logits, smooth), cross_entropy(logits, sharp, label_smoothing=0.1)
    )
    same, plain = mixup_cutmix(
        images, labels, 3, mixup=0.0, cutmix=0.0, label_smoothing=0.1, generator=seeded()
    )
    assert torch.equal(same, images)
    expected = cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, plain), expected)


# --------------------------------------------------------------------------------------- the bundle


def bundle(**options) -> BatchAugmentation:
    """With everything on, but for what is named."""
    options = {"random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1} | options
    return BatchAugmentation(*pixel_statistics(PROCESSORS["imagenet"]), num_classes=5, **options)


OFF = dict.fromkeys(("random_erasing", "mixup", "cutmix", "label_smoothing"), 0.0)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(
    "on", [None, "random_erasing", "mixup", "cutmix", "label_smoothing", "all"]
)
def test_a_bundle_does_what_is_on(batch, on):
    augment = bundle(**({} if on == "all" else {name: 0.0 for name in OFF if name != on}))
    images, labels, generator = uniform_images(batch, 3, 12, 10), torch.arange(batch) % 5, seeded(2)
    before = images.clone()
    actual, targets = augment(images, labels, generator)
    assert torch.equal(images, before)
    assert (actual.shape, actual.dtype) == (images.shape, torch.float32)
    assert actual.isfinite().all()
    if on in (None, "random_erasing"):
        assert targets is labels
    else:
        assert targets.shape == (batch, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(batch))
    plain = normalize(images, augment.mean, augment.std)
    if on in (None, "label_smoothing"):
        assert torch.equal(actual, plain)
        # nothing is drawn for nothing
        assert torch.equal(generator.get_state(), seeded(2).get_state())
    elif batch > 1:
        assert not torch.equal(actual, plain)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_bundle_switches_as_often_as_asked_for(probability):
    augment = bundle(mixup_switch_prob=probability, random_erasing=0.0)
    images = torch.stack([torch.full((3, 6, 6), level, dtype=torch.uint8) for level in (0, 255)])
    for seed in range(20):
        mixed, _ = augment(images, torch.tensor([0, 1]), seeded(seed))
        constant = bool((mixed == mixed[..., :1, :1]).all())
        assert constant or probability == 1
        assert (
            torch.equal(mixed.unique(), normalize(images, augment.mean, augment.std).unique())
            or probability == 0
        )


def test_images_are_erased_before_they_are_mixed():
    """Noise of the other image comes along, at the same place."""
    augment = bundle(random_erasing=1.0, cutmix=0.0, label_smoothing=0.0)
    images, labels = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8), torch.tensor([0, 1])
    mixed, targets = augment(images, labels, seeded(1))
    generator = seeded(1)
    erased = random_erasing_(normalize(images, augment.mean, augment.std), 1.0, generator=generator)
    expected, shares = mixup_cutmix(erased, labels, 5, cutmix=0.0, generator=generator)
    assert torch.equal(mixed, expected)
    assert torch.equal(targets, shares)


def test_chance_is_the_generators_alone():
    images, labels = uniform_images(6, 3, 16, 16), torch.arange(6) % 5
    augment, state = bundle(), torch.get_rng_state()
    generator = seeded(1)
    first, second = (augment(images, labels, generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = augment(images, labels, seeded(1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], second[0])


def test_nothing_is_recorded_for_a_backward_pass():
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    mixed, targets = bundle()(images, torch.arange(4), seeded())
    assert not mixed.requires_grad
    assert not targets.requires_grad
    assert not mixup_cutmix(images, torch.arange(4), 4, generator=seeded())[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mixing_and_erasing_keep_a_floating_type(dtype):
    images = torch.zeros(4, 3, 8, 8, dtype=dtype)
    assert random_erasing_(images, 1.0, generator=seeded()).dtype == dtype
    mixed, targets = mixup_cutmix(images, torch.arange(4), 4, generator=seeded())
    assert (mixed.dtype, targets.dtype) == (dtype, torch.float32)


# ---------------------------------------------------------------------------------------- arguments


def test_arguments_default_to_the_recipe_and_fill_the_bundle():
    args = AugmentationArguments()
    assert (args.auto_augment, args.color_jitter, args.repeated_augmentation) == (
        "rand-m9-mstd0.5-inc1",
        0.3,
        1,
    )
    expected = BatchAugmentation((127.5,) * 3, (127.5,) * 3, 10, 0.25, 0.8, 1.0, 0.5, 0.0)
    assert BatchAugmentation.from_arguments(PROCESSORS["half"], 10, args) == expected
    args = AugmentationArguments(random_erasing=0.1, mixup=0.2, cutmix=0.3, mixup_switch_prob=0.4)
    expected = BatchAugmentation((127.5,) * 3, (127.5,) * 3, 7, 0.1, 0.2, 0.3, 0.4, 0.6)
    assert (
        BatchAugmentation.from_arguments(PROCESSORS["half"], 7, args, label_smoothing=0.6)
        == expected
    )


def test_arguments_come_from_a_command_line():
    flags = ["--auto_augment", "none", "--mixup", "0", "--color_jitter", "0.4"]
    (args,) = HfArgumentParser(AugmentationArguments).parse_args_into_dataclasses(flags)
    assert args == AugmentationArguments(auto_augment=None, mixup=0.0, color_jitter=0.4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"auto_augment": "rand-x3"},
            r"auto_augment is 'rand-x3'.*part 'x3'; allowed are m, n.*'none'",
        ),
        ({"auto_augment": "v0"}, r"auto_augment is 'v0'.*only `rand`"),
        ({"random_erasing": 1.5}, r"random_erasing is 1.5; it is a probability, from 0 to 1"),
        ({"random_erasing": math.nan}, "random_erasing is nan"),
        ({"mixup_switch_prob": -0.1}, r"mixup_switch_prob is -0.1; it is a probability"),
        ({"mixup": -1.0}, r"mixup is -1.0; it must be 0 \(off\) or larger"),
        ({"cutmix": math.inf}, "cutmix is inf"),
        ({"color_jitter": -0.4}, "color_jitter is -0.4"),
        ({"repeated_augmentation": 0}, "repeated_augmentation is 0; it must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AugmentationArguments(**options)
