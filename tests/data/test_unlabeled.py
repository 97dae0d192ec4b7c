"""Unlabeled images are found in any layout, drawn at random, and kept small."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from ofb_hf.data import (
    ImageArguments,
    ImageBatches,
    build_transform,
    class_numbers,
    draw,
    evaluated_rows,
    find_images,
    labelled_batches,
)
from ofb_hf.data.splits import limit

SIZE = {"height": 12, "width": 10}


@pytest.fixture(scope="module")
def transform():
    """An image processor's resizing and normalization."""
    return build_transform(ViTImageProcessorPil(size=SIZE), "none", train=False)


def save(folder, *names):
    """Write an image for each name, each of another color."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 15), (number * 9, 80, 40)).save(folder / name)
    return folder


def found(folder, **settings):
    """Return what is found in a folder."""
    return find_images(ImageArguments(images=str(folder), **settings))


def paths(images):
    """Return the paths of found image files."""
    return [str(path) for path in images.paths]


# --------------------------------------------------------------------------------- where they are


def test_any_layout_is_taken_and_hidden_files_are_not(tmp_path):
    save(tmp_path, "a.png", "b/c.JPG", "b/d/e/f.webp", ".hidden/g.png", "b/.h.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    images = found(tmp_path)
    assert paths(images.pool) == ["a.png", "b/c.JPG", "b/d/e/f.webp"]
    assert images.measured is None
    assert images.name == tmp_path.name
    assert images.pool[1].label == "b"


@pytest.mark.parametrize(
    ("settings", "drawn", "measured"),
    [
        ({}, ["train/x/1.png", "z.png"], "val"),
        ({"eval_split": "test"}, ["train/x/1.png", "z.png"], "test"),
        ({"split": "train"}, ["train/x/1.png"], "val"),
        ({"split": "val", "eval_split": "test"}, ["val/x/2.png"], "test"),
        ({"split": "train", "eval_split": "train"}, ["train/x/1.png"], None),
        ({"eval_split": "train"}, ["z.png"], "train"),
        ({"split": "test"}, ["test/x/3.png"], "val"),
    ],
)
def test_splits_of_a_folder(tmp_path, settings, drawn, measured):
    save(tmp_path, "train/x/1.png", "val/x/2.png", "test/x/3.png", "z.png")
    images = found(tmp_path, **settings)
    assert set(drawn) <= set(paths(images.pool))
    assert not any(
        path.startswith(("val", "test")) for path in set(paths(images.pool)) - set(drawn)
    )
    assert images.measured_split == measured
    if measured is not None:
        assert all(path.startswith(measured) for path in paths(images.measured))
        assert not set(paths(images.measured)) & set(paths(images.pool))


def test_a_folder_that_is_a_split_itself_is_drawn_from(tmp_path):
    assert found(save(tmp_path / "more", "val/1.png", "2.png")).measured_split == "val"
    images = found(save(tmp_path / "one", "val/cat/1.png", "val/dog/2.png"))
    assert paths(images.pool) == ["val/cat/1.png", "val/dog/2.png"]
    assert images.measured is None
    with pytest.raises(ValueError, match=r"--split is 'x', but the data has \['val'\]"):
        found(tmp_path / "one", split="x")


def test_a_name_that_is_no_folder_is_one_of_the_hub():
    assert ImageArguments(images="lab/photos").dataset_name == "lab/photos"
    assert ImageArguments(images="photos").data_dir == "photos"
    with pytest.raises(ValueError, match="num_images is 1; it must be at least 2"):
        ImageArguments(images="photos", num_images=1)


def test_columns_of_a_table(tmp_path):
    content = (save(tmp_path / "files", "a.png") / "a.png").read_bytes()
    rows = datasets.Dataset.from_dict({"img": [content] * 3, "score": [0.1, 0.2, 0.3]})
    rows.to_parquet(tmp_path / "plain.parquet")
    images = found(tmp_path / "plain.parquet")
    assert images.pool[2].image == content
    assert images.pool[2].label is None
    assert images.pool.labels() == set()
    with pytest.raises(ValueError, match="label_column is 'x'"):
        found(tmp_path / "plain.parquet", label_column="x")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        found(tmp_path / "broken.parquet")


# --------------------------------------------------------------------------------- labels


class Labels:
    """Images of which only the labels matter."""

    def __init__(self, stored, names=None):
        self.stored, self.names = stored, names

    def labels(self):
        return set(self.stored)

    def label_names(self):
        return self.names


@pytest.mark.parametrize(
    ("images", "classes", "numbers"),
    [
        (Labels(["cat", "dog"]), ["dog", "cat"], {"cat": 1, "dog": 0}),
        (Labels(["Golden_Retriever", "trip"]), ["golden retriever"], {"Golden_Retriever": 0}),
        (Labels(["trip", "home"]), ["dog", "cat"], {}),
        (Labels([], ["cat", "dog"]), ["dog", "cat", "x"], {0: 1, 1: 0}),
        (Labels([], ["Katze", "Hund"]), ["cat", "dog"], {0: 0, 1: 1}),
        (Labels([], ["Katze", "Hund"]), ["cat", "dog", "x"], {}),
        (Labels([0, 1, -1]), ["cat", "dog"], {0: 0, 1: 1}),
        (Labels([0, 5]), ["cat", "dog"], {}),
        (Labels(["1", "0"]), ["cat", "dog"], {"0": 0, "1": 1}),
        (Labels([], sorted(map(str, range(11)))), list("abcdefghijk"), {2: 10, 3: 2}),
        (Labels(["A", "a"]), ["a", "A"], {"a": 0, "A": 1}),
        (Labels([]), ["cat", "dog"], {}),
    ],
)
def test_labels_are_known_by_name_or_by_number(images, classes, numbers):
    found, remark = class_numbers(images, classes)
    assert numbers.items() <= found.items()
    assert len(found) == (len(numbers) if len(classes) < 11 else 11)
    by_number = numbers and not set(map(str, numbers)) & {"cat", "A", "Golden_Retriever"}
    by_name = images.names is not None and set(images.names) & set(classes)
    assert bool(remark) == bool(by_number and not by_name)


# --------------------------------------------------------------------------------- drawing


def test_the_seed_decides_what_is_drawn_and_others_replace_unreadable_images(tmp_path, transform):
    save(tmp_path, *(f"{number:02}.png" for number in range(30)))
    images = found(tmp_path).pool
    first = draw(images, 12, transform, 0)
    assert (len(first), first.skipped) == (12, [])
    again = draw(images, 12, transform, 0)
    other = draw(images, 12, transform, 1)
    assert np.array_equal(first.levels, again.levels)
    assert not np.array_equal(first.levels, other.levels)
    # of different colors: none came twice
    assert len({tuple(image[0, 0]) for image in first.levels}) == 12
    order = np.random.RandomState(0).permutation(30)
    (tmp_path / f"{order[3]:02}.png").write_bytes(b"")
    replaced = draw(images, 12, transform, 0)
    assert len(replaced) == 12
    assert len(replaced.skipped) == 1
    assert f"{order[3]:02}.png (ValueError: the file is empty" in replaced.skipped[0]
    assert np.array_equal(np.delete(first.levels, 3, 0), replaced.levels[:11])


def test_up_to_a_tenth_may_be_unreadable(tmp_path, transform):
    save(tmp_path, *(f"{number:02}.png" for number in range(20)))
    images = found(tmp_path).pool
    for number in (3, 8):
        (tmp_path / f"{number:02}.png").write_bytes(b"broken")
    assert len(draw(images, 512, transform, 0).skipped) == 2
    (tmp_path / "12.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="3 of 20 images cannot be decoded, and at most 10%"):
        draw(images, 512, transform, 0)


def test_batches_are_what_the_image_processor_makes(tmp_path, transform):
    save(tmp_path, *(f"{number}.png" for number in range(7)))
    drawn = draw(found(tmp_path).pool, 7, transform, 0)
    assert drawn.levels.shape == (7, 12, 10, 3)
    batches = ImageBatches(drawn.levels, transform, 3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    processor = ViTImageProcessorPil(size=SIZE)
    order = np.random.RandomState(0).permutation(7)
    files = [Image.open(tmp_path / f"{number}.png") for number in order]
    expected = processor(files, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.cat(list(batches)), expected, rtol=0, atol=0)
    assert torch.equal(torch.cat(list(batches[1:])), expected[3:])
    assert len(batches[:2][1:]) == 1
    with pytest.raises(IndexError):
        batches[3]


def test_images_to_measure_on_are_decoded_one_batch_at_a_time(tmp_path, transform):
    save(tmp_path, *(f"{number}.png" for number in range(5)))
    (tmp_path / "1.png").write_bytes(b"broken")
    skipped = []
    images = found(tmp_path).pool
    batches = list(labelled_batches(images, range(5), transform, 2, skipped))
    assert [len(batch) for batch, _ in batches] == [1, 2, 1]
    assert [name.partition(" ")[0] for name in skipped] == ["1.png"]
    rows = datasets.Dataset.from_dict({"number": list(range(9))})
    assert evaluated_rows(9, 4) == limit(rows, 4)["number"][:]
    assert evaluated_rows(9, 9) == list(range(9))
