"""Images that need no labels: a folder of any layout, parquet files, or a data set of the Hub.

They are drawn from one part of the data and measured on another one, where there is such a split.
Labels are kept as they are stored: `class_numbers` finds out whether a model knows them.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets

from .access import DatasetAccessError, explained_hub_refusals
from .columns import find_image_column, find_label_column
from .folders import (
    explained_broken_tables,
    files_below,
    find_split,
    is_image,
    is_split_word,
    is_table,
    literally,
    table_location,
)
from .loading import EVAL_SPLITS, load_splits, public_name
from .row_blocks import ImageTable, Row

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class ImageArguments:
    """Store which images to look at; they need no labels.

    Raises:
        ValueError: for several sources, or none, and for numbers out of range.
    """

    images: str | None = field(
        default=None,
        metadata={
            "help": "The same as --data_dir or --dataset_name, whichever it is; after the model, "
            "the flag may be left out."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder with images, in any layout and at any depth, or with parquet files; "
            "or one parquet file."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set, if it has several."}
    )
    num_images: int = field(
        default=512,
        metadata={"help": "How many images to draw, at random; all of them if there are fewer."},
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "Split, or subfolder, to draw from; by default everything outside of "
            f"{', '.join(EVAL_SPLITS)}."
        },
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split, or subfolder, to measure the result on; by default the first of "
            f"{', '.join(EVAL_SPLITS)}, or else a part of the drawn images that is held out."
        },
    )
    max_eval_samples: int = field(
        default=1000,
        metadata={"help": "Measure on a random subset of that split (always the same one)."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; by default found by its type."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the class, for the accuracy of the result; by default found by "
            "type and name."
        },
    )
    eval_crop_pct: float | None = field(
        default=None,
        metadata={
            "help": "Prepare images as timm does: resize the shorter side to size / eval_crop_pct "
            "(DeiT 0.875, Swin 0.9) and cut out the middle. By default images are prepared by "
            "the model's image processor."
        },
    )

    def __post_init__(self):
        sources = ("images", "data_dir", "dataset_name")
        given = [f"--{name} {getattr(self, name)}" for name in sources if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; images come from one place.")
        if not given:
            raise ValueError(
                "no images are named; give a folder of images, parquet files or a data set of the "
                "Hub after the model, or with --data_dir or --dataset_name. They need no labels."
            )
        if self.images is not None:
            is_here = Path(self.images).expanduser().exists()
            # A name like this that is no folder is looked for on the Hub.
            if not is_here and HUB_NAME.fullmatch(self.images):
                self.dataset_name = self.images
            else:
                self.data_dir = self.images
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(
                f"dataset_config_name is {self.dataset_config_name!r}, but {self.data_dir} has no "
                "configurations; leave it out."
            )
        for name, least in (("num_images", 2), ("max_eval_samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.eval_crop_pct is not None and not 0 < self.eval_crop_pct <= 1:
            raise ValueError(
                f"eval_crop_pct is {self.eval_crop_pct}; it must lie above 0 and be at most 1, "
                "e.g. 0.875."
            )


class ImageFolder(Sequence[Row]):
    """Image files of a folder; the label of an image is the name of the folder that it lies in.

    Args:
        root: the folder.
        paths: of the files, relative to it.
    """

    def __init__(self, root: Path, paths: list[PurePosixPath]):
        self.root = root
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Row:
        path = self.paths[index]
        return Row((self.root / path).read_bytes(), path.parent.name, str(path))

    def label_names(self) -> list[str] | None:
        """Return the names that labels are indices of; here they are names themselves."""
        return None

    def labels(self) -> set[Any]:
        """Return all labels, as they are stored."""
        return {path.parent.name for path in self.paths}


@dataclass(frozen=True)
class FoundImages:
    """Hold what was found under the name of some images.

    Attributes:
        name: for reports: a Hub name, or the name of a folder or a file.
        pool: what to draw from.
        measured: the split to measure on, None if images have to be held out.
        measured_split: its name.
    """

    name: str
    pool: ImageFolder | ImageTable
    measured: ImageFolder | ImageTable | None = None
    measured_split: str | None = None


def find_images(args: ImageArguments) -> FoundImages:
    """Find images and their splits; nothing is decoded.

    Raises:
        ValueError: if there are none, with what is expected.
        DatasetAccessError: for data on the Hub that is gated, private or missing.
    """
    folder = None
    if args.data_dir is not None:
        path = Path(args.data_dir).expanduser()
        folder = path if path.is_dir() else None
        if not path.exists():
            raise ValueError(
                f"{args.data_dir} does not exist; give a folder of images, parquet files, or a "
                "data set of the Hub (OWNER/NAME)."
            )
        if folder is not None and not any(map(is_table, files_below(path))):
            return _in_folder(path, args)
    with explained_broken_tables(args.dataset_name or args.data_dir, folder):
        splits = _tables(args)
    return _in_tables(splits, args)


# ------------------------------------------------------------------------------------------ folders


def _in_folder(folder: Path, args: ImageArguments) -> FoundImages:
    found = list(filter(is_image, files_below(folder)))
    if not found:
        raise ValueError(
            f"{args.data_dir} holds no images; give a folder with image files (at any depth) or "
            "with parquet files."
        )
    paths = list(map(PurePosixPath, found))
    # An archive often has a folder around its splits, which all images lie in.
    common = posixpath.commonpath([posixpath.dirname(path) for path in found])
    named = ("", args.split, args.eval_split)
    around = list(
        takewhile(lambda name: name not in named and not is_split_word(name), common.split("/"))
    )
    by_split: dict[str, list[PurePosixPath]] = {}
    for path in paths:
        # Images that lie in the folder itself are a split without a name.
        top = path.parts[len(around)] if len(path.parts) > len(around) + 1 else ""
        by_split.setdefault(top, []).append(path)
    drawn, measured = _chosen_splits(list(by_split), args)
    pool = paths
    if drawn is not None:
        pool = [path for name in drawn for path in by_split[name]]
    found = ImageFolder(folder, sorted(pool))
    if measured is None:
        return FoundImages(public_name(args), found)
    return FoundImages(public_name(args), found, ImageFolder(folder, by_split[measured]), measured)


# ------------------------------------------------------------------------------------------- tables


def _tables(args: ImageArguments) -> DatasetDict:
    """Load all splits of parquet files, archives, or a data set of the Hub."""
    if args.data_dir is None:
        try:
            with explained_hub_refusals(args.dataset_name):
                return load_splits(args.dataset_name, name=args.dataset_config_name)
        except DatasetAccessError as error:
            if args.images is None:
                raise
            raise DatasetAccessError(f"there is no folder {args.images}, and {error}") from error
    path = Path(args.data_dir).expanduser()
    if path.is_dir():
        place, options = table_location(path, list(filter(is_table, files_below(path))))
        return load_splits(place, **options)
    if path.suffix != ".parquet":
        raise ValueError(f"{args.data_dir} is a file; give a folder of images, or parquet files.")
    return load_splits("parquet", data_files={"train": [literally(str(path))]})


def _in_tables(splits: DatasetDict, args: ImageArguments) -> FoundImages:
    filled = {name: rows for name, rows in splits.items() if len(rows)}
    if not filled:
        raise ValueError(f"{public_name(args)} has no rows.")
    drawn, measured = _chosen_splits(list(filled), args)
    image_column, label_column = _columns(next(iter(filled.values())), args)
    columns = [column for column in (image_column, label_column) if column is not None]

    def table(names: list[str]) -> ImageTable:
        parts = [filled[name].select_columns(columns) for name in names]
        return ImageTable(concatenate_datasets(parts), image_column, label_column)

    pool = table(list(filled) if drawn is None else drawn)
    if measured is None:
        return FoundImages(public_name(args), pool)
    return FoundImages(public_name(args), pool, table([measured]), measured)


def _columns(rows: Dataset, args: ImageArguments) -> tuple[str, str | None]:
    """Return the columns of images and, if there is one, of labels."""
    image_column = find_image_column(rows.features, args.image_column)
    try:
        return image_column, find_label_column(rows.features, args.label_column)
    except ValueError:
        if args.label_column is not None:
            raise
        return image_column, None


def _chosen_splits(names: list[str], args: ImageArguments) -> tuple[list[str] | None, str | None]:
    """Return the splits to draw from, None for everything, and the one to measure on, if any.

    Raises:
        ValueError: if a split that the user named is not there.
    """
    split, measured = args.split, args.eval_split
    if split is not None:
        split = _present(names, split, "split")
    if measured is not None:
        measured = _present(names, measured, "eval_split")
    # Whole names only: photos of test tubes are to be drawn from.
    for_evaluation = [name for word in EVAL_SPLITS for name in names if name.casefold() == word]
    if measured is None:
        measured = next((name for name in for_evaluation if name != split), None)
    if split is not None:
        # What is drawn from the split itself is held out of it.
        return [split], None if measured == split else measured
    # No split that is for evaluation is drawn from, also if another one is measured on.
    drawn = [name for name in names if name not in (*for_evaluation, measured)]
    if drawn:
        return drawn, measured
    if args.eval_split is not None:
        others = [name for name in names if name != measured]
        return others or None, measured if others else None
    return None, None


def _present(names: list[str], wanted: str, field_name: str) -> str:
    name = find_split(filter(None, names), wanted, field_name)
    if name is None:
        raise ValueError(
            f"--{field_name} is {wanted!r}, but the data has {sorted(filter(None, names))}; name "
            "one of these, or leave it out."
        )
    return name


# ------------------------------------------------------------------------------------------- labels


def class_numbers(
    images: ImageFolder | ImageTable, classes: list[str]
) -> tuple[dict[Any, int], str | None]:
    """Return which class of a model every stored label is.

    Args:
        images: with their labels.
        classes: names of the model's classes, in the order of their numbers.

    Returns:
        Stored label -> number, empty if the model knows none of them; and a remark where that is
        not plain.
    """
    names = images.label_names()
    stored = set(range(len(names))) if names is not None else images.labels()
    if not stored:
        return {}, None
    by_name = {_plain(name): number for number, name in enumerate(classes)}
    if len(by_name) < len(classes):  # names that differ in case only
        by_name = {name: number for number, name in enumerate(classes)}
    name_of = {label: str(label if names is None else names[label]) for label in stored}
    numbers: dict[Any, int] = {}
    for label, name in name_of.items():
        number = by_name.get(name, by_name.get(_plain(name)))
        if number is not None:
            numbers[label] = number
    if numbers:
        return numbers, None
    remark = "labels are matched by number, for the model has other names for them"
    # Folders called 0, 1, 10, 2 come in this order, and are still numbers.
    stated = {label: int(name) for label, name in name_of.items() if name.isdecimal()}
    if sorted(stated.values()) == list(range(len(classes))):
        return stated, remark
    labels = sorted(label for label in stored if isinstance(label, int) and label >= 0)
    if labels == list(range(len(classes))):
        return dict(zip(labels, labels, strict=True)), remark
    return {}, None


def _plain(name: str) -> str:
    """Return a class name without what differs between folders and configs."""
    return " ".join(name.replace("_", " ").split()).casefold()
