"""Rows without a label or an image, and samples of archives with other files than the first ones.

Loaded and streamed data are refused with the same words, before anything trains.
"""

import functools
import io
import tarfile

import pytest
from datasets import Dataset, Features, Image, Value
from pictures import number_of, picture, write

from ofb_hf.data import (
    DataArguments,
    ImageStream,
    SeededImages,
    TooManyBadImagesError,
    load_image_data,
)

pytestmark = pytest.mark.usefixtures("own_cache")

NUMBERS = range(14)
RENAME = "rename the files in the archives, or leave these samples out"


def sample(number, image="png", label="cls", stored=None):
    """The files of a sample: name -> content."""
    files = {}
    if image is not None:
        files[f"{number:03}.{image}"] = picture(number)
    if label is not None:
        files[f"{number:03}.{label}"] = str(number % 3 if stored is None else stored).encode()
    return files


def archive(samples):
    """A WebDataset archive of these samples."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in [item for files in samples for item in files.items()]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def shards(folder, change, numbers=(9,), split="train"):
    """Two training archives of 7 samples and one to evaluate on, where some samples are others."""

    def samples(name, some):
        return archive(
            sample(n, **change) if name == split and n % 20 in numbers else sample(n) for n in some
        )

    return write(
        folder,
        {
            "train-0.tar": samples("train", range(7)),
            "train-1.tar": samples("train", range(7, 14)),
            "test-0.tar": samples("test", range(20, 33)),
        },
    )


def load(folder, **settings):
    """What is loaded from a folder."""
    return load_image_data(DataArguments(data_dir=str(folder), **settings))


def both(folder, **settings):
    """The message that refuses loaded data, which is also that of a stream."""
    said = []
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"first: |cannot be read") as caught:
            load(folder, streaming=streaming, **settings)
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


LATER = range(7, 14)
SAMPLES = [
    # samples, what is other there -> which ones, the first, what to do
    (
        LATER,
        {"image": "jpg"},
        "7 of 14 samples",
        "007 of train-1.tar (it has .jpg, .cls, and no .png)",
    ),
    (
        LATER,
        {"image": "PNG"},
        "7 of 14 samples",
        "007 of train-1.tar (it has .PNG, .cls, and no .png)",
    ),
    ((9,), {"image": None}, "1 of 14 samples", "009 of train-1.tar (it has .cls, and no .png)"),
    ((2,), {"label": None}, "1 of 14 rows", "002 of train-0.tar (it has .png, and no .cls)"),
    (
        LATER,
        {"label": "txt"},
        "7 of 14 rows",
        "007 of train-1.tar (it has .png, .txt, and no .cls)",
    ),
]


@pytest.mark.parametrize(("numbers", "change", "count", "first"), SAMPLES)
def test_samples_with_other_files_are_named(tmp_path, numbers, change, count, first):
    said = both(shards(tmp_path / "pets", change, numbers))
    assert said.startswith(f"{count} of split 'train' have no ")
    assert f"the first: sample {first}. " in said
    assert (RENAME if "image" in change else "add it, or leave these rows out") in said
    if "image" in change:
        assert ".png for the image and .cls for the label" in said


@pytest.mark.parametrize("change", [{"image": "jpg"}, {"label": None}])
def test_samples_to_evaluate_on_are_named(tmp_path, change):
    said = both(shards(tmp_path / "pets", change, (11,), split="test"), max_bad_share=0.5)
    assert said.startswith("1 of 13 ")
    assert "split 'test'" in said
    assert "the first: sample 031 of test-0.tar (it has " in said


def test_the_columns_may_come_from_the_other_split(tmp_path):
    folder = shards(tmp_path / "pets", {"image": "jpg"}, range(14))
    assert "14 of 14 samples of split 'train'" in both(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_few_samples_without_an_image_are_replaced_and_named(tmp_path, streaming):
    folder = shards(tmp_path / "pets", {"image": "jpg"})
    data = load(folder, streaming=streaming, max_bad_share=0.1)
    if streaming:
        images = ImageStream(data.train, number_of, seed=0)
        list(images.loader(1))
        names = images.bad_images.names
    else:
        images = SeededImages(data.train, number_of, "png", "cls", 0, max_bad_share=0.1)
        assert int(images[9]["pixel_values"]) == 10
        names = images.bad_rows.names
    assert names == ["sample 009 of train-1.tar (it has .jpg, .cls, and no .png)"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_image_of_an_archive_is_named_with_the_archive(tmp_path, streaming):
    folder = shards(tmp_path / "pets", {})
    broken = archive(
        sample(n) | ({"010.png": b"no image"} if n == 10 else {}) for n in range(7, 14)
    )
    data = load(write(folder, {"train-1.tar": broken}), streaming=streaming)
    if streaming:
        images = ImageStream(data.train, number_of, seed=0)
        assert sorted({int(one["pixel_values"]) for one in images.loader(1)}) == [
            n for n in NUMBERS if n != 10
        ]
        refuse = images.end_epoch
    else:
        refuse = functools.partial(
            SeededImages(data.train, number_of, "png", "cls", seed=0).__getitem__, 10
        )
    with pytest.raises(TooManyBadImagesError, match=r"example: 010.png of train-1.tar. Repair"):
        refuse()


def test_a_stream_that_is_not_counted_names_the_sample_when_it_comes(tmp_path):
    folder = shards(tmp_path / "pets", {"label": None})
    images = ImageStream(
        load(folder, streaming=True, num_train_examples=14).train, number_of, seed=0
    )
    with pytest.raises(ValueError, match=r"^sample 009 of train-1.tar \(it has .png, and no .cls"):
        list(images.loader(1))


def test_classes_of_archives_are_those_of_all_splits(tmp_path):
    folder = shards(tmp_path / "pets", {"stored": 7})
    loaded, streamed = (load(folder, streaming=streaming) for streaming in (False, True))
    assert loaded.label_names == streamed.label_names == ["0", "1", "2", "7"]
    labels = {
        int(one["pixel_values"]): int(one["labels"])
        for one in ImageStream(streamed.train, number_of, seed=0).loader(1)
    }
    assert labels == {n: 3 if n == 9 else n % 3 for n in NUMBERS}


@pytest.mark.parametrize("numbers", [(9,), (1, 9)])
def test_words_in_files_of_numbers_are_named(tmp_path, numbers):
    said = both(shards(tmp_path / "pets", {"stored": "cat"}, numbers))
    name = "train-0.tar (001.cls: " if 1 in numbers else "train-1.tar (009.cls: "
    assert f"pets cannot be read: {name}invalid literal for int() with base 10: b'cat'; " in said
    assert "belong into .txt files, with --label_column txt" in said


# ------------------------------------------------------------------- what stands for no class


@pytest.mark.parametrize("stored", [-1, -100])
def test_numbers_that_stand_for_no_class(tmp_path, stored):
    said = both(shards(tmp_path / "pets", {"stored": stored}))
    assert said.startswith(
        "1 of 14 rows of split 'train' have no label, the first: 'cls' is "
        f"{stored} in 009.cls of train-1.tar. "
    )
    assert "empty, -1 or -100" in said


@pytest.mark.parametrize(
    ("kind", "labels", "shown"),
    [
        ("int64", [0, 1, -100, 1], "-100"),
        ("int64", [0, 1, None, 1], "None"),
        ("string", ["a", "b", "", "b"], "''"),
        ("string", ["a", "b", None, "b"], "None"),
    ],
)
def test_tables_with_rows_without_a_class(tmp_path, kind, labels, shown):
    def table(stored):
        features = Features({"image": Image(), "label": Value(kind)})
        images = [{"bytes": picture(n), "path": None} for n in range(4)]
        file = io.BytesIO()
        Dataset.from_dict({"image": images, "label": stored}, features=features).to_parquet(file)
        return file.getvalue()

    whole = [label if label not in (-100, None, "") else labels[0] for label in labels]
    folder = write(tmp_path / "a", {"train.parquet": table(labels), "test.parquet": table(whole)})
    for streaming in (False, True):
        message = (
            f"1 of 4 rows of split 'train' have no label, the first: 'label' is {shown} in row 2"
        )
        with pytest.raises(ValueError, match=message):
            load(folder, streaming=streaming)
    folder = write(tmp_path / "b", {"train.parquet": table(whole), "test.parquet": table(labels)})
    assert "1 of 4 rows of split 'test' have no label" in both(folder)


def test_a_number_that_a_csv_file_lacks(tmp_path):
    """pandas makes floats of integers with a gap, which would be no classes."""
    files = {f"{split}/{n}.png": picture(n) for split in ("train", "test") for n in range(4)}
    lines = ["file_name,label", *(f"{name},{n % 2}" for n, name in enumerate(files))]
    folder = write(tmp_path / "pets", files | {"metadata.csv": "\n".join(lines).encode()})
    assert load(folder).label_names == ["0", "1"]
    lines[3] = lines[3][:-1]
    write(folder, {"metadata.csv": "\n".join(lines).encode()})
    assert "1 of 4 rows of split 'train' have no label, the first: 'label' is None" in both(folder)
