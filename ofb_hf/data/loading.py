"""Loading images and labels from the Hub, from a folder or from the embedded digits.

Everything that can be wrong with them is checked before a model trains.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
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
from datasets.features.features import FeatureType
from transformers.utils import logging

from ..hub_retries import patiently
from .access import explained_hub_refusals
from .columns import (
    column_values,
    decode_images,
    encode_labels,
    find_image_column,
    find_label_column,
)
from .completeness import imageless_samples, refuse_imageless, refuse_unlabelled
from .decoding import MAX_BAD_SHARE
from .digits import load_digits_data
from .folders import (
    SPLIT_WORDS,
    Splits,
    explained_broken_tables,
    files_below,
    find_eval_split,
    find_split,
    is_image,
    is_table,
    literally,
    load_folder,
    number_of,
    table_location,
)
from .row_blocks import Source, open_files, open_source, survey_labels
from .splits import ImageData, hold_out_share, limit
from .streaming import StreamedSplit
from .transforms import AUGMENTATIONS

logger = logging.get_logger(__name__)

# Usual names of the split to evaluate on, in order of preference.
EVAL_SPLITS = (*SPLIT_WORDS["validation"], *SPLIT_WORDS["test"])
# Fields that need data of the user's own; the embedded digits would silently ignore them.
NOT_FOR_DIGITS = (
    "dataset_config_name",
    "train_split",
    "eval_split",
    "image_column",
    "label_column",
    "streaming",
)
# What is held out of a training split, where there is no other one.
EVAL_SHARE = 0.1
ONLY_FOR_STREAMING = ("shuffle_buffer", "num_train_examples")


@dataclass
class DataArguments:
    """Store which images to train on and to evaluate on.

    Without `dataset_name` and `data_dir` they are the embedded digits.

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
            "WebDataset archives (train-*.tar), or with one folder of images per class, directly "
            "or below `train` and e.g. `test`."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Name of the split to evaluate on; by default the first of validation, val, "
            "valid, test. If it is the training split, a part of that one is held out "
            "(eval_share)."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; by default found by its type."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column with the class; by default found by type and name."},
    )
    eval_share: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the training split that is held out if there is no split to "
            f"evaluate on; by default {EVAL_SHARE}. A command that trains nothing measures all "
            "images by default."
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Train on a random subset of this size (always the same one); of a stream, "
            "on the first images."
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
            "and turns, no flip: digits, characters), 'deit' (RandAugment, random erasing, mixup, "
            "cutmix: see --auto_augment and the flags after it), 'none', or 'auto' = standard."
        },
    )
    eval_crop_pct: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate as timm does: resize the shorter side to size / eval_crop_pct (DeiT "
            "0.875, Swin 0.9) and cut out the middle. By default images are prepared by the "
            "model's image processor."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training split while training, without storing it. The split to "
            "evaluate on is loaded."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={
            "help": "Streaming: how many encoded images every worker holds and chooses the next "
            "one from. Shards, or row groups, come in a new random order in every epoch; data "
            "sorted by class needs more than one of them in the buffer."
        },
    )
    num_train_examples: int | None = field(
        default=None,
        metadata={
            "help": "Streaming formats without an index (e.g. WebDataset): how many training "
            "examples there are, instead of counting them once. Shards are then taken to be "
            "equally long; if they are not, a longer one is cut and a shorter one repeats."
        },
    )
    max_bad_share: float = field(
        default=MAX_BAD_SHARE,
        metadata={
            "help": "Training images that cannot be decoded are replaced by others and counted; "
            "the run stops when they are more than this fraction."
        },
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.data_dir is not None:
            raise ValueError(
                f"dataset_name is {self.dataset_name!r} and data_dir is {self.data_dir!r}; data "
                "comes from one place. Leave one of them out."
            )
        if self.eval_share is not None and not 0 < self.eval_share <= 1:
            raise ValueError(
                f"eval_share is {self.eval_share}; it must lie above 0 and be at most 1 (below 1 "
                f"where a model is trained), e.g. {EVAL_SHARE}."
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
                "e.g. 0.875."
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
                "configurations; give the right folder as data_dir, or as dataset_name."
            )

    def _check_streaming(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(
                f"shuffle_buffer is {self.shuffle_buffer}; it must be at least 1, e.g. 1000."
            )
        if self.num_train_examples is not None and self.num_train_examples < 1:
            raise ValueError(
                f"num_train_examples is {self.num_train_examples}; it must be at least 1, or left "
                "out."
            )
        if not 0 <= self.max_bad_share < 1:
            raise ValueError(
                f"max_bad_share is {self.max_bad_share}; it must be at least 0 and below 1, e.g. "
                "0.01."
            )
        given = self._given(ONLY_FOR_STREAMING)
        if given and not self.streaming:
            raise ValueError(
                f"{given}, which has an effect on streams only. Give streaming as well, or leave "
                "it out."
            )

    def _check_digits(self) -> None:
        given = self._given(NOT_FOR_DIGITS)
        if given:
            raise ValueError(
                f"{given}, but no data is named, and the embedded digits have nothing to choose. "
                "Give dataset_name or data_dir as well."
            )

    def _given(self, names: tuple[str, ...]) -> str:
        """Return "NAME is VALUE, ..." of those of these fields that do not have their default."""
        given = []
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if field_.name in names and value != field_.default:
                given.append(f"{field_.name} is {value!r}")
        return ", ".join(given)


def load_image_data(args: DataArguments, trains: bool = True) -> ImageData:
    """Load both splits, find images and labels, and make sure that every row can be used.

    Without a split to evaluate on, a part of the training split is held out: always the same rows,
    every class in proportion. With `args.streaming` the training split is a `StreamedSplit`, whose
    labels are checked when they are read. What became which split is logged.

    Args:
        args: say which images.
        trains: whether a model is to be trained. Otherwise nothing is held out, unless
            `args.eval_share` asks for the images that a training would have held out: all images
            are to evaluate on, and `train` has the same rows as `eval`.

    Raises:
        ValueError: for a folder that is missing or holds no images, splits that are missing or
            empty, columns that cannot be found, and labels that are missing or not one class per
            image.
        DatasetAccessError: for data on the Hub that is gated, private or missing.
        ImportError: if the digits are asked for and scikit-learn is not installed.
    """
    if trains and args.eval_share == 1:
        raise ValueError(
            "eval_share is 1.0, which leaves no image to train on; it must be below 1, e.g. 0.1."
        )
    if args.dataset_name is None and args.data_dir is None:
        data = load_digits_data()
    else:
        source = args.dataset_name or args.data_dir
        folder = _local_folder(args)
        with explained_hub_refusals(source), explained_broken_tables(source, folder):
            data = _load_streamed(args) if args.streaming else _load(args, trains)
    train = data.train if args.streaming else limit(data.train, args.max_train_samples)
    return replace(data, train=train, eval=limit(data.eval, args.max_eval_samples))


def _load(args: DataArguments, trains: bool) -> ImageData:
    found = _image_folder(args)
    if found is None:
        path, options = _location(args)
        found = Splits.of_tables(load_splits(path, **options), _local_folder(args))
    train_split, eval_split = _choose_splits(list(found.rows), args, trains)
    splits = {name: found.rows[name] for name in dict.fromkeys((train_split, eval_split))}
    for name, dataset in splits.items():
        if len(dataset) == 0:
            flag = "--train_split" if name == train_split else "--eval_split"
            raise ValueError(f"split {name!r} is empty; add its rows, or name another with {flag}.")
    features = splits[train_split].features
    image_column = find_image_column(features, args.image_column)
    label_column = find_label_column(features, args.label_column)
    # The other split has to have the same columns; the names may have been found by type.
    for dataset in splits.values():
        find_image_column(dataset.features, image_column)
        find_label_column(dataset.features, label_column)
    columns = (image_column, label_column)
    for name, dataset in splits.items():
        allowed = args.max_bad_share if name == train_split else 0
        refuse_imageless(imageless_samples(dataset, columns), name, columns, allowed)
    decoded = {name: decode_images(dataset, image_column) for name, dataset in splits.items()}
    encoded, label_names = encode_labels(decoded, label_column)
    train, evaluation = encoded[train_split], encoded[eval_split]
    held_out_share = args.eval_share
    if trains and held_out_share is None:
        held_out_share = EVAL_SHARE
    if train_split == eval_split and held_out_share not in (None, 1):
        train, evaluation = hold_out_share(train, label_column, held_out_share)
    data = ImageData(
        name=public_name(args),
        train=train if trains else evaluation,
        eval=evaluation,
        image_column=image_column,
        label_column=label_column,
        label_names=label_names,
    )
    _report(data, found, (train_split, eval_split), trains)
    return data


def _load_streamed(args: DataArguments) -> ImageData:
    """Return the data with the training split as a `StreamedSplit`, the other one loaded."""
    found = _image_folder(args)
    opened = _opened_tables(args) if found is None else _opened_folder(args, found)
    train_split, _ = opened.names
    train = StreamedSplit(
        opened.source,
        class_of=opened.class_of,
        label_names=opened.label_names,
        shuffle_buffer=args.shuffle_buffer,
        max_bad_share=args.max_bad_share,
    )
    if len(train) == 0:
        raise ValueError(
            f"split {train_split!r} is empty; add its rows, or name another with --train_split."
        )
    data = ImageData(
        name=public_name(args),
        train=train,
        eval=opened.evaluation,
        image_column=opened.columns[0],
        label_column=opened.columns[1],
        label_names=opened.label_names,
    )
    _report(data, opened.splits, opened.names, trains=True)
    return data


@dataclass(frozen=True)
class _Opened:
    """Hold the parts of streamed data: where its rows are, and what their labels mean."""

    splits: Splits
    names: tuple[str, str]  # of the splits to train and to evaluate on
    columns: tuple[str, str]  # of images and labels
    source: Source
    class_of: dict[Any, int]
    evaluation: Dataset
    label_names: list[str]


def _opened_folder(args: DataArguments, found: Splits) -> _Opened:
    """Open a folder of image files, whose labels are all known."""
    train_split, eval_split = names = _choose_streamed_splits(list(found.rows), args)
    features = found.rows[train_split].features
    columns = (
        find_image_column(features, args.image_column),
        find_label_column(features, args.label_column),
    )
    both = {name: found.rows[name] for name in names}
    encoded, label_names = encode_labels(both, columns[1])
    train = encoded[train_split]
    source = open_files(
        train, train_split, columns, args.num_train_examples, args.max_train_samples
    )
    evaluation = encoded[eval_split]
    class_of = _class_of(train.features[columns[1]], (), label_names)
    return _Opened(found, names, columns, source, class_of, evaluation, label_names)


def _opened_tables(args: DataArguments) -> _Opened:
    """Open parquet files, archives or a data set of the Hub; load the split to evaluate on."""
    path, options = _location(args)
    builder = patiently(lambda: load_dataset_builder(path, **options), f"looking {path} up")
    if builder.config.data_files is None:
        raise ValueError(
            f"{path} cannot be reached, and a copy in the cache cannot be streamed; leave "
            "--streaming out."
        )
    streams = patiently(builder.as_streaming_dataset, f"opening {path}")
    train_split, eval_split = names = _choose_streamed_splits(list(streams), args)
    features = streams[train_split].features
    columns = (
        find_image_column(features, args.image_column),
        find_label_column(features, args.label_column),
    )
    loaded = decode_images(_load_alone(builder, eval_split, features), columns[0])
    source = open_source(
        builder,
        train_split,
        streams[train_split],
        columns=columns,
        num_examples=args.num_train_examples,
        wanted=args.max_train_samples,
    )
    refuse_imageless(imageless_samples(loaded, columns), eval_split, columns, 0)
    others: set[Any] = set()
    found = survey_labels(source, features[columns[1]])
    if found is not None:
        refuse_imageless(found, train_split, columns, args.max_bad_share)
        if args.max_train_samples is None:
            refuse_unlabelled(found, train_split)
        others = set(found.labels)
    encoded, label_names = encode_labels({eval_split: loaded}, columns[1], others)
    stored = others.union(column_values(loaded, columns[1]))
    class_of = _class_of(features[columns[1]], stored, label_names)
    splits = Splits.of_tables(dict(streams), _local_folder(args))
    return _Opened(splits, names, columns, source, class_of, encoded[eval_split], label_names)


def _report(data: ImageData, found: Splits, names: tuple[str, str], trains: bool) -> None:
    """Log which images became which split, and which are not used."""
    train_place, eval_place = (found.places[name] for name in names)
    evaluated = number_of(len(data.eval), "image")
    if not trains:
        what = f"{evaluated} to evaluate on, of {eval_place}"
        if len(data.eval) == len(found.rows[names[1]]):
            what = f"all {evaluated} of {eval_place} to evaluate on"
    elif names[0] == names[1]:
        trained = number_of(len(data.train), "training image")
        what = f"{trained} in {train_place}, and {evaluated} held out from it to evaluate on"
    else:
        trained = number_of(len(data.train), "training image")
        what = f"{trained} in {train_place}, {evaluated} to evaluate on in {eval_place}"
    unused = list(found.unused)
    for name, place in found.places.items():
        if name not in names or (not trains and name != names[1]):
            rows = found.rows[name]  # of a stream their number is not known
            count = f" ({number_of(len(rows), 'image')})" if isinstance(rows, Dataset) else ""
            unused.append(place + count)
    end = f"; not used: {', '.join(unused)}" if unused else ""
    logger.warning(f"{data.name}: {what}, {len(data.label_names)} classes{end}.")


def _class_of(
    feature: FeatureType, stored: Collection[Any], label_names: list[str]
) -> dict[Any, int]:
    """Return the class of every label as it is stored.

    Args:
        feature: the type of the label column.
        stored: all labels that are known, which count if it is no `ClassLabel`.
        label_names: the classes.
    """
    if not isinstance(feature, ClassLabel):
        return {label: index for index, label in enumerate(sorted(stored))}
    class_of: dict[Any, int] = {}
    for index, name in enumerate(label_names):
        class_of[index] = index
        # A table may hold the names although its description says numbers.
        class_of[name] = index
    return class_of


def _load_alone(builder: DatasetBuilder, split: str, features: Features) -> Dataset:
    """Load one split."""
    # From its files, because `load_dataset(..., split=...)` would download all the other splits.
    files = {split: list(map(literally, builder.config.data_files[split]))}
    splits = patiently(
        lambda: load_splits(builder.name, data_files=files, features=features), f"loading {split}"
    )
    return splits[split]


def public_name(args: DataArguments) -> str:
    """Return the name of the data in reports."""
    # Reports are published: they have the name of a local folder, not its path.
    name = args.dataset_name if args.data_dir is None else args.data_dir
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.exists() else name


def _local_folder(args: DataArguments) -> Path | None:
    """Return the folder that the data is in; None for a data set of the Hub.

    Raises:
        ValueError: if `data_dir` is no folder.
    """
    if args.data_dir is None:
        folder = Path(args.dataset_name).expanduser()
        return folder if folder.is_dir() else None
    folder = Path(args.data_dir).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"data_dir is {args.data_dir!r}, which {what}; expected a folder with parquet files "
            "or images."
        )
    return folder


def _image_folder(args: DataArguments) -> Splits | None:
    """Return the splits of a folder of image files; None for data of any other kind."""
    folder = _local_folder(args)
    if folder is None:
        return None
    files = files_below(folder)
    is_ours = any(map(is_image, files))
    if args.data_dir is None:
        # A copy of a repository may say itself what its splits are.
        is_ours = is_ours and "README.md" not in files and args.dataset_config_name is None
    elif not is_ours and not any(map(is_table, files)):
        raise ValueError(
            f"data_dir is {args.data_dir!r}, which holds neither parquet files nor images; "
            "expected train-*.parquet, train-*.tar, or one folder of images per class, directly or "
            "below `train` and e.g. `test`."
        )
    if any(map(is_table, files)) or not is_ours:
        return None
    named = {args.train_split, args.eval_split or args.train_split}
    return load_folder(Path(os.path.abspath(folder)), files, named, args.label_column)


def _location(args: DataArguments) -> tuple[str, dict[str, Any]]:
    """Return what `load_dataset` takes: a path or the name of a format, and options."""
    if args.data_dir is None:
        return args.dataset_name, {"name": args.dataset_config_name}
    folder = _local_folder(args)
    return table_location(folder, list(filter(is_table, files_below(folder))))


def load_splits(path: str, **kwargs: Any) -> DatasetDict:
    """Return all splits of a data set.

    Args:
        path: as `datasets.load_dataset` takes it.
        kwargs: more arguments of `load_dataset`.

    Raises:
        ValueError: if the data set cannot be read, with what to do.
    """
    try:
        return load_dataset(path, **kwargs)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        folder = kwargs.get("data_dir", path)
        raise ValueError(
            f"a split of {folder!r} is empty ({error}); add its rows or remove its files."
        ) from error


def _choose_splits(
    available: list[str], args: DataArguments, trains: bool = True
) -> tuple[str, str]:
    """Return the names of the training split and of the split to evaluate on.

    They are the same if a part of it is to be held out. A split that is missing does no harm where
    nothing is trained: both are the split to evaluate on.
    """
    train_split = find_split(available, args.train_split, "train_split")
    if args.eval_split:
        eval_split = find_split(available, args.eval_split, "eval_split")
    else:
        eval_split = find_eval_split(available, train_split) or train_split
    if train_split is None and not trains:
        train_split = eval_split
    chosen = {
        "train_split": (train_split, args.train_split),
        "eval_split": (eval_split, args.eval_split or args.train_split),
    }
    for field_name, (split, name) in chosen.items():
        if split is None:
            raise ValueError(
                f"{field_name} is {name!r}, but the data has {sorted(available)}; name one of "
                "these."
            )
    return train_split, eval_split


def _choose_streamed_splits(available: list[str], args: DataArguments) -> tuple[str, str]:
    train_split, eval_split = _choose_splits(available, args)
    if train_split == eval_split:
        raise ValueError(
            f"split {train_split!r} is to be trained and evaluated on, but nothing can be held out "
            f"from a stream; the data has {sorted(available)}. Name another one with --eval_split, "
            "or leave --streaming out."
        )
    return train_split, eval_split
