"""Where streamed rows come from: blocks of known length, each read from any row on.

Exact epochs need the number of rows of every block. The footers of parquet files say it for their
row groups, an image file is one row, and the shards of any other format are counted once (or taken
to be equally long).
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetBuilder, Image, IterableDataset, config
from filelock import FileLock
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging

from ..hub_retries import WAITS_IN_A_RUN, patiently, wait_or_give_up

logger = logging.get_logger(__name__)

READERS = 16  # requests at a time, while nothing but their latency is waited for
ROWS_AT_A_TIME = 32
FILES_AT_A_TIME = 1000
# Every read is one request for exactly these bytes: what read-ahead would fetch belongs to another
# worker.
UNBUFFERED = {"cache_type": "none"}


@dataclass(frozen=True)
class Row:
    """One example as it is stored.

    Args:
        image: content of the image file, None if that file is missing.
        label: as stored; name: of the file, or of the table and the row in it.
    """

    image: bytes | None
    label: Any
    name: str


class Source(Protocol):
    """Rows in blocks. `rows` (blocks,) int64 says how many each holds."""

    rows: np.ndarray

    def read(self, block: int, start: int) -> Iterator[Row]:
        """The rows of a block from the `start`-th on, always in the same order."""


def read_patiently(source: Source, block: int, start: int) -> Iterator[Row]:
    """`source.read`, which goes on after network faults where it broke off: no row is lost, none
    comes twice.

    Raises:
        StreamBrokenError: if the network fails for longer than `WAITS_IN_A_RUN`.
    """
    attempt = 0
    while True:
        try:
            for row in source.read(block, start):
                start, attempt = start + 1, 0
                yield row
            return
        except Exception as error:
            attempt = wait_or_give_up(
                error, attempt, f"reading row {start} of block {block}", WAITS_IN_A_RUN
            )


def first_rows(source: Source, count: int) -> Source:
    """The same blocks, of whose rows only the first `count` are used."""
    before = np.cumsum(source.rows) - source.rows
    return replace(source, rows=np.clip(count - before, 0, source.rows))


@dataclass(frozen=True)
class RowGroups:
    """Parquet files, a block per row group: one request fetches it, and only these two of its
    columns."""

    rows: np.ndarray
    files: list[str]
    groups: list[tuple[int, int]]
    footers: list[pq.FileMetaData]
    columns: tuple[str, str]

    @classmethod
    def of(cls, files: list[str], columns: tuple[str, str]) -> "RowGroups":
        """Reads the footers of the files, all at once."""
        stored = once_per_machine(
            "footers", files, len(files), lambda index: _read_footer(files[index])
        )
        footers = [pq.read_metadata(io.BytesIO(footer)) for footer in stored]
        groups = [
            (file, group)
            for file, footer in enumerate(footers)
            for group in range(footer.num_row_groups)
        ]
        rows = np.array(
            [footers[file].row_group(group).num_rows for file, group in groups], dtype=np.int64
        )
        return cls(rows, files, groups, footers, columns)

    def read(self, block: int, start: int) -> Iterator[Row]:
        """See `Source`."""
        index, group = self.groups[block]
        url, footer = self.files[index], self.footers[index]
        offset = sum(footer.row_group(earlier).num_rows for earlier in range(group))
        with _open(url) as file, pq.ParquetFile(file, metadata=footer, pre_buffer=True) as parquet:
            batches = parquet.iter_batches(
                ROWS_AT_A_TIME, [group], list(self.columns), use_threads=False
            )
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in islice(enumerate(rows), start, None):
                image, label = (row[column] for column in self.columns)
                yield _row(image, label, f"row {offset + number} of {url.rpartition('/')[2]}")


@dataclass(frozen=True)
class ImageFiles:
    """Image files that a list or a folder names, a block each: an epoch's order is a full
    shuffle."""

    rows: np.ndarray
    paths: pa.ChunkedArray
    labels: pa.ChunkedArray

    @classmethod
    def of(cls, dataset: IterableDataset, columns: tuple[str, str]) -> "ImageFiles":
        """Reads the list; the images themselves wait until they are needed."""
        (image_column, label_column), paths, labels = columns, [], []
        for rows in dataset.iter(FILES_AT_A_TIME):
            paths.append(
                pa.array([image and image["path"] for image in rows[image_column]], pa.string())
            )
            labels.append(pa.array(rows[label_column]))
        return cls(
            np.ones(sum(map(len, paths)), dtype=np.int64),
            pa.chunked_array(paths),
            pa.chunked_array(labels),
        )

    def read(self, block: int, start: int) -> Iterator[Row]:
        """See `Source`."""
        if start == 0:
            yield _row(self.paths[block].as_py(), self.labels[block].as_py(), f"row {block}")


@dataclass(frozen=True)
class Shards:
    """Whatever else `datasets` streams, e.g. WebDataset archives, a block per shard.

    With `equally_long`, `rows` is a guess: a longer shard is cut there, a shorter one starts over.
    """

    rows: np.ndarray
    dataset: IterableDataset
    columns: tuple[str, str]
    equally_long: bool

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
        """Counts the rows of the shards, unless `num_examples` says how many there are in all.

        Args:
            files: what the shards are made of; the counts are kept under their names.
            wanted: the first so many rows will do.
            described: how many there are by the description of the data, to be mentioned.
        """
        count = dataset.num_shards
        if num_examples is not None:
            rows = np.diff(np.arange(count + 1) * num_examples // count)
            return cls(rows, dataset, columns, equally_long=True)
        if wanted is not None:
            return cls(
                _count_until(dataset, columns[1], wanted), dataset, columns, equally_long=False
            )
        logger.warning(
            f"{count} shards have no index: they are all read once, to count their rows. "
            f"--num_train_examples {described or 'N'} would take that as the number, and the "
            f"shards as equally long."
        )
        counts = once_per_machine(
            "rows", files, count, lambda shard: b"%d" % _count(dataset, shard, columns[1])
        )
        return cls(
            np.array([int(number) for number in counts]), dataset, columns, equally_long=False
        )

    def read(self, block: int, start: int) -> Iterator[Row]:
        """See `Source`."""
        # `iter`, because plain iteration in a loader's worker divides the shards among workers once
        # more.
        shard, passed = self.dataset.shard(self.dataset.num_shards, block), 0
        while True:
            before = passed
            for number, rows in enumerate(shard.iter(1)):
                if passed >= start:
                    image, label = (rows[column][0] for column in self.columns)
                    yield _row(image, label, f"row {number} of shard {block}")
                passed += 1
            if not self.equally_long or passed == before:
                return


def open_source(
    builder: DatasetBuilder,
    split: str,
    dataset: IterableDataset,
    columns: tuple[str, str],
    num_examples: int | None = None,
    wanted: int | None = None,
) -> Source:
    """The rows of a split, by the format of its files.

    Args:
        builder: which knows the files; dataset: its stream of the split; columns: of images and of
            labels.
        num_examples: how many rows there are, where the format does not say it.
        wanted: only the first so many of them.

    Raises:
        ValueError: if the files say that there are not `num_examples` rows.
        StreamBrokenError: if they cannot be read.
    """
    files, described = (
        list(builder.config.data_files[split]),
        (builder.info.splits or {}).get(split),
    )
    described = described.num_examples if described is not None else None
    dataset = dataset.select_columns(list(columns)).cast_column(columns[0], Image(decode=False))
    if builder.name not in ("parquet", "imagefolder"):
        source = Shards.of(dataset, files, columns, num_examples, wanted, described)
    elif builder.name == "parquet":
        source = RowGroups.of(files, columns)
    else:
        source = patiently(lambda: ImageFiles.of(dataset, columns), "listing the images")
    found = int(source.rows.sum())
    if num_examples not in (None, found):
        raise ValueError(
            f"num_train_examples is {num_examples}, but the files of split {split!r} say that "
            f"there are {found}; leave "
            "it out."
        )
    if wanted is not None:
        return first_rows(source, wanted)
    if described not in (None, found):
        logger.warning(
            f"split {split!r} has {found} rows, though its description says {described}; {found} "
            f"it is."
        )
    return source


def once_per_machine(
    kind: str, files: list[str], count: int, compute: Callable[[int], bytes]
) -> list[bytes]:
    """`compute(0), ..., compute(count - 1)`, computed by one process of a machine and kept in the
    cache of `datasets`.

    The others wait for it, and later runs on the same files find it there. It is computed in
    threads and repeated after network faults.
    """

    def compute_all() -> list[bytes]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(
                pool.map(
                    lambda index: patiently(lambda: compute(index), f"reading {kind}"), range(count)
                )
            )

    identities = [_identity(file) for file in files]
    if None in identities:
        return compute_all()
    digest = hashlib.sha256("\n".join([kind, str(count), *identities]).encode()).hexdigest()[:32]
    path = Path(config.HF_DATASETS_CACHE) / "ofb_hf" / f"{kind}-{digest}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            aside = path.with_suffix(".aside")
            pq.write_table(pa.table({kind: pa.array(compute_all(), pa.binary())}), aside)
            aside.replace(path)
        return pq.read_table(path)[kind].to_pylist()


def _identity(url: str) -> str | None:
    """Names a file and its content; None if the content may change under this name."""
    if "://" in url:
        return url if url.startswith("hf://") and "@" in url else None
    stat = os.stat(url)
    return f"{url} {stat.st_size} {stat.st_mtime_ns}"


def _count(dataset: IterableDataset, shard: int, label_column: str) -> int:
    labels = dataset.shard(dataset.num_shards, shard).select_columns([label_column])
    return sum(len(rows[label_column]) for rows in labels.iter(ROWS_AT_A_TIME))


def _count_until(dataset: IterableDataset, label_column: str, enough: int) -> np.ndarray:
    """Rows of the first shards that hold enough; 0 for the others."""
    rows = np.zeros(dataset.num_shards, dtype=np.int64)
    for shard in range(len(rows)):
        if rows.sum() >= enough:
            break
        rows[shard] = patiently(
            lambda shard=shard: _count(dataset, shard, label_column), f"counting shard {shard}"
        )
    return rows


def _read_footer(url: str) -> bytes:
    footer = io.BytesIO()
    with _open(url) as file:
        pq.read_metadata(file).write_metadata_file(footer)
    return footer.getvalue()


def _open(url: str) -> Any:
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.open(path, "rb", **UNBUFFERED)


def _row(image: Any, label: Any, name: str) -> Row:
    """A row from an image as it is stored: a dict of bytes and path, the bytes alone, or the path
    alone."""
    content, path = (
        (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    )
    if isinstance(content, str):
        content, path = None, content
    if content is None and path is not None:
        try:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, EntryNotFoundError):
            content = None
    return Row(content, label, path or name)
