"""Images and labels from the Hub, from a folder or from the embedded digits, checked before
anything trains."""

import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    load_dataset,
    load_dataset_builder,
)
from PIL import Image as PILImage

from ..hub_retries import patiently
from .access import explained_hub_refusals
from .columns import (
    column_values,
    decode_images,
    encode_labels,
    find_image_column,
    find_label_column,
)
from .digits import load_digits_data
from .row_blocks import open_source
from .splits import ImageData, hold_out, limit
from .streaming import StreamedSplit
from .transforms import AUGMENTATIONS

EVAL_SPLITS = ("validation", "val", "valid", "test")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What only makes sense for data of one's own; the embedded digits would silently ignore it.
NOT_FOR_DIGITS = (
    "dataset_config_name",
    "train_split",
    "eval_split",
    "image_column",
    "label_column",
    "streaming",
)
ONLY_FOR_STREAMING = ("shuffle_buffer", "num_train_examples", "max_bad_share")
TABLES = (".parquet", ".tar")


@dataclass
class DataArguments:
    """Which images to train and to evaluate on. Without `dataset_name` and `data_dir`: the embedded
    digits.

    Raises:
        ValueError: for two sources at once and for numbers or names out of range.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A data set on the Hub, or a local one that `load_dataset` knows."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set, if it has several."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder with parquet files (train-*.parquet, also in a subfolder `data`) or "
            "WebDataset archives "
            "(train-*.tar), or with one folder of images per class, directly or below `train` and "
            "e.g. `test`."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Name of the split to evaluate on; by default the first of validation, val, "
            "valid, test. "
            "The name of the training split holds a part of it out (eval_share)."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; found by its type if left out."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column with the class; found by type and name if left out."},
    )
    eval_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training split held out if there is no split to evaluate on."
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Train on a random subset of this size (always the same one); of a stream, "
            "the first ones."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on a random subset of this size (always the same one)."},
    )
    augmentation: str = field(
        default="auto",
        metadata={
            "help": "'standard' (crops, flips, brightness and contrast), 'light' (small shifts "
            "and turns, no flip: "
            "digits, characters), 'deit' (RandAugment, random erasing, mixup, cutmix: see "
            "--auto_augment and what "
            "follows it), 'none', or 'auto' = standard."
        },
    )
    eval_crop_pct: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate as timm does: resize the shorter side to size / eval_crop_pct (DeiT "
            "0.875, Swin 0.9) and "
            "cut out the middle. By default images are prepared as the model's image processor "
            "says."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training split while training, and never store it. The split to "
            "evaluate on is loaded."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={
            "help": "Streaming: how many encoded images every worker holds and chooses the next "
            "one from. Shards, or "
            "row groups, come in a new random order in every epoch; data sorted by class needs "
            "more than one of them "
            "in the buffer."
        },
    )
    num_train_examples: int | None = field(
        default=None,
        metadata={
            "help": "Streaming formats without an index (e.g. WebDataset): how many training "
            "examples there are, "
            "instead of counting them once. Shards then pass for equally long; if they are not, a "
            "longer one is cut "
            "and a shorter one repeats."
        },
    )
    max_bad_share: float = field(
        default=0.01,
        metadata={
            "help": "Streaming: images that cannot be decoded are replaced by others and counted; "
            "the run stops when "
            "they are more than this share of an epoch's images."
        },
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.data_dir is not None:
            raise ValueError(
                f"dataset_name is {self.dataset_name!r} and data_dir is {self.data_dir!r}; data "
                f"comes from one place. "
                "Leave one of them out."
            )
        if not 0 < self.eval_share < 1:
            raise ValueError(
                f"eval_share is {self.eval_share}; it must lie between 0 and 1, e.g. 0.1."
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} is {value}; it must be at least 1. Leave it out to use all images."
                )
        if self.eval_crop_pct is not None and not 0 < self.eval_crop_pct <= 1:
            raise ValueError(
                f"eval_crop_pct is {self.eval_crop_pct}; it must lie above 0 and be at most 1, "
                f"e.g. 0.875."
            )
        self._check_streaming()
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"augmentation is {self.augmentation!r}; allowed are {', '.join(AUGMENTATIONS)}."
            )
        if self.dataset_name is None and self.data_dir is None:
            self._check_digits()
        elif self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(
                f"dataset_config_name is {self.dataset_config_name!r}, but data_dir has no "
                f"configurations; point "
                "data_dir at the folder you mean, or give the folder as dataset_name."
            )

    def _check_streaming(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(
                f"shuffle_buffer is {self.shuffle_buffer}; it must be at least 1, e.g. 1000."
            )
        if self.num_train_examples is not None and self.num_train_examples < 1:
            raise ValueError(
                f"num_train_examples is {self.num_train_examples}; it must be at least 1, or left "
                f"out."
            )
        if not 0 <= self.max_bad_share < 1:
            raise ValueError(
                f"max_bad_share is {self.max_bad_share}; it must be at least 0 and below 1, e.g. "
                f"0.01."
            )
        if not self.streaming and (given := self._given(ONLY_FOR_STREAMING)):
            raise ValueError(
                f"{given}, which means something for streams only. Give streaming as well, or "
                f"leave it out."
            )

    def _check_digits(self) -> None:
        if given := self._given(NOT_FOR_DIGITS):
            raise ValueError(
                f"{given}, but no data is named, and the embedded digits have nothing to choose. "
                f"Give dataset_name or "
                "data_dir as well."
            )

    def _given(self, names: tuple[str, ...]) -> str:
        """Those of these fields that do not have their default, in words."""
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return ", ".join(
            f"{name} is {value!r}"
            for name in names
            if (value := getattr(self, name)) != defaults[name]
        )


def load_image_data(args: DataArguments) -> ImageData:
    """Loads both splits, finds images and labels, and makes sure that every row can be used.

    A missing evaluation split is held out from the training split: always the same rows, every
    class in proportion. With `args.streaming` the training split is a `StreamedSplit`, and its
    labels are checked when they are read.

    Raises:
        ValueError: for a folder that is missing or holds no images, splits that are missing or
            empty, columns that cannot be found, and labels that are missing or not one class per
            image.
        DatasetAccessError: for data on the Hub that is gated, private or missing.
        ImportError: if the digits are asked for and scikit-learn is not installed.
    """
    if args.dataset_name is None and args.data_dir is None:
        data = load_digits_data()
    else:
        with explained_hub_refusals(args.dataset_name or args.data_dir):
            data = _load_streamed(args) if args.streaming else _load(args)
    train = data.train if args.streaming else limit(data.train, args.max_train_samples)
    return replace(data, train=train, eval=limit(data.eval, args.max_eval_samples))


def _load(args: DataArguments) -> ImageData:
    path, options = _location(args)
    available = _load_splits(path, **options)
    splits = {name: available[name] for name in _choose_splits(list(available), args)}
    for name, dataset in splits.items():
        if len(dataset) == 0:
            field_name = "train_split" if name == args.train_split else "eval_split"
            raise ValueError(
                f"split {name!r} is empty; add its rows, or name another one with --{field_name}."
            )
    features = splits[args.train_split].features
    image_column = find_image_column(features, args.image_column)
    label_column = find_label_column(features, args.label_column)
    for dataset in splits.values():
        find_image_column(dataset.features, image_column)
        find_label_column(dataset.features, label_column)
    splits = {split: decode_images(dataset, image_column) for split, dataset in splits.items()}
    splits, label_names = encode_labels(splits, label_column)
    train, *rest = splits.values()
    train, held_out = (
        (train, rest[0]) if rest else _hold_out_eval(train, label_column, args.eval_share)
    )
    return ImageData(_public_name(args), train, held_out, image_column, label_column, label_names)


def _load_streamed(args: DataArguments) -> ImageData:
    """The training split as a `StreamedSplit`, the other one loaded."""
    path, options = _location(args)
    builder = patiently(lambda: load_dataset_builder(path, **options), f"looking {path} up")
    if builder.config.data_files is None:
        raise ValueError(
            f"{path} cannot be reached, and a copy in the cache cannot be streamed; leave "
            f"--streaming out."
        )
    streams = patiently(builder.as_streaming_dataset, f"opening {path}")
    train_split, *rest = _choose_splits(list(streams), args)
    if not rest:
        raise ValueError(
            f"split {train_split!r} is to be trained and evaluated on, but nothing can be held "
            f"out from a stream; the "
            f"data has {sorted(streams)}. Name another one with --eval_split, or leave "
            f"--streaming out."
        )
    features = streams[train_split].features
    image_column = find_image_column(features, args.image_column)
    label_column = find_label_column(features, args.label_column)
    evaluation = decode_images(_load_alone(builder, rest[0], features), image_column)
    encoded, label_names = encode_labels({rest[0]: evaluation}, label_column)
    if isinstance(features[label_column], ClassLabel):
        # A table may hold the names although its description says numbers.
        class_of = {
            stored: index for index, name in enumerate(label_names) for stored in (index, name)
        }
    else:
        values = sorted(set(column_values(evaluation, label_column)))
        class_of = {stored: index for index, stored in enumerate(values)}
    columns, wanted = (image_column, label_column), args.max_train_samples
    source = open_source(
        builder, train_split, streams[train_split], columns, args.num_train_examples, wanted
    )
    train = StreamedSplit(source, class_of, label_names, args.shuffle_buffer, args.max_bad_share)
    if len(train) == 0:
        raise ValueError(
            f"split {train_split!r} is empty; add its rows, or name another one with --train_split."
        )
    return ImageData(
        _public_name(args), train, encoded[rest[0]], image_column, label_column, label_names
    )


def _load_alone(builder: DatasetBuilder, split: str, features: Features) -> Dataset:
    """One split, from its files: `load_dataset(..., split=...)` would download all the others with
    it."""
    files = {split: list(builder.config.data_files[split])}
    return patiently(
        lambda: _load_splits(builder.name, data_files=files, features=features), f"loading {split}"
    )[split]


def _public_name(args: DataArguments) -> str:
    """What reports call the data. They are published; folders of this machine stay private."""
    name = args.dataset_name if args.data_dir is None else args.data_dir
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.exists() else name


def _location(args: DataArguments) -> tuple[str, dict[str, Any]]:
    """What `load_dataset` takes: a path or the name of a format, and options."""
    if args.data_dir is None:
        return args.dataset_name, {"name": args.dataset_config_name}
    return _folder_location(Path(args.data_dir).expanduser(), args)


def _load_splits(path: str, **kwargs: Any) -> DatasetDict:
    try:
        return load_dataset(path, **kwargs)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(
            f"a split of {kwargs.get('data_dir', path)!r} is empty ({error}); add its rows or "
            f"remove its files."
        ) from error


def _folder_location(folder: Path, args: DataArguments) -> tuple[str, dict[str, Any]]:
    """Parquet files and archives as `load_dataset` finds them; images by folder, in splits named
    like their folders."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"data_dir is {args.data_dir!r}, which {what}; expected a folder with parquet files "
            f"or images."
        )
    tables = (path for suffix in TABLES for path in _files(folder, suffix, depth=3))
    if any(path.name not in METADATA_NAMES for path in tables):
        return str(folder), {}
    if not any(_images(folder)):
        raise ValueError(
            f"data_dir is {args.data_dir!r}, which holds neither parquet files nor images; "
            f"expected train-*.parquet, "
            "train-*.tar, or one folder of images per class, directly or below `train` and e.g. "
            "`test`."
        )
    # Explicit patterns: `load_dataset` takes a class or a file called e.g. `test` for a split and
    # drops the others.
    names = {"train", *EVAL_SPLITS, args.train_split, args.eval_split or "train"}
    data_files = {split: f"{split}/**" for split in sorted(names) if _is_split(folder / split)}
    return "imagefolder", {"data_dir": str(folder), "data_files": data_files or {"train": "**"}}


