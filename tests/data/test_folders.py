"""Folders of image files: every image is in the split that is meant, with its class, or is said.

Each of these was read wrongly by patterns of `datasets`, which folders and files were matched with.
"""

import json
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from pictures import archive, number_of, numbers, parquet, picture, write

from ofb_hf.data import DataArguments, ImageArguments, ImageStream, find_images, load_image_data
from ofb_hf.data.folders import SPLIT_WORDS, files_below, find_eval_split, find_split, meaning

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def said(monkeypatch):
    """What is logged about splits."""
    lines = []
    monkeypatch.setattr("ofb_hf.data.loading.logger.warning", lines.append)
    return lines


def load(folder: Path, **settings):
    """Return what is loaded from a folder."""
    return load_image_data(DataArguments(data_dir=str(folder), **settings))


def pictures(*paths: str) -> dict[str, bytes]:
    """Return files with different images: path -> content."""
    return {path: picture(number) for number, path in enumerate(paths)}


def class_folders(*places: str, each: int = 2, classes=("cat", "dog")) -> dict[str, bytes]:
    """Return class folders in some places."""
    return pictures(
        *(f"{place}/{name}/{n}.png" for place in places for name in classes for n in range(each))
    )


def shown(rows) -> list[int]:
    """Return the numbers of the images of a loaded split, in order."""
    return sorted(int(number_of(image)) for image in rows["image"])


# ------------------------------------------------------------------------- names that are patterns

ODD_NAMES = ("a[1]", "b*", "c?", "d{x,y}", "e!", "f,g", "h i", "j'k", "[a-z]", "**", "%41", "ü#")


@pytest.mark.parametrize("streaming", [False, True])
def test_file_and_class_names_with_special_characters(tmp_path, streaming):
    names = [
        f"{split}/{name}/{name}{n}.png"
        for split in ("train", "test")
        for name in ODD_NAMES
        for n in (1, 2)
    ]
    # What the patterns among them match lies next to them.
    names += [f"{split}/a1/a1{n}.png" for split in ("train", "test") for n in (1, 2)]
    data = load(write(tmp_path / "odd", pictures(*names)), streaming=streaming)
    half = len(names) // 2 - 1
    test = [n for n, name in enumerate(names) if name.startswith("test")]
    assert shown(data.eval) == test
    assert Counter(data.eval["label"]) == dict.fromkeys(range(len(ODD_NAMES) + 1), 2)
    assert data.label_names == sorted([*ODD_NAMES, "a1"])
    assert len(data.train) == len(names) - len(test) == half + 1
    if streaming:
        loader = ImageStream(data.train, number_of, seed=0).loader(1)
        assert sorted(numbers(loader)) == sorted(set(range(len(names))) - set(test))
    else:
        assert shown(data.train) == sorted(set(range(len(names))) - set(test))


