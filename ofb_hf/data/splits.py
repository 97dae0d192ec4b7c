"""A data set of labelled images with its two splits: dividing, limiting and checking them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from .columns import column_values
from .decoding import readable, why_unreadable
from .row_blocks import ImageTable

# Not the seed of a run: all runs on the same data are to be evaluated on the same images.
SPLIT_SEED = 0
MOST_NAMED = 5


@dataclass(frozen=True)
class ImageData:
    """Hold images to train on and to evaluate on.

    Attributes:
        name: the name of the data in reports: a Hub name, a folder's name or `digits`.
        train, eval: rows with an `Image` column and a `ClassLabel` column; every row has a label. A
            streamed training split is a `StreamedSplit` instead.
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
    """Divide rows at random, every class in proportion; the same labels are always divided alike.

    Args:
        labels: (N,) class indices.
        num_held_out: how many rows to hold out.

    Returns:
        Indices of the rows to keep, and of the rows to hold out.

    Raises:
        ValueError: unless both parts get at least one row.
    """
    if not 0 < num_held_out < len(labels):
        raise ValueError(
            f"{num_held_out} of {len(labels)} rows cannot be held out for evaluation; both parts "
            "need at least one row. Give more images, another --eval_share, or name an "
            "--eval_split."
        )
    classes = np.asarray(labels)
    # RandomState is the generator that numpy froze: its numbers do not depend on the version.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(classes))
    # Members of every class are spread evenly over [0, 1), so that a piece of this interval holds
    # the same fraction of each class.
    position = np.empty(len(classes))
    for label in np.unique(classes):
        members = order[classes[order] == label]
        count = len(members)
        position[members] = (np.arange(count) + 0.5) / count
    by_position = order[np.argsort(position[order], kind="stable")]
    return by_position[num_held_out:], by_position[:num_held_out]


def hold_out_share(dataset: Dataset, label_column: str, fraction: float) -> tuple[Dataset, Dataset]:
    """Return the rows of a split without a fraction of them, and that fraction; as `hold_out`."""
    labels = column_values(dataset, label_column)
    kept, held_out = hold_out(labels, max(1, round(fraction * len(labels))))
    return dataset.select(kept), dataset.select(held_out)


def limit(dataset: Dataset, num_samples: int | None) -> Dataset:
    """Return a random subset, always the same one; the whole data set if it is not larger.

    Args:
        num_samples: rows of the subset, None for no limit.
    """
    if num_samples is None or num_samples >= len(dataset):
        return dataset
    order = np.random.RandomState(SPLIT_SEED).permutation(len(dataset))
    return dataset.select(order[:num_samples])


def align_labels(dataset: Dataset, label_names: list[str], label_column: str) -> Dataset:
    """Return the same rows with their classes numbered in another order.

    Args:
        label_names: the classes of the data set, in the order of their new indices.
        label_column: the column to renumber.
    """
    # `Dataset.align_labels_with_mapping` takes names that differ in case only for the same class.
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
    """Decode every image of a split once, in threads; raise ValueError if any cannot be decoded.

    It is better to know before the days of training that come before the evaluation.
    """
    rows = ImageTable(dataset, image_column, label_column=None)

    def problem(index: int) -> str | None:
        row = rows[index]
        _, error = readable(row.image)
        return None if error is None else f"{row.name} ({why_unreadable(error)})"

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(problem, range(len(rows))))
    problems = [text for text in found if text is not None]
    if problems:
        named = "; ".join(problems[:MOST_NAMED])
        num_others = len(problems) - MOST_NAMED
        more = f" and {num_others} more" if num_others > 0 else ""
        raise ValueError(
            f"{len(problems)} of {len(rows)} images to evaluate on cannot be decoded: "
            f"{named}{more}. Repair them or take them out: accuracy is measured on all images."
        )