def _is_split(folder: Path) -> bool:
    """Whether a folder holds class folders (or a table of labels), rather than the images of one
    class."""
    if not folder.is_dir() or not any(_images(folder)):
        return False
    return any(path.is_dir() or path.name in METADATA_NAMES for path in folder.iterdir())


def _images(folder: Path) -> Iterator[str]:
    suffixes = tuple(
        end for end, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN
    )
    for _, _, names in os.walk(folder, followlinks=True):
        yield from (name for name in names if name.lower().endswith(suffixes))


def _files(folder: Path, suffix: str, depth: int) -> Iterator[Path]:
    """Files with this suffix, at most `depth` folders down: class folders may hold a million files
    deeper."""
    for level in range(depth):
        yield from folder.glob("*/" * level + f"*{suffix}")


def _choose_splits(available: list[str], args: DataArguments) -> list[str]:
    """The training split first, then the one to evaluate on, unless a part of the first is to be
    held out."""
    found = [name for name in EVAL_SPLITS if name in available]
    chosen = {
        "train_split": args.train_split,
        "eval_split": args.eval_split or next(iter(found), args.train_split),
    }
    for field_name, name in chosen.items():
        if name not in available:
            raise ValueError(
                f"{field_name} is {name!r}, but the data has {sorted(available)}; name one of "
                f"these."
            )
    return list(dict.fromkeys(chosen.values()))


def _hold_out_eval(train: Dataset, label_column: str, share: float) -> tuple[Dataset, Dataset]:
    labels = column_values(train, label_column)
    kept, held_out = hold_out(labels, max(1, round(share * len(labels))))
    return train.select(kept), train.select(held_out)
