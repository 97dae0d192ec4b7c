"""Rows that lack a label or an image: which ones, what they have instead, and what to do.

`datasets` takes the columns of all WebDataset archives from the first samples of one, and drops
files of other suffixes. A row then says only that something is missing; the archive says what.
"""

import functools
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import pyarrow.compute as pc
from datasets import Dataset
from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

# Columns that `datasets` adds to rows of WebDataset archives: which sample of which archive.
KEY, ARCHIVE = "__key__", "__url__"
PLACE = (KEY, ARCHIVE)
# What is stored where there is no class: the answers of a test split, and what the losses of torch
# leave out (`ignore_index`).
NO_CLASS = (None, "", -1, -100)


def is_missing(label: Any) -> bool:
    """Return whether a label, as it is stored, says that there is no class."""
    return label in NO_CLASS


def place_columns(names: Sequence[str] | None) -> list[str]:
    """Return the columns that tell the place of a sample, none for data that has no archives."""
    return list(PLACE) if set(PLACE) <= set(names or ()) else []


def sample_name(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """Return the name of a sample, and which files it has if one is missing.

    Args:
        row: as it is stored.
        columns: of the image, and of the label if that is wanted: suffixes of files.

    Returns:
        None for a row that comes from no archive.
    """
    key, url = (row.get(column) for column in PLACE)
    if key is None or url is None:
        return None
    archive = url.rpartition("/")[2]
    missing = [column for column in columns if row[column] is None]
    if not missing:
        return f"{key}.{columns[0]} of {archive}"
    there = _suffixes(url).get(key, ())
    what = f"{_listed(there)}, and no" if there else "no"
    return f"sample {key} of {archive} (it has {what} {_listed(missing)})"


def _listed(suffixes: Sequence[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in suffixes)


@functools.lru_cache(maxsize=4)
def _suffixes(url: str) -> dict[str, list[str]]:
    """Return the suffixes of the files of every sample of an archive; none if it is unreadable."""
    found: dict[str, list[str]] = {}
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file) as archive:
            for member in archive:
                key, suffix = base_plus_ext(member.name)
                if key is not None:
                    found.setdefault(key, []).append(suffix)
    except (OSError, tarfile.TarError):
        return {}
    return found


@dataclass
class Survey:
    """Hold what was found by looking at rows without decoding images.

    Args:
        rows: how many there are.
        labels: all different ones, as they are stored.
        unlabelled, imageless: how many rows have no label, and no image.
        examples: "label" and "image" -> the name of the first such row.
    """

    rows: int = 0
    labels: list[Any] = field(default_factory=list)
    unlabelled: int = 0
    imageless: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Sequence["Survey"]) -> "Survey":
        """Return what was found in several parts of a split, in their order."""
        whole = cls()
        for part in parts:
            whole.rows += part.rows
            whole.labels += part.labels
            whole.unlabelled += part.unlabelled
            whole.imageless += part.imageless
            whole.examples = part.examples | whole.examples
        whole.labels = list(dict.fromkeys(whole.labels))
        return whole

    def to_json(self) -> bytes:
        """Return this as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Survey":
        """Read what `to_json` gave."""
        return cls(**json.loads(content))


def surveyed(rows: Iterable[Mapping[str, Any]], columns: tuple[str, str], of: str) -> Survey:
    """Look at rows, one after the other.

    Args:
        rows: as they are stored; the image may be left out of them.
        columns: of images and labels.
        of: the name of what they are rows of.
    """
    image_column, label_column = columns
    found = Survey()
    labels: dict[Any, None] = {}
    for number, row in enumerate(rows):
        label = row[label_column]
        if is_missing(label):
            found.unlabelled += 1
            found.examples.setdefault(
                "label", unlabelled_row(row, label_column, f"row {number}{of}")
            )
        elif isinstance(label, int | str):
            labels[label] = None
        if row.get(image_column, ()) is None:
            found.imageless += 1
            found.examples.setdefault("image", sample_name(row, columns) or f"row {number}{of}")
        found.rows += 1
    found.labels = list(labels)
    return found


def unlabelled_row(row: Mapping[str, Any], label_column: str, name: str) -> str:
    """Return which row has no label, and what it has in its place.

    Args:
        row: as it is stored.
        label_column: column with the labels.
        name: of the row, where it is none of an archive.
    """
    label = row[label_column]
    sample = sample_name(row, [label_column])
    if label is None and sample is not None:
        return sample
    return f"{label_column!r} is {label!r} in {sample or name}"


def refuse_unlabelled(found: Survey, split: str) -> None:
    """Raise ValueError if rows have no label."""
    if not found.unlabelled:
        return
    advice = (
        "Every image needs one (it is missing where it is empty, -1 or -100): add it, or leave "
        "these rows out."
    )
    if found.unlabelled == found.rows:
        advice = (
            "That is usual for a test split whose answers are kept back. Name a labelled split "
            "with --eval_split; if it is the training split, a part of that one is held out."
        )
    raise ValueError(
        f"{found.unlabelled} of {found.rows} rows of split {split!r} have no label, the first: "
        f"{found.examples['label']}. {advice}"
    )


def refuse_imageless(
    found: Survey, split: str, columns: tuple[str, str], max_bad_share: float
) -> None:
    """Raise ValueError if more samples of archives have no image than may be broken."""
    if found.imageless <= max_bad_share * found.rows:
        return
    image, label = columns
    raise ValueError(
        f"{found.imageless} of {found.rows} samples of split {split!r} have no image, the first: "
        f"{found.examples['image']}. All samples need the suffixes of the first ones, which are "
        f".{image} for the image and .{label} for the label: rename the files in the archives, or "
        "leave these samples out."
    )


def imageless_samples(dataset: Dataset, columns: tuple[str, str]) -> Survey:
    """Count the samples without an image in a split that was loaded from archives."""
    image_column, label_column = columns
    found = Survey(rows=len(dataset))
    if not place_columns(dataset.column_names):
        return found
    is_null = pc.is_null(dataset.with_format("arrow").select_columns([image_column])[:][0])
    found.imageless = pc.sum(is_null).as_py() or 0
    if found.imageless:
        first = pc.index(is_null, True).as_py()
        row = dataset.select_columns([label_column, *PLACE])[first]
        found.examples["image"] = sample_name({image_column: None} | row, columns)
    return found
