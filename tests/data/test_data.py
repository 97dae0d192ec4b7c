"""Data from folders, parquet files and the embedded digits; errors with an explanation."""

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from transformers import HfArgumentParser

from ofb_hf.data import DataArguments, ImageData, load_digits_data, load_image_data
from ofb_hf.data.columns import encode_labels
from ofb_hf.data.splits import hold_out, limit
from ofb_hf.training.arguments import OFBTrainingArguments

FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pets"
    path.mkdir()
    return path


def picture(seed: int) -> PILImage.Image:
    return PILImage.fromarray(
        np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    )


def add_images(folder: Path, classes: list[str], count: int, stem: str = "") -> None:
    for position, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(100 * position + i).save(folder / name / f"{stem}{i}.png")


def add_parquet(
    path: Path, labels: list, features: Features | None = FEATURES, image: str = "image"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = next((name for name in features if name != image), "label") if features else "label"
    rows = {image: [picture(i) for i in range(len(labels))], label: labels}
    columns = features or Features(
        {image: Image(), label: Dataset.from_dict({label: labels}).features[label]}
    )
    Dataset.from_dict(rows, features=columns).to_parquet(path)


def load(folder: Path, **kwargs) -> ImageData:
    return load_image_data(DataArguments(data_dir=str(folder), **kwargs))


# Where data comes from


def test_digits_are_the_default():
    data = load_image_data(DataArguments())
    assert (data.name, data.image_column, data.label_column) == ("digits", "image", "label")
    assert data.label_names == list("0123456789")
    assert (len(data.train), len(data.eval)) == (1400, 397)
    assert data.train.features["label"].names == data.label_names
    counts = np.bincount(data.eval["label"])
    assert counts.min() >= 38
    assert counts.max() <= 41


def test_digits_keep_every_scan_once_and_all_gray_levels():
    from sklearn.datasets import load_digits

    data = load_digits_data()
    rows = [*data.train, *data.eval]
    pixels = np.stack([np.asarray(row["image"]) for row in rows])
    assert pixels.shape == (1797, 8, 8, 3)
    assert pixels.max() == 255
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(p[..., 0].tobytes() for p in pixels) == sorted(p.tobytes() for p in expected)
    assert (pixels == pixels[..., :1]).all()
    by_scan = {p.tobytes(): label for p, label in zip(expected, load_digits().target, strict=True)}
    assert all(
        by_scan[p[..., 0].tobytes()] == row["label"] for p, row in zip(pixels, rows, strict=True)
    )


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "ofb-hf\[demo\]"'):
        load_digits_data()


@pytest.mark.parametrize(
    "place", ["data/{}-00000-of-00001.parquet", "{}-0.parquet", "{}/0.parquet"]
)
def test_parquet_shards(folder, place):
    add_parquet(folder / place.format("train"), [0, 1, 0, 1, 1])
    add_parquet(folder / place.format("test"), [1, 0])
    data = load(folder)
    assert data.name == "pets"
    assert data.train["label"] == [0, 1, 0, 1, 1]
    assert data.eval["label"] == [1, 0]
    assert data.label_names == ["cat", "dog"]
    assert np.array_equal(np.asarray(data.train[2]["image"]), np.asarray(picture(2)))


def test_a_local_folder_as_dataset_name_is_called_by_its_last_part(folder):
    add_parquet(folder / "train.parquet", [0, 1] * 5)
    data = load_image_data(DataArguments(dataset_name=str(folder)))
    assert data.name == "pets"
    assert len(data.train) == 9


def test_images_as_plain_bytes(folder):
    """Parquet written without `datasets` has no Image type, only a struct of bytes."""
    path = folder / "train.parquet"
    rows = {"img": [], "class": ["b", "a", "b", "a"]}
    for i in range(4):
        picture(i).save(folder / "x.png")
        rows["img"].append({"bytes": (folder / "x.png").read_bytes(), "path": None})
    (folder / "x.png").unlink()
    Dataset.from_dict(rows).to_parquet(path)
    data = load(folder, eval_share=0.5)
    assert (data.image_column, data.label_column, data.label_names) == ("img", "class", ["a", "b"])
    assert data.train[0]["img"].size == (5, 6)


@pytest.mark.parametrize("classes", [["cat", "dog"], ["train", "test", "car"]])
def test_class_folders(folder, classes):
    """Class or file names that look like splits are classes and files all the same."""
    add_images(folder, classes, 10, stem="test_")
    data = load(folder)
    assert data.label_names == sorted(classes)
    assert (len(data.train), len(data.eval)) == (9 * len(classes), len(classes))
    assert sorted(data.eval["label"]) == list(range(len(classes)))


@pytest.mark.parametrize("split", ["validation", "val", "valid", "test"])
def test_class_folders_in_split_folders(folder, split):
    add_images(folder / "train", ["cat", "dog"], 3)
    add_images(folder / split, ["cat", "dog"], 2)
    data = load(folder)
    assert data.label_names == ["cat", "dog"]
    assert sorted(data.train["label"]) == [0] * 3 + [1] * 3
    assert sorted(data.eval["label"]) == [0] * 2 + [1] * 2


def test_validation_wins_over_test_unless_named(folder):
    for split, count in (("train", 4), ("test", 3), ("validation", 2)):
        add_images(folder / split, ["cat", "dog"], count)
    assert len(load(folder).eval) == 4
    assert len(load(folder, eval_split="test").eval) == 6
    assert len(load(folder, train_split="test", eval_split="train").train) == 6


def test_the_training_split_as_eval_split_is_divided(folder):
    add_images(folder / "train", ["cat", "dog"], 4)
    add_images(folder / "test", ["cat", "dog"], 2)
    data = load(folder, eval_split="train", eval_share=0.25)
    assert (len(data.train), len(data.eval)) == (6, 2)


# Labels


@pytest.mark.parametrize(
    ("train", "test", "names", "indices"),
    [
        ([2, 10, 1], [10, 2], ["1", "2", "10"], [1, 2, 0]),
        (list(range(12)), [11, 3], [str(i) for i in range(12)], list(range(12))),
        (["dog", "cat", "dog"], ["emu"], ["cat", "dog", "emu"], [1, 0, 1]),
        ([True, False], [True], ["False", "True"], [1, 0]),
    ],
)
def test_plain_labels_become_classes_over_all_splits(folder, train, test, names, indices):
    add_parquet(folder / "train.parquet", train, features=None)
    add_parquet(folder / "test.parquet", test, features=None)
    data = load(folder)
    assert data.label_names == names
    assert data.train["label"] == indices
    assert data.eval.features["label"].names == names
    assert [names[label] for label in data.eval["label"]] == [str(value) for value in test]


@given(st.lists(st.integers(0, 30), min_size=2, unique=True), st.data())
def test_encoding_keeps_every_label(values, data):
    rows = data.draw(st.lists(st.sampled_from(values), min_size=1))
    splits = {
        name: Dataset.from_dict({"image": list(range(len(labels))), "label": labels})
        for name, labels in (("train", values), ("test", rows))
    }
    encoded, names = encode_labels(splits, "label")
    assert [int(names[label]) for label in encoded["train"]["label"]] == values
    assert [int(names[label]) for label in encoded["test"]["label"]] == rows
    assert encoded["train"].features == encoded["test"].features


def test_columns_are_found_by_type_and_name(folder):
    features = Features(
        {
            "photo": Image(),
            "coarse": ClassLabel(names=["x", "y"]),
            "fine_label": ClassLabel(names=["a", "b"]),
        }
    )
    rows = {
        "photo": [picture(i) for i in range(4)],
        "coarse": [0, 0, 1, 1],
        "fine_label": [0, 1, 0, 1],
    }
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    data = load(folder, eval_share=0.5)
    assert (data.image_column, data.label_column) == ("photo", "fine_label")
    assert load(folder, eval_share=0.5, label_column="coarse").label_names == ["x", "y"]


@pytest.mark.parametrize("labels", [[0, -1, 1], [-1, -1, -1], [0, None, 1]])
def test_unlabelled_rows_are_refused(folder, labels):
    add_parquet(folder / "train.parquet", [0, 1, 1, 0])
    add_parquet(folder / "test.parquet", labels)
    advice = "--eval_split" if labels.count(-1) == 3 else "leave these rows out"
    with pytest.raises(ValueError, match=rf"of 3 rows of split 'test' have no label.*{advice}"):
        load(folder)
    assert len(load(folder, eval_split="train").train) == 3


def test_unlabelled_plain_integers_are_refused(folder):
    add_parquet(folder / "train.parquet", [0, 1, -1], features=None)
    with pytest.raises(ValueError, match="1 of 3 rows of split 'train' have no label"):
        load(folder)


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (List(ClassLabel(names=["a", "b"])), [[0], [0, 1]]),
        (List(Value("int64")), [[0], [1]]),
        (Value("float32"), [0, 1]),
    ],
)
def test_labels_that_are_no_single_class_are_refused(folder, feature, values):
    add_parquet(folder / "train.parquet", values, Features({"image": Image(), "label": feature}))
    with pytest.raises(
        ValueError, match=r"'label' of split 'train' holds .*expected one class per image"
    ):
        load(folder)


