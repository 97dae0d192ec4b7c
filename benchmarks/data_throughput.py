"""Measure how many training images per second a CPU core prepares, in three pipelines.

    stream     `ImageStream`, used with `--streaming`: rows of parquet files pass through a
               shuffle buffer and are augmented
    map        `SeededImages`, used without it: rows of an Arrow table in random order, with the
               same augmentation
    processor  images of the same table through transformers' `ViTImageProcessorPil`: resized,
               rescaled, normalised

All three decode images and fill a plain DataLoader with batches at 224 pixels. They take turns, so
that load from other processes affects all of them: in every round each pipeline has one turn per
number of workers, and ratios compare turns of the same round. A turn starts its workers, waits for
the first batches, and only then starts its clock. Round 0 warms up and does not count.

    python benchmarks/data_throughput.py --data_dir PHOTOS

The clock measures the steady state, in which equally many images enter and leave a worker's
shuffle buffer. Data that is too small for that is read several times per epoch, through links in a
temporary folder. The time to fill the buffers is in `first batch`.

    per core   images/s divided by the number of workers; with 0 workers the loader's own process
               does the work and counts as one core
    per CPU s  images per second of CPU time of all processes: time that other programs took from
               the machine does not count
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import PIL
import psutil
import pyarrow.parquet as pq
import torch
import transformers
from torch.utils.data import DataLoader, default_collate
from transformers import ViTImageProcessorPil

from ofb_hf.data import (
    AugmentationArguments,
    DataArguments,
    ImageData,
    ImageStream,
    SeededImages,
    build_transform,
    load_image_data,
)
from ofb_hf.data.decoding import decode_image
from ofb_hf.data.transforms import AUGMENTATIONS

GPU_IMAGES_PER_SECOND = 2500
WARM_UP, PREFETCHED = 2, 2  # batches per worker; the latter is DataLoader's own number
OURS, THEIRS = "stream", ("map", "processor")
NOT_INCLUDED = "colour jitter"


@dataclass(frozen=True)
class Turn:
    """Rates of one pipeline in one turn: images per second, per CPU second; time to start."""

    rate: float
    cpu_rate: float
    first_batch: float


@dataclass(frozen=True)
class ProcessBatch:
    """Collate decoded rows of a data set with an image processor."""

    processor: Any
    image_column: str
    label_column: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return {"pixel_values": (B, 3, H, W), "labels": (B,)} for B rows."""
        images = [row[self.image_column].convert("RGB") for row in rows]
        labels = torch.tensor([row[self.label_column] for row in rows])
        return {**self.processor(images, return_tensors="pt"), "labels": labels}


@dataclass(frozen=True)
class Contest:
    """The same images, streamed and loaded, and the settings of their preparation."""

    streamed: ImageData
    loaded: ImageData
    processor: Any
    augmentation: str
    batch_size: int

    @property
    def transform(self) -> Any:
        """Return the transform of `stream` and `map`."""
        return build_transform(self.processor, self.augmentation, train=True)

    def loader(self, name: str, workers: int, epoch: int) -> DataLoader:
        """Return a loader of one pipeline and epoch, with its own order and random transforms."""
        if name == OURS:
            stream = ImageStream(self.streamed.train, self.transform, seed=0)
            stream.set_epoch(epoch)
            return stream.loader(self.batch_size, num_workers=workers)
        columns = (self.loaded.image_column, self.loaded.label_column)
        if name == "map":
            images, collate = (
                SeededImages(self.loaded.train, self.transform, *columns, seed=0),
                default_collate,
            )
            images.set_epoch(epoch)
        else:
            images, collate = (
                self.loaded.train.select_columns(list(columns)),
                ProcessBatch(self.processor, *columns),
            )
        return DataLoader(
            images, self.batch_size, shuffle=True, num_workers=workers, collate_fn=collate
        )


def link_files(data_dir: Path, folder: Path, wanted: int) -> None:
    """Link training files into a folder, repeated until they hold `wanted` rows.

    Raises:
        ValueError: if there are no parquet files of a training split.
    """
    builder = datasets.load_dataset_builder(str(data_dir))
    files = list((builder.config.data_files or {}).get("train", []))
    counts = (
        [pq.read_metadata(file).num_rows for file in files] if builder.name == "parquet" else []
    )
    if not sum(counts):
        raise ValueError(
            f"data_dir is {str(data_dir)!r}, which has no parquet files of a split `train`."
        )
    links, rows = [], 0
    for file, count in cycle(zip(files, counts, strict=True)):
        if rows >= wanted:
            break
        links.append(file)
        rows += count
    # The stream reads the class names from a second split; the same rows serve for that.
    for split, sources in (("train", links), ("test", sorted(set(links)))):
        for number, source in enumerate(sources):
            (folder / f"{split}-{number:05d}-of-{len(sources):05d}.parquet").symlink_to(
                Path(source).resolve()
            )