@pytest.mark.parametrize("place", ["a[1]", "b*", "c?"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["images", "parquet", "archives"])
def test_folders_whose_name_is_a_pattern(tmp_path, place, streaming, kind):
    files = {
        "images": class_folders("train", "test"),
        "parquet": {
            "train-0.parquet": parquet([picture(n) for n in range(4)]),
            "test-0.parquet": parquet([picture(n) for n in range(4, 8)]),
        },
        "archives": {"train-0.tar": archive(range(4)), "test-0.tar": archive(range(4, 8))},
    }[kind]
    data = load(write(tmp_path / place, files), streaming=streaming)
    column = data.image_column
    assert sorted(int(number_of(image)) for image in data.eval[column]) == [4, 5, 6, 7]
    assert len(data.train) == 4
    found = find_images(ImageArguments(data_dir=str(tmp_path / place)))
    assert (len(found.pool), len(found.measured)) == (4, 4)


def test_shards_whose_names_are_patterns(tmp_path):
    files = {
        f"{split}-{name}.parquet": parquet([picture(first + n) for n in range(3)], first)
        for split, start in (("train", 0), ("test", 9))
        for first, name in zip(range(start, start + 9, 3), ("[0]", "0", "?"), strict=True)
    }
    folder = write(tmp_path / "shards", files)
    for streaming in (False, True):
        data = load(folder, streaming=streaming)
        assert shown(data.eval) == list(range(9, 18))
        assert len(data.train) == 9


# -------------------------------------------------------------------------------- names of splits


def test_words_of_splits_are_those_of_datasets():
    known = {str(split): set(words) for split, words in datasets.data_files.SPLIT_KEYWORDS.items()}
    assert {split: set(words) for split, words in SPLIT_WORDS.items()} == known
    means = {"Train": "train", "imagenet-VAL": "validation", "val2017": "validation"}
    means |= {"test_set": "test", "contest": None, "evaluate": None, "cat": None}
    assert {name: meaning(name) for name in means} == means


@pytest.mark.parametrize(
    ("train", "evaluated"),
    [
        ("Train", "Val"),
        ("training", "testing"),
        ("TRAIN", "dev"),
        ("train", "eval"),
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("photos/Train", "photos/Evaluation"),
        ("a/b/train", "a/b/test"),
        ("Train", "Kept"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_split_folders_of_any_name_and_case(tmp_path, train, evaluated, streaming):
    folder = write(tmp_path / "pets", class_folders(train, evaluated))
    named = {"eval_split": "kept"} if evaluated == "Kept" else {}
    data = load(folder, streaming=streaming, **named)
    assert shown(data.eval) == [4, 5, 6, 7]
    assert len(data.train) == 4
    assert data.label_names == ["cat", "dog"]


@pytest.mark.parametrize(("train", "evaluated"), [("Train", "Val"), ("training", "Testing")])
def test_split_folders_of_tables(tmp_path, train, evaluated):
    files = {
        f"{train}/0.parquet": parquet([picture(n) for n in range(4)]),
        f"{evaluated}/0.parquet": parquet([picture(n) for n in range(4, 8)]),
    }
    folder = write(tmp_path / "pets", files)
    for streaming in (False, True):
        data = load(folder, streaming=streaming)
        assert (shown(data.eval), len(data.train)) == ([4, 5, 6, 7], 4)
    found = find_images(ImageArguments(data_dir=str(folder)))
    assert (len(found.pool), len(found.measured)) == (4, 4)


def test_splits_of_images_without_labels(tmp_path):
    folder = write(tmp_path / "pets", pictures("x/Train/1.png", "x/Dev/2.png", "x/EVAL/3.png"))
    found = find_images(ImageArguments(data_dir=str(folder)))
    assert [str(path) for path in found.pool.paths] == ["x/Train/1.png"]
    assert found.measured_split == "Dev"
    found = find_images(ImageArguments(data_dir=str(folder), eval_split="test"))
    assert found.measured_split == "EVAL"


def test_what_became_which_split_is_said(tmp_path, said):
    files = class_folders("x/Train", each=3) | class_folders("x/val", "x/raw")
    folder = write(tmp_path / "pets", files | pictures("x/1.png", "loose.png"))
    load(folder)
    load(folder, streaming=True)
    assert (
        said[0]
        == said[1]
        == (
            "pets: 6 training images in x/Train/, 4 images to evaluate on in x/val/, 2 classes; "
            "not used: files in the folder (1 image), files in x/ (1 image), x/raw/ (4 images)."
        )
    )
    load(write(tmp_path / "flat", class_folders(".", each=5)))
    assert said[2] == (
        "flat: 9 training images in the folder, and 1 image held out from it to evaluate on, 2 "
        "classes."
    )
    files = {f"{name}.parquet": parquet([picture(n) for n in range(3)]) for name in SPLIT_WORDS}
    load(write(tmp_path / "tables", files | pictures("1.png")))
    assert said[3] == (
        "tables: 3 training images in split train, 3 images to evaluate on in split validation, 3 "
        "classes; not used: 1 image file next to tables, split test (3 images)."
    )


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("train", "val2014", "val2017"), r"\['val2014', 'val2017'\] may all be meant to evaluate"),
        (("train2014", "train2017", "val"), r"train_split is 'train', which may be any of \['trai"),
        (("a/train", "a/test", "b/train"), r"folders of splits in \['a', 'b'\]; name one"),
    ],
)
def test_several_folders_for_one_split_are_refused(tmp_path, places, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, class_folders(*places)))


