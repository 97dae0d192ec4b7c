"""Finding the columns with images and labels, and turning labels into class indices."""

from collections.abc import Collection
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.features.features import FeatureType

from .completeness import Survey, is_missing, place_columns, refuse_unlabelled, unlabelled_row

# Usual names of columns, in order of preference.
IMAGE_NAMES = ("image", "img")
# Beginnings of the names of types whose values can be classes. A "null" column has no values: the
# check for missing labels refuses it with a better message than the check of types would.
DISCRETE = ("int", "uint", "bool", "string", "large_string", "null")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls")


def find_image_column(features: Features, named: str | None) -> str:
    """Return the column with images.

    Args:
        features: columns and their types.
        named: the column that the user named. Without a name it is the only column of the type
            `Image`; among several, `image` or `img`.

    Raises:
        ValueError: if there is no such column, if it holds no images, or if several do.
    """
    if named is not None:
        _check_present(features, named, "image_column")
        if not _holds_images(features[named]):
            raise ValueError(
                f"image_column is {named!r}, whose type is {features[named]}; expected images or "
                f"encoded bytes. Columns: {_describe(features)}."
            )
        return named
    candidates = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not candidates:
        # Parquet files that were not written by `datasets` hold images as plain bytes. Other things
        # are stored as bytes, too, so the column needs a usual name.
        usual = [name for name in IMAGE_NAMES if name in features]
        candidates = [name for name in usual if _holds_images(features[name])]
    if not candidates:
        raise ValueError(
            f"no column holds images. Columns: {_describe(features)}. Name one with --image_column."
        )
    return _only(candidates, IMAGE_NAMES, "hold images", "--image_column")


def find_label_column(features: Features, named: str | None) -> str:
    """Return the column with class labels.

    Args:
        features: columns and their types.
        named: the column that the user named. Without a name it is the only column of the type
            `ClassLabel`, or else one with a usual name.

    Raises:
        ValueError: if there is no such column, or if several qualify.
    """
    if named is not None:
        _check_present(features, named, "label_column")
        return named
    candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not candidates:
        candidates = [name for name in LABEL_NAMES if name in features][:1]
    if not candidates:
        raise ValueError(
            f"no column holds labels: none is a ClassLabel or called {', '.join(LABEL_NAMES)}. "
            f"Columns: {_describe(features)}. Name one with --label_column; images in folders need "
            "one folder per class, all at the same depth, and at least two of them."
        )
    return _only(candidates, LABEL_NAMES, "hold class labels", "--label_column")


def decode_images(dataset: Dataset, column: str) -> Dataset:
    """Return the same rows, whose images are read as PIL images."""
    feature = dataset.features[column]
    if isinstance(feature, Image) and feature.decode:
        return dataset
    return dataset.cast_column(column, Image())


def encode_labels(
    splits: dict[str, Dataset], column: str, others: Collection[Any] = ()
) -> tuple[dict[str, Dataset], list[str]]:
    """Return all splits with class indices in `column`, and the class names in their order.

    Integers and strings become classes in their natural order, over all splits together: labels
    0..n-1 remain what they are. (`Dataset.class_encode_column` sorts them as text, 10 before 2, and
    each split by itself.)

    Args:
        splits: the rows. column: their labels.
        others: labels of further splits, as they are stored.

    Raises:
        ValueError: for labels that are not one class per image (lists, floating point numbers),
            rows without a label (`NO_CLASS`), fewer than two classes, and splits that disagree
            about their classes.
    """
    # Types first: labels that are lists or floats cannot be compared with -1 below.
    for split, dataset in splits.items():
        _check_single_class(dataset.features[column], column, split)
    values = {split: column_values(dataset, column) for split, dataset in splits.items()}
    for split, labels in values.items():
        _check_labelled(splits[split], labels, column, split)
    features = [dataset.features[column] for dataset in splits.values()]
    if any(isinstance(feature, ClassLabel) for feature in features):
        names = _common_names(features, column, list(splits))
        for split, labels in values.items():
            _check_known(labels, len(names), column, split)
        encoded = splits
    else:
        # Classes of all splits together: one may lack a class that the other has.
        classes = sorted(set(others).union(*values.values()))
        names = [str(value) for value in classes]
        index_of = {value: index for index, value in enumerate(classes)}
        encoded = {}
        for split, dataset in splits.items():
            indices = [index_of[value] for value in values[split]]
            others = dataset.remove_columns(column)
            encoded[split] = others.add_column(column, indices, feature=ClassLabel(names=names))
    if len(names) < 2:
        raise ValueError(
            f"column {column!r} knows only the class {names}; a classifier needs at least two."
        )
    return encoded, names