def prepare(args: argparse.Namespace, folder: Path) -> Contest:
    """Load the images twice, enough of them that no turn empties the stream's buffers."""
    (folder / "data").mkdir()
    # Everything that `datasets` writes is deleted with the folder.
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    workers, batches = max(1, *args.workers), num_batches(args)
    spare = args.batch_size * (WARM_UP + PREFETCHED) + DataArguments.shuffle_buffer
    link_files(args.data_dir, folder / "data", workers * spare + batches * args.batch_size)
    both = [
        load_image_data(
            DataArguments(
                data_dir=str(folder / "data"), augmentation=args.augmentation, streaming=streaming
            )
        )
        for streaming in (True, False)
    ]
    return Contest(*both, ViTImageProcessorPil(), args.augmentation, args.batch_size)


def num_batches(args: argparse.Namespace) -> int:
    """Return the number of timed batches of a turn."""
    return math.ceil(args.images / args.batch_size)


def take_turn(loader: DataLoader, batches: int) -> Turn:
    """Start a loader, wait until its workers are busy, time some batches and stop it."""
    began = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first_batch = time.perf_counter() - began
    for _ in range(WARM_UP * max(1, loader.num_workers) - 1):
        next(iterator)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    began, cpu_began = time.perf_counter(), cpu_seconds(processes)
    images = sum(len(batch["labels"]) for batch in islice(iterator, batches))
    seconds, cpu = time.perf_counter() - began, cpu_seconds(processes) - cpu_began
    return Turn(images / seconds, images / cpu, first_batch)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the CPU seconds that the processes have used so far."""
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


def compete(contest: Contest, args: argparse.Namespace) -> dict[int, dict[str, list[Turn]]]:
    """Return the counted turns by number of workers and pipeline.

    Each round begins with another pipeline.
    """
    names = [OURS, *THEIRS]
    turns = {workers: {name: [] for name in names} for workers in args.workers}
    for number in range(args.rounds + 1):
        for workers in args.workers:
            for name in names:
                turn = take_turn(contest.loader(name, workers, epoch=number), num_batches(args))
                turns[workers][name].append(turn)
        sys.stderr.write(f"round {number} of {args.rounds} done\n")
        names.append(names.pop(0))
    return {
        workers: {name: row[1:] for name, row in by_name.items()}
        for workers, by_name in turns.items()
    }


def operations(contest: Contest) -> dict[str, Callable[[list[Any]], list[Any]]]:
    """Return the operations on a batch in order; each takes the results of the one before."""
    transform = contest.transform
    if contest.augmentation == "deit":
        change_colors, transform.change_colors = transform.change_colors, lambda image: image
        steps = {"random resized crop, flip": transform.prepare, "RandAugment": change_colors}
    else:
        steps = {f"augmentation {contest.augmentation!r}": transform.prepare}
    steps = {"decode": lambda row: decode_image(row.image), **steps}
    steps["to tensor"] = lambda image: transform.to_tensor(np.asarray(image))
    by_image = {
        name: lambda items, step=step: [step(item) for item in items]
        for name, step in steps.items()
    }
    return by_image | {"collate": default_collate}


def break_down(contest: Contest, batches: int) -> dict[str, float]:
    """Return CPU seconds per image of the stream in one process, by operation.

    The whole pipeline and its operations take turns.
    """
    source = contest.streamed.train.source
    blocks = np.random.RandomState(0).permutation(len(source.rows)).tolist()
    rows = chain.from_iterable(source.read(block, 0) for block in cycle(blocks))
    jitter = AugmentationArguments(auto_augment="none")
    jitter = build_transform(
        contest.processor, "deit", train=True, augmentation_args=jitter
    ).change_colors
    whole, steps = iter(contest.loader(OURS, 0, epoch=0)), operations(contest)
    totals = dict.fromkeys(("all", "read", *steps, NOT_INCLUDED), 0.0)

    def timed(name: str, call: Callable[..., Any], *given: Any) -> Any:
        began = time.process_time()
        result = call(*given)
        totals[name] += time.process_time() - began
        return result

    for number in range(WARM_UP + batches):
        if number == WARM_UP:
            totals = dict.fromkeys(totals, 0.0)
        timed("all", next, whole)
        items = timed("read", take, rows, contest.batch_size)
        for name, step in steps.items():
            items = timed(name, step, items)
            if name.startswith(("random", "augmentation")):
                timed(NOT_INCLUDED, lambda images: [jitter(image) for image in images], items)
    seconds = {name: total / batches / contest.batch_size for name, total in totals.items()}
    whole_seconds, jitter_seconds = seconds.pop("all"), seconds.pop(NOT_INCLUDED)
    rest = whole_seconds - sum(seconds.values())
    return seconds | {"the rest": rest, "all": whole_seconds, NOT_INCLUDED: jitter_seconds}


def take(rows: Iterator[Any], count: int) -> list[Any]:
    """Return the next `count` items."""
    return list(islice(rows, count))


def summarise(turns: dict[int, dict[str, list[Turn]]], seconds: dict[str, float]) -> dict[str, Any]:
    """Return medians over rounds, and ratios within a round with their lowest and highest."""
    rates, ratios = [], []
    for workers, by_name in turns.items():
        for name, row in by_name.items():
            middle = {
                field.name: median(getattr(turn, field.name) for turn in row)
                for field in fields(Turn)
            }
            middle["per_core"] = middle["rate"] / max(1, workers)
            rates.append({"workers": workers, "contestant": name, **middle})
        for other in THEIRS:
            pairs = list(zip(by_name[OURS], by_name[other], strict=True))
            by_time, by_cpu = (
                [a.rate / b.rate for a, b in pairs],
                [a.cpu_rate / b.cpu_rate for a, b in pairs],
            )
            spread = {"ratio": median(by_time), "lowest": min(by_time), "highest": max(by_time)}
            ratios.append(
                {"workers": workers, "of": f"{OURS}/{other}", **spread, "cpu_ratio": median(by_cpu)}
            )
    cpu_rate = [row["cpu_rate"] for row in rates if row["contestant"] == OURS][-1]
    return {
        "rates": rates,
        "ratios": ratios,
        "seconds": seconds,
        "gpu_cores": GPU_IMAGES_PER_SECOND / cpu_rate,
    }


def table(summary: dict[str, Any]) -> str:
    """Return the summary as plain text."""
    lines = ["workers  contestant   images/s  per core  per CPU s  first batch"]
    for row in summary["rates"]:
        rates = f"{row['rate']:9.0f} {row['per_core']:9.0f} {row['cpu_rate']:10.0f}"
        start = f"{row['first_batch']:10.2f} s"
        lines.append(f"{row['workers']:7d}  {row['contestant']:<11} {rates} {start}")
    lines += ["", "workers  ratio of          images/s  (lowest, highest)  per CPU s"]
    for row in summary["ratios"]:
        spread = f"({row['lowest']:6.3f}, {row['highest']:7.3f})"
        ratios = f"{row['ratio']:8.3f}  {spread}  {row['cpu_ratio']:9.3f}"
        lines.append(f"{row['workers']:7d}  {row['of']:<17} {ratios}")
    lines += ["", "CPU time of the stream       us/image  fraction"]
    whole = summary["seconds"]["all"]
    for name, seconds in summary["seconds"].items():
        note = "  (instead of RandAugment; not in `all`)" if name == NOT_INCLUDED else ""
        lines.append(f"{name:<28} {1e6 * seconds:8.0f} {seconds / whole:7.1%}{note}")
    needed = f"needs {summary['gpu_cores']:.1f} cores like these for the stream."
    return "\n".join(
        [*lines, "", f"A GPU that trains on {GPU_IMAGES_PER_SECOND:,} images/s {needed}", ""]
    )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        required=True,
        help="folder with parquet files of a split `train`, e.g. train-*.parquet",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2048,
        help="smallest number of timed images in a turn (%(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="numbers of loader workers; no more than cores (0 1 2)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images of a batch (%(default)s)"
    )
    parser.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        default="deit",
        help="augmentation of `stream` and `map` (%(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file to write: the summary and every turn"
    )
    return parser.parse_args()


def main() -> None:
    """Measure and print; write a JSON file if --output names one."""
    args = parse()
    # A worker must use one core only, or `per core` would be wrong.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        contest = prepare(args, Path(folder))
        turns = compete(contest, args)
        summary = summarise(turns, break_down(contest, num_batches(args)))
    sys.stdout.write(table(summary))
    if args.output is not None:
        versions = {
            module.__name__: module.__version__ for module in (datasets, PIL, torch, transformers)
        }
        settings = {
            name: value for name, value in vars(args).items() if name not in ("data_dir", "output")
        }
        settings |= {
            "data": args.data_dir.resolve().name,
            "versions": {"python": platform.python_version(), **versions},
        }
        every_turn = {
            workers: {n: [vars(t) for t in row] for n, row in rows.items()}
            for workers, rows in turns.items()
        }
        args.output.write_text(
            json.dumps({"settings": settings, **summary, "turns": every_turn}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