def test_splits_that_disagree_about_classes_are_refused():
    splits = {
        name: Dataset.from_dict(
            {"label": [0, 1]}, features=Features({"label": ClassLabel(names=names)})
        )
        for name, names in (("train", ["a", "b"]), ("test", ["b", "a"]))
    }
    with pytest.raises(ValueError, match=r"\['train', 'test'\] disagree about the classes"):
        encode_labels(splits, "label")


def test_a_single_class_is_refused(folder):
    add_parquet(folder / "train.parquet", ["cat"] * 4, features=None)
    with pytest.raises(ValueError, match=r"knows only the class \['cat'\].*at least two"):
        load(folder)


# What is missing


def test_missing_and_empty_folders(folder):
    with pytest.raises(ValueError, match="which does not exist; expected a folder"):
        load(folder / "nowhere")
    with pytest.raises(ValueError, match="holds neither parquet files nor images; expected train"):
        load(folder)
    (folder / "notes.txt").write_text("no data")
    with pytest.raises(ValueError, match="which is a file; expected a folder"):
        load(folder / "notes.txt")
    with pytest.raises(ValueError, match="holds neither parquet files nor images"):
        load(folder)


def test_missing_splits(folder):
    add_images(folder / "train", ["cat", "dog"], 2)
    add_images(folder / "test", ["cat", "dog"], 2)
    with pytest.raises(
        ValueError, match=r"eval_split is 'dev', but the data has \['test', 'train'\]; name one"
    ):
        load(folder, eval_split="dev")
    with pytest.raises(
        ValueError, match=r"train_split is 'all', but the data has \['test', 'train'\]; name one"
    ):
        load(folder, train_split="all")


