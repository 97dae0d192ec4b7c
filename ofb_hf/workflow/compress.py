"""Compress a classifier without training: from a model and unlabeled images to an output folder."""

import time
from collections.abc import Hashable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cost.budget import UnreachableBudgetError
from ..cost.counting import count_cost
from ..data import ImageBatches, class_numbers, evaluated_rows, labelled_batches
from ..families.registry import describe
from ..frozen.compression import Compressed, FrozenCompressor
from ..pictures.curves import plot_curves
from ..pictures.plots import plot_accuracy_over_cost
from ..release.card import render_compressed_card
from ..training.full_precision import of_type
from . import output
from .agreement import DENSE, compare
from .compress_inputs import Compression, Progress, duration, named
from .measure import SPEED_BATCH, describe_size, images_per_second, lost_classes, provenance
from .report import budget_rows, markdown_table, results_rows, text_table
from .results import add_latency, fill_folder

logger = logging.get_logger(__name__)


def run_compress(compression: Compression) -> dict[str, Any]:
    """Compress to every budget, measure, and write the output folder when all of it is there.

    Returns:
        The content of `eval_results.json`; of several budgets that of `family.json`, subfolder ->
        its `eval_results.json`.

    Raises:
        UnreachableBudgetError: if no subnet fits any budget; one of several is only reported.
        ValueError: if the model gives out numbers that are not finite.
    """
    state = PartialState()
    is_shown = state.is_main_process and not compression.args.disable_tqdm
    progress = Progress(is_shown)
    configs = compression.configs
    # seconds of each step
    timings = {"loading": _elapsed(compression, {})}
    compressor = FrozenCompressor(
        compression.model,
        compression.batches,
        space=next(iter(configs.values())),
        basis=compression.basis,
        seed=compression.args.seed,
        progress=progress,
    )
    timings["measuring errors"] = _elapsed(compression, timings)
    done, refusals = _compressed(compression, compressor)
    progress.close()
    timings["choosing and fitting"] = _elapsed(compression, timings)
    results, images = _measured(compression, done, progress)
    timings["measuring the result"] = _elapsed(compression, timings)
    for result in results.values():
        result["seconds"] = round(time.monotonic() - compression.began)
        result["timings"] = timings
    if state.is_main_process:
        output.write_whole(compression.folder, partial(_write, compression, done, results))
        rows = budget_rows(results) if len(configs) > 1 else results_rows(*results.values())
        summary = "\n".join([*_conclusion(compression, results, images), *refusals])
        logger.warning("\n%s\n\n%s", text_table(rows), summary)
    return results if len(configs) > 1 else next(iter(results.values()))


def _compressed(
    compression: Compression, compressor: FrozenCompressor
) -> tuple[dict[str, Compressed], list[str]]:
    """Return what was compressed, by subfolder, and why other budgets are missing."""
    done: dict[str, Compressed] = {}
    refusals: list[str] = []
    for name, config in compression.configs.items():
        try:
            done[name] = compressor.compress(config)
        except UnreachableBudgetError as refusal:
            refusals.append(f"{name} is missing: {refusal}")
            # the last chance to leave anything
            if len(refusals) == len(compression.configs):
                raise
            continue
        # it was computed in float32
        done[name].model.to(compression.stored_type)
    return done, refusals


def _elapsed(compression: Compression, timings: dict[str, float]) -> float:
    """Return the seconds since the beginning that are not those of earlier steps."""
    return round(time.monotonic() - compression.began - sum(timings.values()), 2)


# ---------------------------------------------------------------------------------------- measuring


def _measured(
    compression: Compression, done: dict[str, Compressed], progress: Progress
) -> tuple[dict[str, dict[str, Any]], "Measuring"]:
    """Return subfolder -> content of its `eval_results.json`, and what was measured on."""
    models = {DENSE: compression.model}
    sizes = {DENSE: describe_size(of_type(compression.model, compression.stored_type))}
    for name, compressed in done.items():
        sizes[name] = describe_size(compressed.model)
        # what is measured are the weights as they are stored, computed in float32
        models[name] = of_type(compressed.model, torch.float32)
    images = Measuring(compression, progress)
    measured, by_class = compare(models, images)
    progress.close()
    # Other processes write nothing.
    is_main = PartialState().is_main_process
    if is_main:
        batch = ImageBatches(compression.drawn.levels, compression.transform, SPEED_BATCH)[0]
        for name, speed in images_per_second(models, batch).items():
            measured[name]["images_per_second"] = speed
    for name in models:
        measured[name] |= sizes[name]
    results = {}
    for name, compressed in done.items():
        results[name] = _results(compression, name, compressed, measured, images)
        lost: dict[str, list[float]] = {}
        if by_class:
            classes = _classes(compression.model)
            lost = lost_classes(by_class[DENSE], by_class[name], classes)
        results[name]["lost_classes"] = lost
        table = compression.configs[name].table
        if table is not None and is_main:
            pair = {DENSE: models[DENSE], "compressed": models[name]}
            add_latency(results[name], pair, table)
    return results, images


