"""Sources of streamed rows: blocks of known length, each of which can be read from any row on.

Exact epochs need the number of rows of every block. Parquet files have it in their footers, for
every row group. An image file is one row. The shards of any other format are counted once, or taken
to be equally long.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetBuilder, Image, IterableDataset, config
from datasets.features.features import FeatureType
from filelock import FileLock
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging

from ..durable import move
from ..hub_retries import WAITS_IN_A_RUN, patiently, wait_or_give_up
from .columns import column_values
from .completeness import (
    Survey,
    place_columns,
    sample_name,
    surveyed,
)

logger = logging.get_logger(__name__)

READERS = 16  # requests at a time, where only their latency is waited for
ROWS_AT_A_TIME = 32
FILES_AT_A_TIME = 1000
# Every read is one request for exactly these bytes: read-ahead would fetch the rows of another
# worker.
UNBUFFERED = {"cache_type": "none"}


@dataclass(frozen=True)
class Row:
    """Hold one example as it is stored.

    Args:
        image: content of the image file, None if that file is missing.
        label: the label as it is stored.
        name: the name of the file, or of the table and the row in it.
    """

    image: bytes | None
    label: Any
    name: str


class Source(Protocol):
    """Give rows in blocks."""

    rows: np.ndarray  # (blocks,) int64: the number of rows of every block

    def read(self, block: int, start: int) -> Iterator[Row]:
        """Yield the rows of a block from row `start` on, always in the same order."""


def read_patiently(source: Source, block: int, start: int) -> Iterator[Row]:
    """Yield what `source.read` yields, and continue after network faults where it broke off.

    No row is lost, and none comes twice.

    Raises:
        StreamBrokenError: if the network fails for longer than `WAITS_IN_A_RUN`.
    """
    attempt = 0
    while True:
        try:
            for row in source.read(block, start):
                start += 1
                attempt = 0
                yield row
            return
        except Exception as error:
            what = f"reading row {start} of block {block}"
            attempt = wait_or_give_up(error, attempt, what, WAITS_IN_A_RUN)


def first_rows(source: Source, count: int) -> Source:
    """Return the same blocks, with the first `count` of their rows only."""
    before = np.cumsum(source.rows) - source.rows
    return replace(source, rows=np.clip(count - before, 0, source.rows))


@dataclass(frozen=True)
class RowGroups:
    """Read parquet files, a block per row group: one request fetches its two columns."""

    rows: np.ndarray  # (blocks,)
    files: list[str]
    groups: list[tuple[int, int]]  # of every block: index of the file, row group in it
    footers: list[pq.FileMetaData]  # of every file
    columns: tuple[str, str]  # of images and labels

    @classmethod
    def of(cls, files: list[str], columns: tuple[str, str]) -> "RowGroups":
        """Read the footers of all files, several at a time."""
        stored = once_per_machine(
            "footers", files, len(files), lambda index: _read_footer(files[index])
        )
        footers = [pq.read_metadata(io.BytesIO(content)) for content in stored]
        groups = []
        rows = []
        for index, footer in enumerate(footers):
            for group in range(footer.num_row_groups):
                groups.append((index, group))
                rows.append(footer.row_group(group).num_rows)
        return cls(np.array(rows, dtype=np.int64), files, groups, footers, columns)

    def read(self, block: int, start: int) -> Iterator[Row]:
        """Yield the rows of a block, as `Source` describes."""
        index, group = self.groups[block]
        url = self.files[index]
        footer = self.footers[index]
        file_name = url.rpartition("/")[2]
        offset = sum(footer.row_group(earlier).num_rows for earlier in range(group))
        with _open(url) as file, pq.ParquetFile(file, metadata=footer, pre_buffer=True) as parquet:
            batches = parquet.iter_batches(
                ROWS_AT_A_TIME, [group], list(self.columns), use_threads=False
            )
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in islice(enumerate(rows), start, None):
                image, label = (row[column] for column in self.columns)
                yield stored_row(image, label, f"row {offset + number} of {file_name}")

    def survey(self) -> Survey:
        """Return what the labels of these files are, without reading an image."""
        used = {index for (index, _), rows in zip(self.groups, self.rows, strict=True) if rows}

        def surveyed_file(index: int) -> Survey:
            url = self.files[index]
            with _open(url) as file, pq.ParquetFile(file, metadata=self.footers[index]) as parquet:
                rows = parquet.read([self.columns[1]]).to_pylist()
            return surveyed(rows, self.columns, f" of {url.rpartition('/')[2]}")

        with ThreadPoolExecutor(READERS) as pool:
            read = partial(patiently, what="reading labels")
            parts = pool.map(lambda index: read(partial(surveyed_file, index)), sorted(used))
            return Survey.merged(list(parts))


@dataclass(frozen=True)
class ImageFiles:
    """Read image files of a list or a folder, each a block: an epoch's order is a full shuffle."""

    # All (files,). Arrow arrays, because a million Python strings would fill every worker.
    rows: np.ndarray
    paths: pa.ChunkedArray
    labels: pa.ChunkedArray

    @classmethod
    def of(cls, dataset: Dataset | IterableDataset, columns: tuple[str, str]) -> "ImageFiles":
        """Read the list of files, without the images."""
        image_column, label_column = columns
        paths = []
        labels = []
        for rows in dataset.iter(FILES_AT_A_TIME):
            # An empty row has no dict with a path, but None.
            names = [image and image["path"] for image in rows[image_column]]
            paths.append(pa.array(names, pa.string()))
            labels.append(pa.array(rows[label_column]))
        count = sum(map(len, paths))
        return cls(
            np.ones(count, dtype=np.int64), pa.chunked_array(paths), pa.chunked_array(labels)
        )

    def read(self, block: int, start: int) -> Iterator[Row]:
        """Yield the rows of a block, as `Source` describes."""
        if start == 0:
            path = self.paths[block].as_py()
            label = self.labels[block].as_py()
            yield stored_row(path, label, f"row {block}")