def test_empty_splits(folder):
    add_parquet(folder / "train.parquet", [0, 1, 0, 1])
    Dataset.from_dict({"image": [], "label": []}, features=FEATURES).to_parquet(
        folder / "test.parquet"
    )
    with pytest.raises(ValueError, match=r"split of .*pets' is empty .*add its rows"):
        load(folder)


def test_missing_columns(folder):
    add_parquet(folder / "train.parquet", [0, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"image_column is 'img', but the columns are image \(Image\), label"
    ):
        load(folder, image_column="img")
    with pytest.raises(ValueError, match=r"label_column is 'kind', but the columns are image"):
        load(folder, label_column="kind")
    with pytest.raises(
        ValueError, match=r"image_column is 'label', whose type is ClassLabel.*expected images"
    ):
        load(folder, image_column="label")


def test_data_without_images_or_labels(tmp_path):
    for name, features, message in (
        (
            "texts",
            {"text": Value("string"), "label": ClassLabel(names=["a", "b"])},
            r"no column holds images.*text",
        ),
        (
            "plain",
            {"image": Image(), "size": Value("int64")},
            r"no column holds labels.*size \(Value\)",
        ),
        (
            "pairs",
            {"left": Image(), "right": Image(), "label": Value("int64")},
            r"\['left', 'right'\] all hold images",
        ),
        (
            "two",
            {"image": Image(), "color": ClassLabel(names=["a"]), "kind": ClassLabel(names=["a"])},
            r"\['color', 'kind'\] all hold class labels; choose one with --label_column",
        ),
    ):
        (tmp_path / name).mkdir()
        values = {
            column: [picture(0)] * 2
            if isinstance(feature, Image)
            else ["a", "a"]
            if column == "text"
            else [0, 0]
            for column, feature in features.items()
        }
        Dataset.from_dict(values, features=Features(features)).to_parquet(
            tmp_path / name / "train.parquet"
        )
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)


