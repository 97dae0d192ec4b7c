"""Evaluation shows the processor's pixels; augmentation is random, seeded, and keeps the shape."""

import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import (
    DeiTImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
    pipeline,
)

from ofb_hf.data import SeededImages, build_transform, with_image_transform
from ofb_hf.data.augmentation_args import AugmentationArguments
from ofb_hf.data.randaugment import ColorJitter, RandAugment
from ofb_hf.data.transforms import CROP_RATIO, CROP_SCALE, DEIT_CROP_SCALE, _jitter, _random_box

MODES = ["RGB", "L", "RGBA", "CMYK", "P", "LA", "1"]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "square": ViTImageProcessorPil(size={"height": 32, "width": 32}),
    "oblong": ViTImageProcessorPil(
        size={"height": 24, "width": 40}, resample=PILImage.Resampling.NEAREST, **IMAGENET
    ),
    "crop": DeiTImageProcessorPil(
        size={"height": 36, "width": 36}, crop_size={"height": 31, "width": 28}, **IMAGENET
    ),
    "shortest edge": DeiTImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 17, "width": 17}
    ),
    "padding crop": DeiTImageProcessorPil(
        size={"height": 20, "width": 33}, crop_size={"height": 27, "width": 26}
    ),
    "only crop": DeiTImageProcessorPil(do_resize=False, crop_size={"height": 29, "width": 29}),
    "not normalized": ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
    "not rescaled": ViTImageProcessorPil(
        size={"height": 16, "width": 16}, do_rescale=False, image_mean=[100, 110, 120]
    ),
    "raw": ViTImageProcessorPil(
        size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False
    ),
    "other factor": ViTImageProcessorPil(
        size={"height": 16, "width": 16}, rescale_factor=1 / 127.5
    ),
}


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def square(side: int) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side})


@pytest.mark.parametrize("name", PROCESSORS)
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from(MODES), st.integers(0, 9))
def test_evaluation_equals_the_image_processor(name, width, height, mode, seed):
    processor = PROCESSORS[name]
    image = noise(width, height, mode, seed)
    expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    actual = build_transform(processor, "standard", train=False)(image)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_pipelines_see_the_pixels_of_evaluation(mode):
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
    )
    processor = PROCESSORS["square"]
    classifier = pipeline(
        "image-classification", model=ViTForImageClassification(config), image_processor=processor
    )
    seen = classifier.preprocess(noise(50, 41, mode))["pixel_values"][0]
    actual = build_transform(processor, "none", train=False)(noise(50, 41, mode))
    torch.testing.assert_close(actual, seen, rtol=0, atol=1e-6)


@pytest.mark.parametrize("augmentation", ["none", "light", "standard", "auto"])
@pytest.mark.parametrize("side", [8, 64, 65])
@given(width=st.integers(1, 200), height=st.integers(1, 200), mode=st.sampled_from(MODES))
def test_augmented_images_have_the_models_shape(augmentation, side, width, height, mode):
    pixels = build_transform(square(side), augmentation, train=True)(noise(width, height, mode))
    assert pixels.shape == (3, side, side)
    assert pixels.dtype == torch.float32
    assert pixels.abs().max() <= 1


@pytest.mark.parametrize("augmentation", ["light", "standard", "deit"])
@pytest.mark.parametrize("side", [32, 96])
def test_augmentation_is_random_and_follows_torchs_seed(augmentation, side):
    transform, image = build_transform(square(side), augmentation, train=True), noise(100, 90)
    torch.manual_seed(1)
    first, second = transform(image), transform(image)
    torch.manual_seed(1)
    assert torch.equal(transform(image), first)
    assert not torch.equal(first, second)


def test_none_is_evaluation():
    image = noise(50, 40)
    transforms = [build_transform(square(32), "none", train=train) for train in (True, False)]
    assert torch.equal(transforms[0](image), transforms[1](image))


def asymmetry(transform, image: PILImage.Image, count: int) -> list[float]:
    """Left half minus right half, for `count` draws."""
    draws = torch.stack([transform(image) for _ in range(count)])
    half = draws.shape[-1] // 2
    return (draws[..., :half].mean((1, 2, 3)) - draws[..., half:].mean((1, 2, 3))).tolist()