@dataclass(frozen=True)
class Shards:
    """Read any other format that `datasets` streams, e.g. WebDataset archives, a block per shard.

    With `equally_long`, `rows` is a guess: a longer shard is cut there, a shorter one is read again
    from its beginning.
    """

    rows: np.ndarray  # (shards,)
    dataset: IterableDataset
    columns: tuple[str, str]  # of images and labels
    equally_long: bool
    found: Survey | None = None  # if they were all read once

    @classmethod
    def of(
        cls,
        dataset: IterableDataset,
        files: list[str],
        columns: tuple[str, str],
        num_examples: int | None,
        wanted: int | None,
        described: int | None,
    ) -> "Shards":
        """Count the rows of the shards, unless `num_examples` says how many there are in all.

        Args:
            dataset: the stream of the split.
            files: the files of the shards; the counts are kept under their names.
            columns: of images and labels.
            num_examples: how many rows there are, None if unknown.
            wanted: only the first `wanted` rows are needed, None for all.
            described: how many rows there are by the description of the data, for the message.
        """
        count = dataset.num_shards
        if num_examples is not None:
            bounds = np.arange(count + 1) * num_examples // count
            return cls(np.diff(bounds), dataset, columns, equally_long=True)
        if wanted is not None:
            rows = _count_until(dataset, columns[1], wanted)
            return cls(rows, dataset, columns, equally_long=False)
        logger.warning(
            f"{count} shards have no index: they are all read once, to count their rows and to "
            f"see their labels. --num_train_examples {described or 'N'} would take that as the "
            "number, and the shards as equally long."
        )
        stored = once_per_machine(
            "samples",
            files,
            count,
            lambda shard: _survey(dataset, shard, columns).to_json(),
            about=" ".join(columns),
        )
        surveys = list(map(Survey.from_json, stored))
        rows = np.array([survey.rows for survey in surveys])
        return cls(rows, dataset, columns, equally_long=False, found=Survey.merged(surveys))

    def read(self, block: int, start: int) -> Iterator[Row]:
        """Yield the rows of a block, as `Source` describes."""
        shard = self.dataset.shard(self.dataset.num_shards, block)
        passed = 0
        while True:
            before = passed
            # `iter`, because plain iteration in a loader's worker would divide the shards among
            # the workers once more.
            for number, rows in enumerate(shard.iter(1)):
                if passed >= start:
                    row = {column: values[0] for column, values in rows.items()}
                    yield named_row(row, self.columns, f"row {number} of shard {block}")
                passed += 1
            is_empty = passed == before
            if not self.equally_long or is_empty:
                return


