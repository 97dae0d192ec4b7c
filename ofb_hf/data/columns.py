"""Which column holds the images and which the labels, and how labels become class indices."""

from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.features.features import FeatureType

IMAGE_NAMES = ("image", "img")
DISCRETE = ("int", "uint", "bool", "string", "large_string", "null")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls")


def find_image_column(features: Features, named: str | None) -> str:
    """The column with images: the named one, or the only one that holds images (else `image` or
    `img` among them).

    Raises:
        ValueError: if there is no such column, if it holds no images, or if several do.
    """
    if named is not None:
        _check_present(features, named, "image_column")
        if not _holds_images(features[named]):
            raise ValueError(
                f"image_column is {named!r}, whose type is {features[named]}; expected images or "
                f"encoded bytes. "
                f"Columns: {_describe(features)}."
            )
        return named
    candidates = [name for name, feature in features.items() if isinstance(feature, Image)]
    # Parquet files written without `datasets` keep images as plain bytes; only a telling name makes
    # them images.
    candidates = candidates or [
        name for name in IMAGE_NAMES if name in features and _holds_images(features[name])
    ]
    if not candidates:
        raise ValueError(
            f"no column holds images. Columns: {_describe(features)}. Name one with --image_column."
        )
    return _only(candidates, IMAGE_NAMES, "hold images", "--image_column")


def find_label_column(features: Features, named: str | None) -> str:
    """The column with class labels: the named one, or the only `ClassLabel`, or one with a usual
    name.

    Raises:
        ValueError: if there is no such column, or if several qualify.
    """
    if named is not None:
        _check_present(features, named, "label_column")
        return named
    candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    candidates = candidates or [name for name in LABEL_NAMES if name in features][:1]
    if not candidates:
        raise ValueError(
            f"no column holds labels: none is a ClassLabel or called {', '.join(LABEL_NAMES)}. "
            f"Columns: {_describe(features)}. Name one with --label_column; images in folders "
            f"need one folder per "
            "class, all at the same depth, and at least two of them."
        )
    return _only(candidates, LABEL_NAMES, "hold class labels", "--label_column")


def decode_images(dataset: Dataset, column: str) -> Dataset:
    """The same rows, whose images come out as PIL images."""
    feature = dataset.features[column]
    is_decoded = isinstance(feature, Image) and feature.decode
    return dataset if is_decoded else dataset.cast_column(column, Image())


def encode_labels(splits: dict[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """All splits with class indices in `column`, and the class names in the order of these indices.

    Integers and strings become classes in their natural order, over all splits together: labels
    0..n-1 stay what they are (`Dataset.class_encode_column` sorts them as text, 10 before 2, and
    each split by itself).

    Raises:
        ValueError: for labels that are no single class (lists, floating point numbers), rows
            without a label (None or -1), fewer than two classes, and splits that disagree about
            their classes.
    """
    for split, dataset in splits.items():
        _check_single_class(dataset.features[column], column, split)
    values = {split: column_values(dataset, column) for split, dataset in splits.items()}
    for split, labels in values.items():
        _check_labelled(labels, column, split)
    features = [dataset.features[column] for dataset in splits.values()]
    if any(isinstance(feature, ClassLabel) for feature in features):
        names = _common_names(features, column, list(splits))
        for split, labels in values.items():
            if not all(0 <= label < len(names) for label in labels):
                raise ValueError(
                    f"split {split!r} has labels beyond the {len(names)} classes of {column!r}; "
                    f"fix it."
                )
        encoded = splits
    else:
        classes = sorted(set().union(*values.values()))
        names = [str(value) for value in classes]
        index = {value: position for position, value in enumerate(classes)}
        encoded = {
            split: dataset.remove_columns(column).add_column(
                column, [index[value] for value in values[split]], feature=ClassLabel(names=names)
            )
            for split, dataset in splits.items()
        }
    if len(names) < 2:
        raise ValueError(
            f"column {column!r} knows only the class {names}; a classifier needs at least two."
        )
    return encoded, names


def column_values(dataset: Dataset, column: str) -> list[Any]:
    """The values of one column as stored; no image is decoded for it."""
    return dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()


def _check_present(features: Features, name: str, field: str) -> None:
    if name not in features:
        raise ValueError(
            f"{field} is {name!r}, but the columns are {_describe(features)}; name one of them."
        )


def _check_single_class(feature: FeatureType, column: str, split: str) -> None:
    # "null" is a column without any value: it is refused with better words by the check for missing
    # labels.
    is_discrete = isinstance(feature, Value) and feature.dtype.startswith(DISCRETE)
    if not (isinstance(feature, ClassLabel) or is_discrete):
        raise ValueError(
            f"column {column!r} of split {split!r} holds {feature}; expected one class per image, "
            f"as an integer, a "
            "string or a ClassLabel. Multi-label and regression data are not supported; name "
            "another --label_column."
        )


def _check_labelled(labels: list[Any], column: str, split: str) -> None:
    missing = sum(label is None or label == -1 for label in labels)
    if missing:
        raise ValueError(
            f"{missing} of {len(labels)} rows of split {split!r} have no label ({column!r} is -1 "
            f"or empty there), as "
            "is usual for a test split whose answers are kept back. Name a labelled split with "
            "--eval_split; the name "
            "of the training split holds a part of it out."
        )


def _common_names(features: list[FeatureType], column: str, splits: list[str]) -> list[str]:
    named = [feature.names if isinstance(feature, ClassLabel) else None for feature in features]
    if any(names != named[0] for names in named):
        raise ValueError(
            f"the splits {splits} disagree about the classes in column {column!r}: "
            f"{' against '.join(str(names and names[:5]) for names in named)} ...; they need the "
            f"same ClassLabel."
        )
    return list(named[0])


def _holds_images(feature: FeatureType) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _is_binary(feature["bytes"])
    return isinstance(feature, Image) or _is_binary(feature)


def _is_binary(feature: FeatureType) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _only(candidates: list[str], preferred: tuple[str, ...], what: str, flag: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    usual = [name for name in preferred if name in candidates]
    if not usual:
        raise ValueError(f"the columns {candidates} all {what}; choose one with {flag}.")
    return usual[0]


def _describe(features: Features) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