@pytest.mark.parametrize("side", [32, 96])
def test_standard_flips_half_of_the_images_and_light_none(side):
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    pixels[:, : side // 2] = 200
    image = PILImage.fromarray(pixels)
    torch.manual_seed(0)
    flipped = sum(
        value < 0
        for value in asymmetry(build_transform(square(side), "standard", True), image, 200)
    )
    assert 70 <= flipped <= 130
    assert min(asymmetry(build_transform(square(side), "light", True), image, 200)) > 0


def test_light_moves_content_by_at_most_its_share():
    """A dot in the middle stays within 10 % of the side; it does move in every direction."""
    pixels = np.zeros((41, 41, 3), dtype=np.uint8)
    pixels[19:22, 19:22] = 255
    transform, image = build_transform(square(41), "light", train=True), PILImage.fromarray(pixels)
    torch.manual_seed(0)
    places = torch.arange(41).float() - 20
    moved = []
    for _ in range(200):
        weight = transform(image)[0] + 1
        moved.append([(weight.sum(axis) @ places / weight.sum()).item() for axis in (0, 1)])
    moved = np.array(moved)
    assert np.abs(moved).max() <= 4.1 + 0.5
    assert (moved.max(0) > 3).all()
    assert (moved.min(0) < -3).all()


@pytest.mark.parametrize("level", [0, 255])
def test_light_fills_corners_with_the_background(level):
    image = PILImage.new("RGB", (32, 32), (level,) * 3)
    image.paste((128, 128, 128), (12, 12, 20, 20))
    transform = build_transform(square(32), "light", train=True)
    for _ in range(20):
        assert torch.all(transform(image)[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 2 * level / 255 - 1)


def test_small_images_shift_by_an_eighth_and_let_black_in():
    transform, image = (
        build_transform(square(32), "standard", train=True),
        PILImage.new("RGB", (32, 32), (250,) * 3),
    )
    torch.manual_seed(0)
    empty = torch.stack([(transform(image)[0] == -1).sum() for _ in range(300)])
    assert empty.min() == 0
    assert empty.max() == 32 * 32 - 28 * 28


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 1000))
def test_random_crops_lie_in_the_image(width, height, seed):
    torch.manual_seed(seed)
    left, top, w, h = _random_box(width, height)
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert w > 0
    assert h > 0


@pytest.mark.parametrize("scale", [CROP_SCALE, DEIT_CROP_SCALE])
def test_random_crops_span_the_allowed_areas_and_ratios(scale):
    torch.manual_seed(0)
    boxes = np.array([_random_box(1000, 1000, scale) for _ in range(2000)])
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 2] / boxes[:, 3]
    assert scale[0] - 0.01 < area.min() < scale[0] + 0.05
    assert 0.9 < area.max() <= scale[1]
    assert CROP_RATIO[0] - 0.01 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < CROP_RATIO[1] + 0.01


def test_jitter_leaves_neutral_factors_alone_and_scales_the_rest():
    image = noise(20, 20)
    assert np.array_equal(np.asarray(_jitter(image, 1.0, 1.0)), np.asarray(image))
    flat = PILImage.new("RGB", (4, 4), (100, 100, 100))
    assert _jitter(flat, 1.3, 0.7).getpixel((0, 0)) == (130, 130, 130)
    halves = PILImage.new("RGB", (4, 4), (60, 60, 60))
    halves.paste((140, 140, 140), (0, 0, 2, 4))
    assert _jitter(halves, 1.0, 0.5).getcolors() == [(8, (120,) * 3), (8, (80,) * 3)]


# ------------------------------------------------------------------------------------ DeiT's recipe

PLAIN = AugmentationArguments(auto_augment=None, color_jitter=0.0)


def ramps(width: int, height: int) -> PILImage.Image:
    """Red grows from left to right, green from top to bottom."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / (width - 1), 255 * y / (height - 1), np.full_like(x, 90)], axis=-1)
    return PILImage.fromarray(pixels.round().astype(np.uint8))


def bicubic(side: int, **options) -> ViTImageProcessorPil:
    """An image processor as DeiT's, for squares."""
    options = {"resample": PILImage.Resampling.BICUBIC, **IMAGENET} | options
    return ViTImageProcessorPil(size={"height": side, "width": side}, **options)


@pytest.mark.parametrize("name", PROCESSORS)
@given(width=st.integers(1, 200), height=st.integers(1, 200), mode=st.sampled_from(MODES))
def test_deit_gives_gray_levels_of_the_models_shape(name, width, height, mode):
    expected = build_transform(PROCESSORS[name], "none", train=False)
    image = noise(width, height, mode)
    if name == "only crop":
        image = noise(expected.width, expected.height, mode)
    pixels = build_transform(PROCESSORS[name], "deit", train=True)(image)
    assert pixels.shape == (3, expected.height, expected.width)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()