def column_values(dataset: Dataset, column: str) -> list[Any]:
    """Return the values of one column as stored, without decoding an image."""
    # The other columns are dropped first: an access to a row would decode its image.
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return table[column].to_pylist()


def _check_present(features: Features, name: str, field: str) -> None:
    if name not in features:
        raise ValueError(
            f"{field} is {name!r}, but the columns are {_describe(features)}; name one of them."
        )


def _check_single_class(feature: FeatureType, column: str, split: str) -> None:
    is_discrete = isinstance(feature, Value) and feature.dtype.startswith(DISCRETE)
    if not (isinstance(feature, ClassLabel) or is_discrete):
        raise ValueError(
            f"column {column!r} of split {split!r} holds {feature}; expected one class per image, "
            "as an integer, a string or a ClassLabel. Multi-label and regression data are not "
            "supported; name another --label_column."
        )


def _check_labelled(dataset: Dataset, labels: list[Any], column: str, split: str) -> None:
    missing = [number for number, label in enumerate(labels) if is_missing(label)]
    if not missing:
        return
    found = Survey(rows=len(labels), unlabelled=len(missing))
    others = dataset.select_columns([column, *place_columns(dataset.column_names)])
    row = others[missing[0]] | {column: labels[missing[0]]}
    found.examples["label"] = unlabelled_row(row, column, f"row {missing[0]}")
    refuse_unlabelled(found, split)


def _check_known(labels: list[int], num_classes: int, column: str, split: str) -> None:
    if not all(0 <= label < num_classes for label in labels):
        raise ValueError(
            f"split {split!r} has labels beyond the {num_classes} classes of {column!r}; correct "
            "the labels or the classes."
        )


def _common_names(features: list[FeatureType], column: str, splits: list[str]) -> list[str]:
    names_of = [feature.names if isinstance(feature, ClassLabel) else None for feature in features]
    if any(names != names_of[0] for names in names_of):
        # A split without a ClassLabel has no names: None.
        beginnings = [str(names and names[:5]) for names in names_of]
        raise ValueError(
            f"the splits {splits} disagree about the classes in column {column!r}: "
            f"{' against '.join(beginnings)} ...; they need the same ClassLabel."
        )
    return list(names_of[0])


def _holds_images(feature: FeatureType) -> bool:
    # {"bytes": ..., "path": ...} is how `datasets` stores an image.
    if isinstance(feature, dict):
        return "bytes" in feature and _is_binary(feature["bytes"])
    return isinstance(feature, Image) or _is_binary(feature)


def _is_binary(feature: FeatureType) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _only(candidates: list[str], preferred: tuple[str, ...], what: str, flag: str) -> str:
    """Return the only candidate, or the first one that has a preferred name."""
    if len(candidates) == 1:
        return candidates[0]
    usual = [name for name in preferred if name in candidates]
    if not usual:
        raise ValueError(f"the columns {candidates} all {what}; choose one with {flag}.")
    return usual[0]


def _describe(features: Features) -> str:
    columns = []
    for name, feature in features.items():
        columns.append(f"{name} ({type(feature).__name__})")
    return ", ".join(columns)