def open_source(
    builder: DatasetBuilder,
    split: str,
    dataset: IterableDataset,
    columns: tuple[str, str],
    num_examples: int | None = None,
    wanted: int | None = None,
) -> Source:
    """Return the rows of a split, by the format of its files.

    Args:
        builder: knows the format and the files of the data set.
        split: the name of the split.
        dataset: its stream.
        columns: of images and labels.
        num_examples: how many rows there are, where the format does not say it.
        wanted: only the first `wanted` rows are used, None for all.

    Raises:
        ValueError: if the files say that there are not `num_examples` rows.
        StreamBrokenError: if the files cannot be read.
    """
    files = list(builder.config.data_files[split])
    description = (builder.info.splits or {}).get(split)
    described = description.num_examples if description is not None else None
    # The images are decoded by us: `datasets` would stop at the first bad one.
    dataset = dataset.select_columns([*columns, *place_columns(dataset.column_names)])
    dataset = dataset.cast_column(columns[0], Image(decode=False))
    if builder.name == "parquet":
        source = RowGroups.of(files, columns)
    elif builder.name == "imagefolder":
        source = patiently(lambda: ImageFiles.of(dataset, columns), "listing the images")
    else:
        source = Shards.of(dataset, files, columns, num_examples, wanted, described)
    return _limited(source, split, num_examples, wanted, described)


def survey_labels(source: Source, feature: FeatureType) -> Survey | None:
    """Return what the labels of a stream are, None where that is first known when it is read.

    Args:
        source: the rows.
        feature: the type of the label column.
    """
    # A `ClassLabel` knows its classes, and reading the labels of a large data set takes a while.
    if isinstance(source, RowGroups) and not isinstance(feature, ClassLabel):
        return source.survey()
    return source.found if isinstance(source, Shards) else None


def open_files(
    dataset: Dataset,
    split: str,
    columns: tuple[str, str],
    num_examples: int | None = None,
    wanted: int | None = None,
) -> Source:
    """Return the rows of a split of image files; arguments and errors as of `open_source`."""
    encoded = dataset.select_columns(list(columns)).cast_column(columns[0], Image(decode=False))
    return _limited(ImageFiles.of(encoded, columns), split, num_examples, wanted, None)


def _limited(
    source: Source, split: str, num_examples: int | None, wanted: int | None, described: int | None
) -> Source:
    """Return the first rows of a source, after its number of rows was compared with others."""
    found = int(source.rows.sum())
    if num_examples not in (None, found):
        raise ValueError(
            f"num_train_examples is {num_examples}, but the files of split {split!r} say that "
            f"there are {found}; leave it out."
        )
    if wanted is not None:
        return first_rows(source, wanted)
    if described not in (None, found):
        logger.warning(
            f"split {split!r} has {found} rows, though its description says {described}; all "
            f"{found} are used."
        )
    return source


def once_per_machine(
    kind: str, files: list[str], count: int, compute: Callable[[int], bytes], about: str = ""
) -> list[bytes]:
    """Compute one value per index, in one process of a machine, and keep the values on the disk.

    The other processes wait, and they and later runs read the values from the cache of `datasets`.

    Args:
        kind: what is computed, for the name of the cache file and for messages.
        files: what the values are computed from; another content gives another cache file.
        count: how many values there are.
        compute: from an index to a value. It runs in threads, and again after network faults.
        about: what else the values depend on.

    Returns:
        `[compute(0), ..., compute(count - 1)]`
    """

    def compute_one(index: int) -> bytes:
        return patiently(lambda: compute(index), f"reading {kind}")

    def compute_all() -> list[bytes]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(compute_one, range(count)))

    identities = [_identity(file) for file in files]
    if None in identities:
        return compute_all()
    key = "\n".join([kind, str(count), *identities, *([about] if about else [])])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = Path(config.HF_DATASETS_CACHE) / "ofb_hf"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{digest}.parquet"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            # Renamed when it is complete: a kill leaves no half of a cache file.
            aside = path.with_suffix(".aside")
            values = pa.array(compute_all(), pa.binary())
            pq.write_table(pa.table({kind: values}), aside)
            move(aside, path)
        return pq.read_table(path)[kind].to_pylist()