def test_images_outside_class_folders(folder):
    picture(0).save(folder / "0.png")
    picture(1).save(folder / "1.png")
    with pytest.raises(ValueError, match=r"no column holds labels.*one folder per class"):
        load(folder)


# Dividing and cutting


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.data())
def test_held_out_rows_are_a_fair_part(labels, data):
    count = data.draw(st.integers(1, len(labels) - 1))
    kept, held_out = hold_out(labels, count)
    assert len(held_out) == count
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label in set(labels):
        share = labels.count(label) * count / len(labels)
        # Each class is off by less than one row, plus what the other classes push over the common
        # border.
        assert (
            abs(sum(labels[row] == label for row in held_out) - share) <= 1 + len(set(labels)) / 2
        )
    assert np.array_equal(hold_out(labels, count)[1], held_out)


def test_too_few_rows_to_hold_out(folder):
    add_parquet(folder / "train.parquet", [0])
    with pytest.raises(ValueError, match="1 of 1 rows cannot be held out"):
        load(folder)


def test_limits_choose_the_same_random_rows_every_time():
    args = DataArguments(max_train_samples=100, max_eval_samples=10_000)
    first, second = load_image_data(args), load_image_data(args)
    assert (len(first.train), len(first.eval)) == (100, 397)
    assert first.train["label"] == second.train["label"]
    assert len(set(first.train["label"])) == 10
    assert first.train["label"] != load_digits_data().train["label"][:100]
    assert limit(first.eval, None) is first.eval


# Arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"dataset_name": "a/b", "data_dir": "c"},
            r"dataset_name is 'a/b' and data_dir is 'c'.*Leave one",
        ),
        ({"eval_share": 0.0}, r"eval_share is 0.0; it must lie above 0 and be at most 1"),
        ({"eval_share": 1.1}, r"eval_share is 1.1"),
        ({"max_train_samples": 0}, r"max_train_samples is 0; it must be at least 1"),
        ({"max_eval_samples": -5}, r"max_eval_samples is -5; it must be at least 1"),
        (
            {"augmentation": "strong"},
            r"augmentation is 'strong'; allowed are auto, none, light, standard",
        ),
        ({"image_column": "img"}, r"image_column is 'img', but no data is named"),
        (
            {"data_dir": "c", "dataset_config_name": "x"},
            r"dataset_config_name is 'x', but data_dir has no config",
        ),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**kwargs)


def test_arguments_parse_next_to_those_of_the_trainer(tmp_path):
    parser = HfArgumentParser([DataArguments, OFBTrainingArguments])
    words = [
        "--data_dir",
        "x",
        "--max_train_samples",
        "7",
        "--augmentation",
        "light",
        "--output_dir",
        str(tmp_path),
    ]
    data, _ = parser.parse_args_into_dataclasses([*words, "--use_cpu"])
    assert (data.data_dir, data.max_train_samples, data.augmentation) == ("x", 7, "light")
    assert "eval_share" in parser.format_help()
