"""A classification data set with its two splits, and how splits are divided and cut."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image

from .decoding import to_rgb

SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageData:
    """Images to train and to evaluate on.

    Attributes:
        name: what the data is called in reports: a Hub name, a folder's name or `digits`.
        train, eval: rows with an `Image` column and a `ClassLabel` column, no row without a label.
            A streamed training split is a `StreamedSplit` instead.
        image_column, label_column: the names of these columns.
        label_names: the classes, in the order of their indices.
    """

    name: str
    train: Any
    eval: Dataset
    image_column: str
    label_column: str
    label_names: list[str]


def hold_out(labels: list[int], num_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows to keep and which to hold out: two arrays of row indices, every class in
    proportion.

    The same labels give the same answer on every machine: `RandomState` is the generator that numpy
    froze.

    Raises:
        ValueError: unless both parts get at least one row.
    """
    if not 0 < num_held_out < len(labels):
        raise ValueError(
            f"{num_held_out} of {len(labels)} rows cannot be held out for evaluation; both parts "
            f"need at least one "
            "row. Give more images, another --eval_share, or name an --eval_split."
        )
    classes = np.asarray(labels)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(classes))
    position = np.empty(len(classes))
    for label in np.unique(classes):
        members = order[classes[order] == label]
        # Members of every class are spread evenly over [0, 1): any first part then holds its share
        # of each class.
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    by_position = order[np.argsort(position[order], kind="stable")]
    return by_position[num_held_out:], by_position[:num_held_out]


def limit(dataset: Dataset, num_samples: int | None) -> Dataset:
    """A random subset, always the same; the data set itself when there is no limit or nothing to
    cut."""
    if num_samples is None or num_samples >= len(dataset):
        return dataset
    return dataset.select(np.random.RandomState(SPLIT_SEED).permutation(len(dataset))[:num_samples])


def align_labels(dataset: Dataset, label_names: list[str], label_column: str) -> Dataset:
    """The same rows, their classes numbered in the order of `label_names`, which are those they
    have.

    Not the method of `datasets` for this: it takes names that differ in case only for the same.
    """
    index_of = {name: index for index, name in enumerate(label_names)}
    new_index = [index_of[name] for name in dataset.features[label_column].names]
    features = dataset.features.copy()
    features[label_column] = ClassLabel(names=label_names)
    return dataset.map(
        lambda labels: {label_column: [new_index[label] for label in labels]},
        input_columns=[label_column],
        batched=True,
        features=features,
    )


def require_decodable(dataset: Dataset, image_column: str) -> None:
    """Decodes every image of a split once, in threads: better now than after days of training.

    Raises:
        ValueError: naming images that cannot be decoded.
    """
    rows = dataset.with_format(None).select_columns([image_column])

    def problem(index: int) -> str | None:
        try:
            to_rgb(rows[index][image_column])
        except Exception as error:  # decoders raise what they like; an empty row has no attributes
            stored = rows.cast_column(image_column, Image(decode=False))[index][image_column] or {}
            return f"row {index} ({Path(stored.get('path') or '').name}): {type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        problems = [found for found in pool.map(problem, range(len(rows))) if found is not None]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{len(problems)} of {len(rows)} images to evaluate on cannot be decoded: "
            f"{'; '.join(problems[:5])}{more}. "
            "Repair them or take them out: accuracy is measured on all of them or not at all."
        )
