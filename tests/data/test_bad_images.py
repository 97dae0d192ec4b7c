"""Images of a loaded split that cannot be decoded: replaced, counted and named, as in a stream."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_vit
from pictures import archive, number_of, parquet, picture, write
from PIL import Image as PILImage
from runs import arguments
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil, default_data_collator
from transformers.image_utils import load_image

from ofb_hf import ClassifierTrainer
from ofb_hf.data import (
    DataArguments,
    ImageArguments,
    SeededImages,
    TooManyBadImagesError,
    build_transform,
    decoding,
    find_images,
    load_image_data,
    require_decodable,
    with_image_transform,
)

COUNT = 24
BAD = (2, 3, 23)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def said(monkeypatch):
    """What is logged about images."""
    lines = []
    for module in ("decoding", "transforms"):
        monkeypatch.setattr(f"ofb_hf.data.{module}.logger.warning", lines.append)
    return lines


def gigantic() -> bytes:
    """Return the header of a PNG file with 30,000 x 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked


BROKEN = {
    "truncated": picture(0)[:60],
    "empty": b"",
    "gigantic": gigantic(),
    "text": b"no image",
    "missing": None,
}


def split(folder: Path, kind: str, content: bytes | None):
    """Return a loaded training split of which three images are broken."""
    contents = [content if n in BAD else picture(n) for n in range(COUNT)]
    if kind == "parquet":
        write(folder, {"train.parquet": parquet([content or b"" for content in contents])})
    else:
        # Names in the order of the numbers.
        files = {f"train/{'ab'[n >= 12]}/{n:02}.png": picture(n) for n in range(COUNT)}
        write(folder, files)
        for path, data in zip(files, contents, strict=True):
            if data is None:
                (folder / path).unlink()
                (folder / path).symlink_to(folder / "nowhere.png")
            else:
                (folder / path).write_bytes(data)
    test = {"test/a/1.png": picture(1), "test/b/2.png": picture(2)}
    if kind == "parquet":
        test = {"test.parquet": parquet([picture(n) for n in range(6)])}
    write(folder, test)
    return load_image_data(DataArguments(data_dir=str(folder)))