def test_the_plain_name_wins_among_several(tmp_path):
    folder = write(tmp_path / "pets", class_folders("train", "train_extra", "val", "val2", "Test"))
    data = load(folder)
    assert (shown(data.train), shown(data.eval)) == ([0, 1, 2, 3], [8, 9, 10, 11])
    data = load(folder, train_split="train_extra", eval_split="test")
    assert (shown(data.train), shown(data.eval)) == ([4, 5, 6, 7], [16, 17, 18, 19])
    assert find_eval_split(["train", "Val", "test"], "train") == "Val"
    assert find_split(["all"], "train", "train_split") is None


@pytest.mark.parametrize("place", ["", "x/"])
def test_splits_that_hold_no_classes_are_refused(tmp_path, place):
    folder = write(tmp_path, pictures(f"{place}train/1.png", f"{place}test/2.png"))
    with pytest.raises(ValueError, match=r"folders called \['test', 'train'\]: these are splits"):
        load(folder)


def test_class_folders_at_different_depths_are_refused(tmp_path):
    folder = write(tmp_path, pictures("cat/1.png", "dog/young/2.png"))
    with pytest.raises(ValueError, match=r"at 2 depths, for example cat/1.png, dog/young/2.png"):
        load(folder)


# ------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("streaming", [False, True])
def test_linked_folders_are_read(tmp_path, streaming):
    """Classes, splits, files and the folder itself, also if two links lead to one folder."""
    store = write(tmp_path / "store", class_folders("a", "b", classes=("cat", "dog", "emu")))
    folder = tmp_path / "pets"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "cat").symlink_to(store / "a" / "cat")
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "1.png").symlink_to(store / "a" / "dog" / "1.png")
    (folder / "train" / "emu").symlink_to(store / "a" / "emu")
    (folder / "val").symlink_to(store / "b")
    (folder / "test").symlink_to(store / "b")
    (folder / "val" / "cat" / "back").symlink_to(store / "b")
    (tmp_path / "linked").symlink_to(folder)
    for eval_split in ("val", "test"):
        data = load(tmp_path / "linked", streaming=streaming, eval_split=eval_split)
        assert data.label_names == ["cat", "dog", "emu"]
        assert len(data.train) == 5
        assert shown(data.eval) == list(range(6, 12))


def test_a_link_to_nowhere_is_named(tmp_path):
    folder = write(tmp_path / "pets", class_folders("."))
    (folder / "emu").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"pets/emu is a link to .*gone, which does not exist"):
        load(folder)


def test_folders_that_patterns_leave_out(tmp_path):
    names = ("__background__", "cat", "__MACOSX", ".cache", "__pycache__")
    folder = write(tmp_path / "pets", class_folders(".", classes=names, each=10))
    assert load(folder).label_names == ["__background__", "cat"]
    assert len(files_below(folder)) == 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    folder = write(tmp_path / "pets", class_folders("."))
    (folder / "dog").chmod(0)
    with pytest.raises(ValueError, match=r"pets cannot be read: .*dog"):
        load(folder)


# --------------------------------------------------------------------------------------- metadata


def metadata(rows: list[dict], kind: str) -> bytes:
    """Return a table of metadata as a file."""
    if kind == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    return "\n".join(lines).encode()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("place", ["above", "inside"])
def test_tables_of_labels(tmp_path, streaming, kind, place):
    folder = write(tmp_path / "pets[1]", pictures(*(f"Train/{n}.png" for n in range(6))))
    write(folder, {f"test/{n}.png": picture(n) for n in range(6, 10)})
    for split, numbers_ in (("Train", range(6)), ("test", range(6, 10))):
        start = f"{split}/" if place == "above" else ""
        rows = [{"file_name": f"{start}{n}.png", "kind": "ab"[n % 2]} for n in numbers_]
        target = folder / ("" if place == "above" else split) / f"metadata.{kind}"
        if place == "above" and split == "test":
            rows = [{"file_name": f"Train/{n}.png", "kind": "ab"[n % 2]} for n in range(6)] + rows
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet(target)
        else:
            target.write_bytes(metadata(rows, kind))
    data = load(folder, streaming=streaming, label_column="kind")
    assert data.label_names == ["a", "b"]
    assert shown(data.eval) == [6, 7, 8, 9]
    assert [int(number_of(row["image"])) % 2 for row in data.eval] == data.eval["kind"]
    assert len(data.train) == 6
    if streaming:
        (batch,) = ImageStream(data.train, number_of, seed=0).loader(6)
        assert sorted(numbers([batch])) == list(range(6))
        assert [n % 2 for n in numbers([batch])] == batch["labels"].tolist()


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "train/metadata.jsonl", "train/cat/metadata.csv"]
)
def test_a_table_without_labels_next_to_class_folders_is_named(tmp_path, name):
    folder = write(tmp_path / "pets", class_folders("train"))
    rows = [{"file_name": "cat/0.png", "caption": "a cat"}]
    write(folder, {name: metadata(rows, name.rpartition(".")[2])})
    with pytest.raises(
        ValueError, match=rf"columns of {name} in .*pets.*or move it out of the fold"
    ):
        load(folder)