def _identity(url: str) -> str | None:
    """Return a name of a file and its content; None if the content may change under that name."""
    if "://" in url:
        # hf://datasets/NAME@REVISION/... names a commit.
        return url if url.startswith("hf://") and "@" in url else None
    stat = os.stat(url)
    return f"{url} {stat.st_size} {stat.st_mtime_ns}"


def _count(dataset: IterableDataset, shard: int, label_column: str) -> int:
    # Without the image column, images are not even read where the format allows it.
    rows = dataset.shard(dataset.num_shards, shard)
    labels = rows.select_columns([label_column])
    return sum(len(some[label_column]) for some in labels.iter(ROWS_AT_A_TIME))


def _survey(dataset: IterableDataset, shard: int, columns: tuple[str, str]) -> Survey:
    places = place_columns(dataset.column_names)
    # Archives are read as a whole in any case; other formats can leave the images out.
    names = [*columns, *places] if places else [columns[1]]
    rows = dataset.shard(dataset.num_shards, shard).select_columns(names)

    def stored() -> Iterator[dict[str, Any]]:
        for some in rows.iter(ROWS_AT_A_TIME):
            for values in zip(*(some[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))

    return surveyed(stored(), columns, f" of shard {shard}")


def _count_until(dataset: IterableDataset, label_column: str, enough: int) -> np.ndarray:
    """Return the rows of the first shards that hold enough together, 0 for others: (shards,)."""
    rows = np.zeros(dataset.num_shards, dtype=np.int64)
    for shard in range(len(rows)):
        if rows.sum() >= enough:
            break
        count = partial(_count, dataset, shard, label_column)
        rows[shard] = patiently(count, f"counting shard {shard}")
    return rows


def _read_footer(url: str) -> bytes:
    # Written again as bytes, because the threads' results are kept in a file.
    footer = io.BytesIO()
    with _open(url) as file:
        pq.read_metadata(file).write_metadata_file(footer)
    return footer.getvalue()


def _open(url: str) -> Any:
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.open(path, "rb", **UNBUFFERED)


def stored_row(image: Any, label: Any, name: str) -> Row:
    """Return a row, and read the image's file if the table has only its path.

    Args:
        image: as it is stored: a dict of bytes and path, the bytes alone, or the path alone.
        label: as it is stored.
        name: of the row, where there is no path to name it.
    """
    content: bytes | None = None
    path: str | None = None
    if isinstance(image, dict):
        content = image.get("bytes")
        path = image.get("path")
    elif isinstance(image, str):
        path = image
    else:
        content = image
    if content is None and path is not None:
        try:
            with open(path, "rb") if "://" not in path else fsspec.open(path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, PermissionError, EntryNotFoundError):
            content = None  # a bad image, which is counted and replaced
    return Row(content, label, path or name)


def named_row(row: dict[str, Any], columns: Sequence[str], name: str) -> Row:
    """Return a row of a table, or of an archive under the name of its sample.

    Args:
        row: as it is stored.
        columns: of the image, and of the label if there is one.
        name: of the row, where nothing else names it.
    """
    label = row[columns[1]] if len(columns) > 1 else None
    stored = stored_row(row[columns[0]], label, name)
    return replace(stored, name=sample_name(row, columns) or stored.name)


class ImageTable(Sequence[Row]):
    """Rows of a data set, whose images are not decoded.

    Args:
        dataset: the rows.
        image_column: column with the images.
        label_column: column with the labels, None if there is none.
    """

    def __init__(self, dataset: Dataset, image_column: str, label_column: str | None):
        names = [image_column] if label_column is None else [image_column, label_column]
        # The others are dropped, because reading a row would decode their images.
        rows = dataset.with_format(None)
        rows = rows.select_columns([*names, *place_columns(dataset.column_names)])
        self.dataset = rows.cast_column(image_column, Image(decode=False))
        self.columns = names
        self.label_column = label_column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return named_row(self.dataset[int(index)], self.columns, f"row {index}")

    def label_names(self) -> list[str] | None:
        """Return the names that labels are indices of, if their column knows them."""
        if self.label_column is None:
            return None
        feature = self.dataset.features[self.label_column]
        return feature.names if isinstance(feature, ClassLabel) else None

    def labels(self) -> set[Any]:
        """Return all labels, as they are stored; none if they are no single values."""
        if self.label_column is None:
            return set()
        values = column_values(self.dataset, self.label_column)
        return {value for value in values if isinstance(value, int | str)}
