"""Images and labels from the Hub, from a folder or from the embedded digits, checked before anything trains."""

import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image as PILImage

from .columns import column_values, decode_images, encode_labels, find_image_column, find_label_column
from .digits import load_digits_data
from .splits import ImageData, hold_out, limit
from .transforms import AUGMENTATIONS

EVAL_SPLITS = ("validation", "val", "valid", "test")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What only makes sense for data of one's own; the embedded digits would silently ignore it.
NOT_FOR_DIGITS = ("dataset_config_name", "train_split", "eval_split", "image_column", "label_column")


@dataclass
class DataArguments:
    """Which images to train and to evaluate on. Without `dataset_name` and `data_dir`: the embedded digits.

    Raises:
        ValueError: for two sources at once and for numbers or names out of range.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a local one that `load_dataset` knows."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set, if it has several."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder with parquet files (train-*.parquet, also in a subfolder `data`), or with one folder of "
            "images per class, directly or below `train` and e.g. `test`."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Name of the split to evaluate on; by default the first of validation, val, valid, test. "
            "The name of the training split holds a part of it out (eval_share)."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; found by its type if left out."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the class; found by type and name if left out."}
    )
    eval_share: float = field(
        default=0.1, metadata={"help": "Share of the training split held out if there is no split to evaluate on."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on a random subset of this size (always the same one)."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on a random subset of this size (always the same one)."}
    )
    augmentation: str = field(
        default="auto",
        metadata={
            "help": "'standard' (crops, flips, brightness and contrast), 'light' (small shifts and turns, no flip: "
            "digits, characters), 'none', or 'auto' = standard."
        },
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.data_dir is not None:
            raise ValueError(
                f"dataset_name is {self.dataset_name!r} and data_dir is {self.data_dir!r}; data comes from one place. "
                "Leave one of them out."
            )
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}; it must lie between 0 and 1, e.g. 0.1.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1. Leave it out to use all images.")
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation is {self.augmentation!r}; allowed are {', '.join(AUGMENTATIONS)}.")
        if self.dataset_name is None and self.data_dir is None:
            self._check_digits()
        elif self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(
                f"dataset_config_name is {self.dataset_config_name!r}, but data_dir has no configurations; point "
                "data_dir at the folder you mean, or give the folder as dataset_name."
            )

    def _check_digits(self) -> None:
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        given = {name: getattr(self, name) for name in NOT_FOR_DIGITS if getattr(self, name) != defaults[name]}
        if given:
            raise ValueError(
                f"{', '.join(f'{name} is {value!r}' for name, value in given.items())}, but no data is named, and the "
                "embedded digits have nothing to choose. Give dataset_name or data_dir as well."
            )


def load_image_data(args: DataArguments) -> ImageData:
    """Loads both splits, finds images and labels, and makes sure that every row can be used.

    A missing evaluation split is held out from the training split: always the same rows, every class in proportion.

    Raises:
        ValueError: for a folder that is missing or holds no images, splits that are missing or empty, columns that
            cannot be found, and labels that are missing or not one class per image.
        ImportError: if the digits are asked for and scikit-learn is not installed.
    """
    data = load_digits_data() if args.dataset_name is None and args.data_dir is None else _load(args)
    return replace(data, train=limit(data.train, args.max_train_samples), eval=limit(data.eval, args.max_eval_samples))


def _load(args: DataArguments) -> ImageData:
    if args.data_dir is None:
        name, available = args.dataset_name, _load_splits(args.dataset_name, args.dataset_config_name)
    else:
        name, available = args.data_dir, _load_folder(Path(args.data_dir).expanduser(), args)
    if Path(name).expanduser().exists():
        name = Path(name).expanduser().resolve().name  # Reports are published; folders of this machine stay private.
    splits = _choose_splits(available, args)
    features = splits[args.train_split].features
    image_column = find_image_column(features, args.image_column)
    label_column = find_label_column(features, args.label_column)
    for dataset in splits.values():
        find_image_column(dataset.features, image_column)
        find_label_column(dataset.features, label_column)
    splits = {split: decode_images(dataset, image_column) for split, dataset in splits.items()}
    splits, label_names = encode_labels(splits, label_column)
    train, *rest = splits.values()
    train, held_out = (train, rest[0]) if rest else _hold_out_eval(train, label_column, args.eval_share)
    return ImageData(name, train, held_out, image_column, label_column, label_names)


def _load_splits(path: str, *args: Any, **kwargs: Any) -> DatasetDict:
    try:
        return load_dataset(path, *args, **kwargs)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(
            f"a split of {kwargs.get('data_dir', path)!r} is empty ({error}); add its rows or remove its files."
        ) from error


def _load_folder(folder: Path, args: DataArguments) -> DatasetDict:
    """Parquet files as `load_dataset` finds them; images by folder, in splits named like their folders."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"data_dir is {args.data_dir!r}, which {what}; expected a folder with parquet files or images."
        )
    if any(path.name not in METADATA_NAMES for path in _files(folder, ".parquet", depth=3)):
        return _load_splits(str(folder))
    if not any(_images(folder)):
        raise ValueError(
            f"data_dir is {args.data_dir!r}, which holds neither parquet files nor images; expected "
            "train-*.parquet, or one folder of images per class, directly or below `train` and e.g. `test`."
        )
    # Explicit patterns: `load_dataset` takes a class or a file called e.g. `test` for a split and drops the others.
    names = {"train", *EVAL_SPLITS, args.train_split, args.eval_split or "train"}
    data_files = {split: f"{split}/**" for split in sorted(names) if _is_split(folder / split)}
    return _load_splits("imagefolder", data_dir=str(folder), data_files=data_files or {"train": "**"})


def _is_split(folder: Path) -> bool:
    """Whether a folder holds class folders (or a table of labels), rather than the images of one class."""
    if not folder.is_dir() or not any(_images(folder)):
        return False
    return any(path.is_dir() or path.name in METADATA_NAMES for path in folder.iterdir())


def _images(folder: Path) -> Iterator[str]:
    suffixes = tuple(end for end, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN)
    for _, _, names in os.walk(folder, followlinks=True):
        yield from (name for name in names if name.lower().endswith(suffixes))


def _files(folder: Path, suffix: str, depth: int) -> Iterator[Path]:
    """Files with this suffix, at most `depth` folders down: class folders may hold a million files deeper."""
    for level in range(depth):
        yield from folder.glob("*/" * level + f"*{suffix}")


def _choose_splits(available: DatasetDict, args: DataArguments) -> dict[str, Dataset]:
    """The training split first, then the one to evaluate on, unless a part of the first is to be held out."""
    found = [name for name in EVAL_SPLITS if name in available]
    chosen = {"train_split": args.train_split, "eval_split": args.eval_split or next(iter(found), args.train_split)}
    for field_name, name in chosen.items():
        if name not in available:
            raise ValueError(f"{field_name} is {name!r}, but the data has {sorted(available)}; name one of these.")
        if len(available[name]) == 0:
            raise ValueError(f"split {name!r} is empty; add its rows, or name another one with --{field_name}.")
    return {name: available[name] for name in chosen.values()}


def _hold_out_eval(train: Dataset, label_column: str, share: float) -> tuple[Dataset, Dataset]:
    labels = column_values(train, label_column)
    kept, held_out = hold_out(labels, max(1, round(share * len(labels))))
    return train.select(kept), train.select(held_out)