def test_images_that_a_table_does_not_list_are_said(tmp_path, said):
    folder = write(tmp_path / "pets", pictures(*(f"{n}.png" for n in range(10))))
    rows = [{"file_name": f"{n}.png", "label": n % 2} for n in range(6)]
    write(folder, {"metadata.csv": metadata(rows, "csv")})
    assert sorted(shown(load(folder).train) + shown(load(folder).eval)) == list(range(6))
    assert said[0].endswith("not used: 4 images not listed in metadata.csv.")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "0.png", "label": 1}], r"metadata.csv has the columns \['file', 'label'\]; exp"),
        ([{"file_name": "0.png", "label": 1}] * 2, r"0.png is listed 2 times in metadata.csv"),
        ([{"file_name": "../0.png", "label": 1}], "lists '../0.png', which is outside"),
        ([{"file_name": "/0.png", "label": 1}], "lists '/0.png', which is outside"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path, rows, message):
    folder = write(tmp_path / "pets", pictures("0.png", "1.png"))
    write(folder, {"metadata.csv": metadata(rows, "csv")})
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_broken_and_different_tables_are_named(tmp_path):
    folder = write(tmp_path / "pets", class_folders("train", "test"))
    write(folder, {"train/metadata.jsonl": b"{"})
    with pytest.raises(ValueError, match=r"metadata.jsonl cannot be read"):
        load(folder)
    rows = [{"file_name": "cat/0.png", "label": 0}, {"file_name": "dog/0.png", "label": 1}]
    write(folder, {"train/metadata.jsonl": metadata(rows, "jsonl")})
    with pytest.raises(
        ValueError, match="none of the 4 images of test is listed in train/metadata"
    ):
        load(folder)
    rows = [{"file_name": "cat/0.png", "label": "x"}, {"file_name": "dog/0.png", "label": "y"}]
    write(folder, {"test/metadata.jsonl": metadata(rows, "jsonl")})
    with pytest.raises(ValueError, match="have columns of different types"):
        load(folder)


# -------------------------------------------------------------------------------- measuring alone


def test_measuring_takes_all_images(tmp_path):
    def measured(folder, **settings):
        args = DataArguments(data_dir=str(folder), **settings)
        data = load_image_data(args, trains=False)
        assert data.train is data.eval
        return shown(data.eval)

    flat = write(tmp_path / "flat", class_folders(".", each=10))
    assert measured(flat) == measured(flat, eval_share=1.0) == list(range(20))
    assert len(measured(flat, eval_share=0.1)) == 2
    assert measured(flat, eval_share=0.1) == shown(load(flat, eval_share=0.1).eval)
    test = write(tmp_path / "test", class_folders("Test", each=10))
    assert measured(test) == list(range(20))
    assert measured(test, train_split="test", eval_split="test") == list(range(20))
    both = write(tmp_path / "both", class_folders("train", "val"))
    assert measured(both) == [4, 5, 6, 7]
    assert measured(both, eval_split="train") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"eval_share is 1.0, which leaves no image to train on"):
        load(flat, eval_share=1.0)


def test_files_of_other_kinds_are_said(tmp_path, said):
    files = class_folders(".", each=5) | {"notes.txt": b"", "cat/x.jpg_large": b"", "a.h5": b""}
    load(write(tmp_path / "pets", files))
    assert said[0].endswith("; not used: 3 files without the suffix of an image, e.g. a.h5.")


def test_measuring_says_how_many(tmp_path, said):
    folder = write(tmp_path / "pets", class_folders(".", each=10))
    args = DataArguments(data_dir=str(folder))
    load_image_data(args, trains=False)
    assert said == ["pets: all 20 images of the folder to evaluate on, 2 classes."]
    assert np.all(np.diff(shown(load_image_data(args, trains=False).eval)) == 1)