@pytest.mark.parametrize("kind", ["folders", "parquet"])
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_images_are_replaced_by_the_next_good_one_and_named(tmp_path, said, kind, broken):
    data = split(tmp_path / "images", kind, BROKEN[broken])
    columns = (data.image_column, data.label_column)
    images = SeededImages(data.train, number_of, *columns, seed=0, max_bad_share=0.2)
    numbers = [int(row["pixel_values"]) for row in images]
    expected = list(range(COUNT))
    expected[2], expected[3], expected[23] = 4, 4, 0
    assert numbers == expected
    labels = data.train["label"]
    assert [row["labels"] for row in images] == [labels[n] for n in expected]
    assert len(said) == len(BAD)
    names = ["02.png", "03.png", "23.png"] if kind == "folders" else ["row 2", "row 3", "row 23"]
    for name in names:
        assert sum(f"{name} cannot be decoded (" in line for line in said) == 1
    assert images.end_epoch() == (
        "3 of 24 training images could not be decoded; others took their places."
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_each_counts_once_over_workers_and_epochs(tmp_path, workers):
    data = split(tmp_path / "images", "folders", b"")
    images = SeededImages(data.train, number_of, "image", "label", seed=0, max_bad_share=0.125)
    for epoch in range(2):
        images.set_epoch(epoch)
        loader = DataLoader(images, 4, num_workers=workers, collate_fn=default_data_collator)
        assert sum(len(batch["labels"]) for batch in loader) == COUNT
        assert images.end_epoch().startswith("3 of 24 ")
    # Another rank met another one.
    other = torch.zeros(COUNT, dtype=torch.int64)
    other[7] = 1
    with pytest.raises(TooManyBadImagesError, match="4 of 24 training images cannot be decoded"):
        images.end_epoch(lambda bad: bad + other)


def test_too_many_stop_the_run_with_their_names(tmp_path):
    data = split(tmp_path / "images", "folders", b"")
    images = SeededImages(data.train, number_of, "image", "label", seed=0)
    message = r"1 of 24 training images cannot be decoded: 4.2%, and max_bad_share is 1.*/02.png"
    with pytest.raises(TooManyBadImagesError, match=message):
        list(images)
    none = SeededImages(data.train.select(BAD), number_of, "image", "label", 0, max_bad_share=1.0)
    with pytest.raises(TooManyBadImagesError, match="none of 3 images can be decoded"):
        none[0]


def test_a_training_goes_on(tmp_path, said):
    data = split(tmp_path / "images", "folders", picture(0)[:60])
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    transform = build_transform(processor, "standard", train=True)
    rows = SeededImages(data.train, transform, "image", "label", seed=0, max_bad_share=0.2)
    args = arguments(tmp_path, num_train_epochs=2, max_steps=-1)
    trainer = ClassifierTrainer(tiny_vit(num_labels=2), args, train_dataset=rows)
    assert trainer.train().global_step > 0
    assert said[-1].startswith("3 of 24 training images could not be decoded")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_bad_image(tmp_path, said):
    data = split(tmp_path / "images", "folders", picture(2))
    (tmp_path / "images/train/a/05.png").chmod(0)
    SeededImages(data.train, number_of, "image", "label", seed=0, max_bad_share=0.2)[5]
    assert "05.png cannot be decoded" in said[0]


def test_rows_for_another_trainer_name_what_cannot_be_decoded(tmp_path):
    data = split(tmp_path / "images", "folders", b"no image")
    rows = with_image_transform(data.train, number_of, "image", "label")
    assert int(rows[4]["pixel_values"]) == 4
    with pytest.raises(ValueError, match=r"train/a/02.png cannot be decoded \(no image of a known"):
        rows[2]
    with pytest.raises(ValueError, match=r"3 of 24 images to evaluate on .*02.png \(no image of"):
        require_decodable(data.train, "image")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-1.parquet", parquet([picture(n) for n in range(6)])[:300]),
        ("train-1.parquet", b""),
        ("train-1.tar", archive(range(8))[:3000]),
        ("train-1.tar", b""),
        ("train-1.tar", b"no archive" * 100),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path, streaming, name, content):
    good = parquet([picture(n) for n in range(6)]) if "parquet" in name else archive(range(6))
    suffix = name.partition(".")[2]
    files = {f"train-0.{suffix}": good, f"test-0.{suffix}": good, name: content}
    folder = write(tmp_path / "pets", files)
    message = rf"pets cannot be read: {name} \(.*\). Repair the files or take them out"
    with pytest.raises(ValueError, match=message):
        load_image_data(DataArguments(data_dir=str(folder), streaming=streaming))
    with pytest.raises(ValueError, match=message):
        find_images(ImageArguments(data_dir=str(folder)))


# --------------------------------------------------------------------------- 16 bits per pixel


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_the_difference_to_a_pipeline_is_said_once(tmp_path, monkeypatch, suffix):
    """A pipeline clips 16 bits to white: what is measured here holds for images of 8 bits."""
    lines = []
    monkeypatch.setattr(decoding.logger, "warning_once", lines.append)
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 200
    path = tmp_path / f"deep.{suffix}"
    PILImage.fromarray(levels).save(path)
    ours = np.asarray(decoding.decode_image(path.read_bytes()))
    assert np.array_equal(ours[..., 0], (levels >> 8).astype(np.uint8))
    theirs = np.asarray(load_image(str(path)))
    assert (theirs[..., 0].ravel()[1:] == 255).all()
    assert len(lines) == 1
    assert "16 bits per pixel" in lines[0]
    assert "store images with 8 bits" in lines[0]
    # What the message asks for is what was measured.
    eight = io.BytesIO()
    PILImage.fromarray(ours).save(eight, "PNG")
    assert np.array_equal(np.asarray(load_image(PILImage.open(eight))), ours)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB"])
def test_every_other_mode_is_what_a_pipeline_sees(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = PILImage.fromarray(pixels)
    image = PILImage.new("LAB", (16, 16), (90, 20, 30)) if mode == "LAB" else image.convert(mode)
    path = tmp_path / "image.tiff"
    image.save(path)
    assert PILImage.open(path).mode == mode
    ours = decoding.decode_image(path.read_bytes())
    assert np.array_equal(np.asarray(ours), np.asarray(load_image(str(path))))