def _classes(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's classes, in the order of their numbers."""
    return [model.config.id2label[number] for number in range(model.config.num_labels)]


class Measuring:
    """The images that results are measured on, in batches with their classes as the model has them.

    Of several processes each has its part.

    Args:
        compression: which images.
        progress: is told of every batch.
    """

    def __init__(self, compression: Compression, progress: Progress):
        found, drawn = compression.found, compression.drawn
        self.compression = compression
        self.progress = progress
        self.skipped: list[str] = []
        self.remarks: list[str] = []
        images = found.pool if found.measured is None else found.measured
        classes: dict[Any, int] = {}
        if compression.model.config.num_labels:
            classes, remark = class_numbers(images, _classes(compression.model))
            if remark is not None:
                self.remarks.append(remark)
        self.class_of = classes
        if found.measured is None:
            self.count = compression.held_out
            self.what = "images that were held out"
        else:
            self.count = compression.num_measured
            self.numbers = evaluated_rows(len(found.measured), self.count)
            self.what = f"the split {found.measured_split}"
            if self.count < len(found.measured):
                self.what = f"a random part of {self.what}"
        self.labels = drawn.labels[compression.num_images :]

    def __iter__(self) -> Iterator[tuple[Tensor, list[int | None]]]:
        """Yield this process's batches."""
        state = PartialState()
        size = self.compression.args.batch_size
        starts = range(0, self.count, size)[state.process_index :: state.num_processes]
        for start in starts:
            # A batch whose images are all unreadable has none of them.
            for pixel_values, labels in self._batch(start, size):
                yield pixel_values, [self._class_of(label) for label in labels]
            self.progress("measuring the result", min(start + size, self.count), self.count)

    def _class_of(self, label: Any) -> int | None:
        """Return a label as the model numbers it; several labels of an image are none."""
        return self.class_of.get(label) if isinstance(label, Hashable) else None

    def _batch(self, start: int, size: int) -> Iterator[tuple[Tensor, list[Any]]]:
        found, transform = self.compression.found, self.compression.transform
        if found.measured is not None:
            numbers = self.numbers[start : start + size]
            yield from labelled_batches(found.measured, numbers, transform, size, self.skipped)
            return
        levels = self.compression.drawn.levels[self.compression.num_images :]
        (batch,) = ImageBatches(levels[start : start + size], transform, size)
        yield batch, self.labels[start : start + size]


def _results(
    compression: Compression,
    name: str,
    compressed: Compressed,
    measured: dict[str, dict[str, Any]],
    images: Measuring,
) -> dict[str, Any]:
    """Return the content of `eval_results.json` for one budget."""
    config = compression.configs[name]
    results: dict[str, Any] = {"target_macs": None, "target_params": None}
    dense_cost = count_cost(compression.model, config.terms)
    results[config.budget[0]] = config.absolute(config.target(dense_cost))
    results |= {DENSE: dict(measured[DENSE]), "compressed": measured[name]}
    results |= provenance(compression.args.seed, compression.model.device)
    # nothing is trained
    results["steps"] = {}
    results["source"] = compression.source
    results["data"] = compression.found.name
    results["num_images"] = compression.num_images
    results["held_out"] = compression.held_out
    results["measured_on"] = images.what
    results["skipped"] = len(compression.drawn.skipped)
    results["basis"] = compression.basis
    schedule = compressed.subnet.token_schedule
    if schedule is not None:
        results["token_schedule"] = schedule
    return results


# ------------------------------------------------------------------------------------------ writing


def _write(
    compression: Compression,
    done: dict[str, Compressed],
    results: dict[str, dict[str, Any]],
    folder: Path,
) -> None:
    """Fill a new folder with everything: one subfolder for each budget, if there are several."""
    settings = asdict(compression.args) | asdict(compression.image_args)
    several = len(compression.configs) > 1
    for name, compressed in done.items():
        place = folder / name if several else folder
        _write_one(compression, compressed, results[name], place)
        output.write_json(place / output.SETTINGS_FILE, settings)
    if several:
        output.write_json(folder / output.SETTINGS_FILE, settings)
        output.write_json(folder / output.BUDGETS_RESULTS, results)
        plot_accuracy_over_cost(results, folder / output.BUDGETS_PICTURE)
    if compression.args.keep_dense:
        # the same one for all budgets
        dense = next(iter(done.values())).dense
        dense.save_pretrained(folder / "dense")
        compression.processor.save_pretrained(folder / "dense")


def _write_one(
    compression: Compression, compressed: Compressed, results: dict[str, Any], folder: Path
) -> None:
    """Write one compressed model with all that is known about it."""
    errors = {name: curve.errors for name, curve in compressed.curves.items()}
    architecture = describe(compressed.dense.config)
    kinds = {submodule.name: submodule.kind for submodule in architecture.submodules}

    def draw_picture(path: Path) -> None:
        plot_curves(errors, kinds, compressed.subnet, architecture.sizes, path)

    table = markdown_table(results_rows(results))
    fill_folder(
        folder,
        compressed.model,
        compression.processor,
        results,
        card=render_compressed_card(results, compressed.subnet, table),
        subnet=compressed.subnet,
        pictures={output.COMPRESS_PICTURE: draw_picture},
    )


def _conclusion(
    compression: Compression, results: dict[str, dict[str, Any]], images: Measuring
) -> list[str]:
    """Return what is said when everything is done."""
    one = next(iter(results.values()))
    lines = [
        f"Measured on {images.what}. Nothing was trained, and no labels were used to compress "
        f"(images: {one['num_images']}, basis {one['basis']!r}, {duration(one['seconds'])})."
    ]
    if images.remarks:
        lines.append(f"Accuracy: {'; '.join(images.remarks)}.")
    if compression.drawn.skipped:
        lines.append(f"Skipped, as they cannot be decoded: {named(compression.drawn.skipped)}.")
    if images.skipped:
        lines.append(f"Not measured, as they cannot be decoded: {named(images.skipped)}.")
    lines.append(f"written to {compression.folder}")
    return lines