@pytest.mark.parametrize("resample", [PILImage.Resampling.BICUBIC, PILImage.Resampling.BILINEAR])
def test_deit_cuts_then_resizes_then_mirrors_half_of_the_images(resample, monkeypatch):
    image, box = noise(60, 50), (7, 9, 41, 30)
    processor = bicubic(24, resample=resample)
    transform = build_transform(processor, "deit", train=True, augmentation_args=PLAIN)
    scales = []
    monkeypatch.setattr(
        "ofb_hf.data.transforms._random_box",
        lambda w, h, scale: scales.append((w, h, scale)) or box,
    )
    left, top, width, height = box
    upright = image.crop((left, top, left + width, top + height)).resize((24, 24), resample)
    upright = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    draws = [transform(image) for _ in range(400)]
    mirrored = sum(torch.equal(pixels, upright.flip(2)) for pixels in draws)
    assert mirrored + sum(torch.equal(pixels, upright) for pixels in draws) == 400
    assert 160 <= mirrored <= 240
    assert set(scales) == {(60, 50, (0.08, 1.0))}


def test_deit_crops_from_8_percent_up():
    transform = build_transform(bicubic(32), "deit", train=True, augmentation_args=PLAIN)
    crops = torch.stack([transform(ramps(256, 256)) for _ in range(400)]).float()
    shares = (crops[:, 0].amax((1, 2)) - crops[:, 0].amin((1, 2))) * (
        crops[:, 1].amax((1, 2)) - crops[:, 1].amin((1, 2))
    )
    shares = shares / 255**2
    assert 0.05 < shares.min() < 0.15
    assert 0.85 < shares.max() <= 1
    assert shares.mean().item() == pytest.approx(0.5, abs=0.06)


def test_deit_turns_a_policy_or_jitter_on():
    image = noise(40, 40)

    def changing(processor, **options):
        arguments = AugmentationArguments(**options)
        return build_transform(
            processor, "deit", train=True, augmentation_args=arguments
        ).change_colors

    cubic, gray = PILImage.Resampling.BICUBIC, (128, 128, 128)
    assert build_transform(bicubic(8), "deit", train=True).change_colors == RandAugment.from_policy(
        "rand-m9-mstd0.5-inc1", (124, 116, 104), cubic
    )
    policy = {"auto_augment": "rand-m7-n3"}
    assert changing(square(8), **policy) == RandAugment(
        7.0, 3, fill=gray, resample=PILImage.Resampling.BILINEAR
    )
    assert changing(bicubic(8, do_normalize=False), **policy) == RandAugment(
        7.0, 3, fill=gray, resample=cubic
    )
    assert changing(PROCESSORS["not rescaled"], **policy).fill == (100, 110, 120)
    lanczos = bicubic(8, resample=PILImage.Resampling.LANCZOS)  # not for rotations
    assert changing(lanczos, **policy).resample is None
    assert build_transform(lanczos, "deit", train=True)(image).shape == (3, 8, 8)
    assert changing(square(8), auto_augment=None, color_jitter=0.4) == ColorJitter(0.4)


@pytest.mark.parametrize("arguments", [None, AugmentationArguments(auto_augment="none")])
def test_deit_changes_colors_after_the_crop(arguments):
    """On an image of one color nothing but the colors can change."""
    transform = build_transform(bicubic(16), "deit", train=True, augmentation_args=arguments)
    image = PILImage.new("RGB", (40, 30), (200, 100, 50))
    means = torch.stack([transform(image).float().mean((1, 2)) for _ in range(60)])
    unchanged = (means == torch.tensor([200.0, 100.0, 50.0])).all(1).float().mean()
    assert unchanged < 0.7
    assert means.unique(dim=0).shape[0] > 15


# ----------------------------------------------------------------------------- evaluation like timm


@pytest.mark.parametrize(
    ("side", "crop_pct", "resized"),
    [(224, 0.875, 256), (224, 0.9, 248), (384, 1.0, 384), (30, 0.95, 31), (1, 0.4, 2)],
)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_crop_pct_resizes_the_shorter_side_and_cuts_the_middle_out(
    side, crop_pct, resized, width, height
):
    processor, image = bicubic(side), noise(width, height)
    long = int(resized * max(width, height) / min(width, height))
    if long > 4000:
        return  # a thread, blown up
    whole = image.resize(
        (resized, long) if width <= height else (long, resized), processor.resample
    )
    left, top = (round((length - side) / 2) for length in whole.size)
    pixels = np.asarray(whole.crop((left, top, left + side, top + side)))
    expected = (
        torch.from_numpy(pixels / 255) - torch.tensor(IMAGENET["image_mean"])
    ) / torch.tensor(IMAGENET["image_std"])
    actual = build_transform(processor, "none", train=False, eval_crop_pct=crop_pct)(image)
    assert actual.shape == (3, side, side)
    torch.testing.assert_close(actual, expected.permute(2, 0, 1).float(), rtol=0, atol=1e-5)


def test_crop_pct_covers_models_that_are_no_squares():
    processor = ViTImageProcessorPil(
        size={"height": 30, "width": 60}, image_mean=[0.0] * 3, image_std=[1 / 255] * 3
    )
    for image, resized in (
        (ramps(100, 100), (66, 66)),
        (ramps(400, 100), (132, 33)),
        (ramps(71, 100), (66, 93)),
    ):
        whole = image.resize(resized, processor.resample)
        left, top = round((resized[0] - 60) / 2), round((resized[1] - 30) / 2)
        expected = (
            torch.from_numpy(np.array(whole.crop((left, top, left + 60, top + 30))))
            .permute(2, 0, 1)
            .float()
        )
        actual = build_transform(processor, "none", train=False, eval_crop_pct=0.9)(image)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", PROCESSORS)
def test_crop_pct_takes_the_place_of_what_the_processor_does(name):
    """The same for processors that squash, pad or do not resize; and the same for training without
    augmentation."""
    image = noise(50, 41)
    transform = build_transform(PROCESSORS[name], "deit", train=False, eval_crop_pct=0.8)
    shown = transform(image)
    plain = build_transform(PROCESSORS[name], "none", train=False)
    assert shown.shape == (3, plain.height, plain.width)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), shown)
    assert torch.equal(
        build_transform(PROCESSORS[name], "none", train=True, eval_crop_pct=0.8)(image), shown
    )
    for augmentation in ("light", "standard", "deit"):  # trained on the usual pixels
        torch.manual_seed(0)
        expected = build_transform(PROCESSORS["square"], augmentation, train=True)(image)
        torch.manual_seed(0)
        actual = build_transform(PROCESSORS["square"], augmentation, train=True, eval_crop_pct=0.8)(
            image
        )
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("crop_pct", [0, -0.5, 1.01, float("nan")])
def test_crop_pct_out_of_range_is_refused(crop_pct):
    with pytest.raises(
        ValueError, match=r"eval_crop_pct is .*; it must lie above 0 and be at most 1"
    ):
        build_transform(square(8), "none", train=False, eval_crop_pct=crop_pct)


@pytest.mark.parametrize(("side", "crop_pct"), [(224, 0.875), (224, 0.9), (96, 0.95), (48, 1.0)])
def test_crop_pct_equals_timm(side, crop_pct):
    try:
        from timm.data import create_transform
    # a torchvision of another build raises a RuntimeError
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    theirs = create_transform(side, interpolation="bicubic", crop_pct=crop_pct)
    ours = build_transform(bicubic(side), "none", train=False, eval_crop_pct=crop_pct)
    for size in ((300, 200), (201, 333), (97, 96), (side, side), (50, 75)):
        torch.testing.assert_close(ours(noise(*size)), theirs(noise(*size)), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------- rows


def dataset(count: int = 7) -> Dataset:
    features = Features(
        {"img": Image(), "note": Value("string"), "kind": ClassLabel(names=["a", "b"])}
    )
    rows = {
        "img": [noise(12, 9, seed=i) for i in range(count)],
        "note": ["x"] * count,
        "kind": [0, 1] * count,
    }
    return Dataset.from_dict(rows | {"kind": rows["kind"][:count]}, features=features)


def test_rows_become_tensors_and_integers():
    transform = build_transform(square(8), "none", train=True)
    rows = with_image_transform(dataset(), transform, "img", "kind")
    assert len(rows) == 7
    assert set(rows[3]) == {"pixel_values", "labels"}
    assert rows[3]["pixel_values"].shape == (3, 8, 8)
    assert type(rows[3]["labels"]) is int
    torch.testing.assert_close(rows[3]["pixel_values"], transform(noise(12, 9, seed=3)))
    batch = next(iter(DataLoader(rows, batch_size=4, collate_fn=default_data_collator)))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("augmentation", ["none", "light", "standard", "deit"])
def test_transforms_travel_to_loader_processes(augmentation):
    transform = build_transform(square(8), augmentation, train=True)
    image = noise(12, 9)
    copied = pickle.loads(pickle.dumps(with_image_transform(dataset(), transform, "img", "kind")))
    torch.manual_seed(0)
    expected = with_image_transform(dataset(), transform, "img", "kind")[0]["pixel_values"]
    torch.manual_seed(0)
    assert torch.equal(copied[0]["pixel_values"], expected)
    torch.manual_seed(0)
    first = pickle.loads(pickle.dumps(transform))(image)
    torch.manual_seed(0)
    assert torch.equal(transform(image), first)


def test_loader_processes_draw_different_numbers():
    transform = build_transform(square(8), "light", train=True)
    rows = with_image_transform(dataset(1).select([0] * 8), transform, "img", "kind")
    torch.manual_seed(0)
    loader = DataLoader(rows, batch_size=4, num_workers=2, collate_fn=default_data_collator)
    first, second = (batch["pixel_values"] for batch in loader)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(next(iter(loader))["pixel_values"], first)


def test_unknown_augmentation_is_refused():
    with pytest.raises(
        ValueError, match=r"'strong'; allowed are auto, none, light, standard, deit"
    ):
        build_transform(square(8), "strong", train=True)


def test_processors_without_a_fixed_size_are_refused():
    processor = ViTImageProcessorPil(size={"shortest_edge": 20})
    with pytest.raises(ValueError, match="images of different sizes"):
        build_transform(processor, "none", train=False)
    processor = DeiTImageProcessorPil(
        size={"longest_edge": 20}, crop_size={"height": 8, "width": 8}
    )
    with pytest.raises(ValueError, match="expected height and width, or shortest_edge"):
        build_transform(processor, "none", train=False)


class BGRImageProcessor(ViTImageProcessorPil):
    """A step that no attribute tells of."""

    def rescale(self, image, scale, **kwargs):
        return super().rescale(image[::-1], scale, **kwargs)


def test_processors_with_steps_of_their_own_are_refused():
    with pytest.raises(
        ValueError, match=r"BGRImageProcessor does more than resize.*gray levels on average"
    ):
        build_transform(BGRImageProcessor(), "none", train=False)
    with pytest.raises(
        ValueError, match=r"output has the shape \(3, 300, 300\) instead of \(3, 224, 224\)"
    ):
        build_transform(
            ViTImageProcessorPil(do_pad=True, pad_size={"height": 300, "width": 300}),
            "none",
            train=False,
        )


def test_processors_for_other_channels_are_refused():
    with pytest.raises(ValueError, match="image_std is None, and do_normalize is True"):
        build_transform(ViTImageProcessorPil.from_dict({"image_std": None}), "none", train=False)
    with pytest.raises(ValueError, match="image_mean has 2 values; expected three"):
        build_transform(ViTImageProcessorPil(image_mean=[0.5, 0.5]), "none", train=False)


def test_wrong_inputs_are_refused_in_words():
    transform = build_transform(
        ViTImageProcessorPil(size={"height": 8, "width": 8}, do_resize=False), "none", True
    )
    assert transform(noise(8, 8)).shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"9 x 8 pixels, but the model takes 8 x 8.*do_resize"):
        transform(noise(9, 8))
    with pytest.raises(TypeError, match="got NoneType, expected a PIL image"):
        transform(None)


@pytest.mark.parametrize("augmentation", ["standard", "deit"])
def test_seeded_images_depend_on_seed_epoch_and_row_alone(augmentation):
    rows = dataset()
    transform = build_transform(PROCESSORS["square"], augmentation, train=True)

    def images(seed, epoch, order):
        seeded = SeededImages(rows, transform, "img", "kind", seed)
        seeded.set_epoch(epoch)
        fetched = dict(zip(order, seeded.__getitems__(order), strict=True))
        assert all(
            torch.equal(fetched[index]["pixel_values"], seeded[index]["pixel_values"])
            for index in order
        )
        return [fetched[index]["pixel_values"] for index in range(len(rows))]

    forwards, backwards = list(range(len(rows))), list(range(len(rows)))[::-1]
    state = torch.get_rng_state()
    first = images(0, 0, forwards)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, images(0, 0, backwards)))
    for other in (images(1, 0, forwards), images(0, 1, forwards)):
        assert not all(map(torch.equal, first, other))
