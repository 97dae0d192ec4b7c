"""Compress a classifier without training: from a model and unlabeled images to an output folder."""

import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cost.budget import UnreachableBudgetError
from ..cost.counting import count_cost, evaluate_terms
from ..data import (
    FoundImages,
    ImageArguments,
    ImageBatches,
    ImageTransform,
    build_transform,
    class_numbers,
    cropping,
    draw,
    evaluated_rows,
    find_images,
    labelled_batches,
)
from ..data.drawing import Drawn
from ..families.description import quantities
from ..families.loading import load_classifier_or_features
from ..families.registry import describe, family_of, require_classifier
from ..families.token_reduction import with_fewest_tokens
from ..frozen.compression import Compressed, FrozenCompressor, frozen_config
from ..pictures.curves import plot_curves
from ..pictures.plots import plot_accuracy_over_cost
from ..release.card import render_compressed_card
from ..space.configuration import BiMaskConfig
from . import output
from .agreement import DENSE, compare
from .arguments import CompressArguments
from .inputs import load_image_processor, require_findable, require_same_size
from .latency_table import warn_if_elsewhere
from .measure import (
    SECONDS_PER_ROUND,
    SPEED_ROUNDS,
    describe_size,
    images_per_second,
    lost_classes,
    provenance,
)
from .report import budget_rows, markdown_table, results_rows, text_table
from .results import fill_folder, source_of

logger = logging.get_logger(__name__)

# Of the drawn images, what is held out to measure on if there is no split for that: a part, at
# most as many as that.
HELD_OUT = 5
MOST_HELD_OUT = 128
# What measuring and the first budget take, in forward passes of the given model over the images.
PASSES = 12
# What each further budget takes.
PASSES_PER_BUDGET = 6
MOST_NAMED = 5
SPEED_BATCH = 32
# What it takes to measure the speed of a model.
SECONDS_OF_SPEED = (SPEED_ROUNDS + 1) * SECONDS_PER_ROUND
# Step of the compressor -> what the progress bar calls it.
STEPS = {"measuring": "measuring errors"}


@dataclass(kw_only=True)
class Compression:
    """Hold what a compression needs after everything was checked.

    Attributes:
        args, image_args: of the command line.
        model: as it was given, in float32 and evaluation mode.
        stored_type: of its checkpoint, and of the result.
        processor: its image processor.
        source: where it comes from, as `results.source_of` returns it.
        configs: subfolder -> budget.
        basis: of the cut.
        found: where the images come from.
        drawn: the images.
        held_out: how many of them, the last ones, are for measuring.
        transform: makes tensors of images.
        began: `time.monotonic()` at the beginning, in seconds.
    """

    args: CompressArguments
    image_args: ImageArguments
    model: PreTrainedModel
    stored_type: torch.dtype
    processor: Any
    source: dict[str, str | None]
    configs: dict[str, BiMaskConfig]
    basis: str
    found: FoundImages
    drawn: Drawn
    held_out: int
    transform: ImageTransform
    began: float

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @property
    def num_images(self) -> int:
        """How many images errors are measured on and weights are fitted to."""
        return len(self.drawn) - self.held_out

    @property
    def batches(self) -> ImageBatches:
        """Those images."""
        levels = self.drawn.levels[: self.num_images]
        return ImageBatches(levels, self.transform, self.args.batch_size)


class Progress:
    """Show one progress bar after the other, on the main process.

    Args:
        is_shown: whether to show anything.
    """

    def __init__(self, is_shown: bool):
        self._is_shown = is_shown
        self._step: str | None = None
        self._bar: tqdm | None = None

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show how far a step is; a new name begins a new bar."""
        if not self._is_shown:
            return
        if step != self._step or done < self._bar.n:
            self.close()
            self._step = step
            # a file gets a line now and then
            wait = 0.1 if sys.stderr.isatty() else 5.0
            self._bar = tqdm(total=total, desc=STEPS.get(step, step), mininterval=wait)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the last bar."""
        if self._bar is not None:
            self._bar.close()


def prepare(args: CompressArguments, image_args: ImageArguments) -> Compression:
    """Load the model, draw the images and check that everything goes together. Write nothing.

    Raises:
        ValueError: for whatever cannot work, with an explanation.
    """
    began = time.monotonic()
    name = args.model_name_or_path
    require_findable(name)
    output.require_free(Path(args.output_dir), args.overwrite_output_dir)
    state = PartialState(cpu=args.use_cpu)
    found = find_images(image_args)
    processor = load_image_processor(name)
    transform = build_transform(
        processor, "none", train=False, eval_crop_pct=image_args.eval_crop_pct
    )
    model = load_classifier_or_features(name)
    require_classifier(model)
    stored_type = model.dtype
    require_same_size(name, model, (transform.height, transform.width))
    configs: dict[str, BiMaskConfig] = {}
    for folder, fields in args.by_budget().items():
        configs[folder] = frozen_config(model.config, **fields)
        _require_reachable(model, configs[folder])
    warn_if_elsewhere(next(iter(configs.values())).table, state.device)
    basis = allowed_basis(model, args.basis)
    progress = Progress(state.is_main_process and not args.disable_tqdm)
    wanted = min(image_args.num_images, len(found.pool))
    drawn = draw(
        found.pool,
        image_args.num_images,
        transform,
        args.seed,
        lambda done: progress("reading images", done, wanted),
    )
    progress.close()
    held_out = 0
    if found.measured is None:
        held_out = max(1, min(MOST_HELD_OUT, len(drawn) // HELD_OUT))
    if len(drawn) - held_out < 1:
        raise ValueError(
            f"{found.name} has {len(drawn)} readable image; give at least two, one of them to "
            "measure the result on."
        )
    if image_args.eval_crop_pct is not None:
        # What is saved with the result prepares images as they were prepared here.
        processor = cropping(processor, image_args.eval_crop_pct)
    compression = Compression(
        args=args,
        image_args=image_args,
        model=model.float().eval().to(state.device),
        stored_type=stored_type,
        processor=processor,
        source=source_of(name, model),
        configs=configs,
        basis=basis,
        found=found,
        drawn=drawn,
        held_out=held_out,
        transform=transform,
        began=began,
    )
    seconds = _seconds_of_a_pass(compression)
    if state.is_main_process:
        logger.warning("%s", "\n".join(_introduction(compression, seconds)))
    return compression


def _require_reachable(model: PreTrainedModel, config: BiMaskConfig) -> None:
    """Raise ValueError for a budget above the model, or certainly below its smallest subnet."""
    architecture = describe(model.config)
    target = config.target(
        evaluate_terms(config.terms(architecture), quantities(architecture.sizes))
    )
    sizes = dict(architecture.sizes)
    for space in config.search_space(model.config):
        sizes[space.name] = space.sizes[0]
    if config.search_tokens:
        architecture = with_fewest_tokens(model.config)
    smallest = evaluate_terms(config.terms(architecture), quantities(sizes))
    if smallest > target:
        raise UnreachableBudgetError(
            f"{config.budget[0]} is {config.budget[1]:,}, a budget of {config.show(target)}, and "
            f"the smallest that can be left of this model costs {config.show(smallest)}; raise "
            "the budget.",
            smallest,
        )


def allowed_basis(model: PreTrainedModel, wanted: str | None) -> str:
    """Return the basis of a cut: the one that the user named, or the freest that is allowed.

    Raises:
        ValueError: if the architecture does not allow the named one, saying why.
    """
    bases = family_of(model.config).bases(model.config)
    if wanted is None:
        if bases.streams:
            return "equivalent"
        return "heads" if bases.heads else "given"
    if wanted == "equivalent" and not bases.streams:
        reasons = "; ".join(f"{name}: {why}" for name, why in bases.fixed.items())
        raise ValueError(
            f"--basis is 'equivalent', but no residual stream of this {type(model).__name__} may "
            f"be rewritten ({reasons or 'it has none'}). Give 'heads', or leave it out."
        )
    if wanted != "given" and not bases.heads:
        raise ValueError(
            f"--basis is {wanted!r}, but the heads of this {type(model).__name__} may not be "
            "rewritten. Give 'given', or leave it out."
        )
    return wanted


@torch.no_grad()
def _seconds_of_a_pass(compression: Compression) -> float:
    """Return how long the given model takes for all images; check that its outputs are finite."""
    model = compression.model
    batch = compression.batches[0].to(model.device)
    # The first call is slower than all others.
    outputs = model(pixel_values=batch).logits
    if not bool(outputs.isfinite().all()):
        raise ValueError(
            f"the outputs of {compression.args.model_name_or_path} are not finite; check the "
            "checkpoint and how its image processor normalizes."
        )
    began = time.perf_counter()
    float(model(pixel_values=batch).logits.sum())  # waits for a GPU
    seconds = time.perf_counter() - began
    share = seconds / len(batch) / PartialState().num_processes
    return share * compression.num_images


def _introduction(compression: Compression, seconds: float) -> list[str]:
    """Return what is said before the work begins."""
    drawn, found = compression.drawn, compression.found
    wanted = compression.image_args.num_images
    lines = [f"{found.name}: {len(drawn)} images of {len(found.pool):,}, without labels."]
    if len(drawn) < wanted:
        lines[0] = (
            f"{found.name}: all {len(drawn)} images that can be decoded ({wanted} were asked "
            "for), without labels."
        )
    if drawn.skipped:
        lines.append(f"Skipped, as they cannot be decoded: {_named(drawn.skipped)}.")
    measured = f"the split {found.measured_split}"
    if compression.held_out:
        measured = f"{compression.held_out} of these images, which are held out"
    lines.append(f"The result is measured on {measured}.")
    if not compression.model.config.num_labels:
        lines.append(
            "The checkpoint has no classification head: its features decide, and the result gives "
            "out features, too."
        )
    if compression.stored_type != torch.float32:
        stored = str(compression.stored_type).removeprefix("torch.")
        lines.append(f"Weights are stored in {stored}: computed in float32, stored as given.")
    passes = PASSES + PASSES_PER_BUDGET * (len(compression.configs) - 1)
    models = 1 + len(compression.configs)
    measuring = seconds / compression.num_images * _num_measured(compression) * models
    measuring += models * SECONDS_OF_SPEED
    lines.append(
        f"This takes about {_duration(passes * seconds + measuring)}: {passes} times as long as "
        f"the given model takes for these images ({_duration(seconds)}), and the result is "
        "measured."
    )
    return lines


def _num_measured(compression: Compression) -> int:
    """Return how many images the result is measured on."""
    if compression.found.measured is None:
        return compression.held_out
    return min(len(compression.found.measured), compression.image_args.max_eval_samples)


def _named(names: list[str]) -> str:
    """Return the first of some names, and how many there are."""
    more = len(names) - MOST_NAMED
    shown = "; ".join(names[:MOST_NAMED])
    return f"{shown}; and {more} more" if more > 0 else shown


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes"


def run_compress(compression: Compression) -> dict[str, Any]:
    """Compress to every budget, measure, and write the output folder when all of it is there.

    Returns:
        The content of `eval_results.json`; of several budgets that of `family.json`, subfolder ->
        its `eval_results.json`.

    Raises:
        UnreachableBudgetError: if no subnet fits a budget.
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
    done: dict[str, Compressed] = {}
    for number, (name, config) in enumerate(configs.items()):
        progress("choosing and fitting", number, len(configs))
        done[name] = compressor.compress(config)
        # it was computed in float32
        done[name].model.to(compression.stored_type)
    progress("choosing and fitting", len(configs), len(configs))
    progress.close()
    timings["choosing and fitting"] = _elapsed(compression, timings)
    results, images = _measured(compression, done, progress)
    progress.close()
    timings["measuring the result"] = _elapsed(compression, timings)
    for result in results.values():
        result["seconds"] = round(time.monotonic() - compression.began)
        result["timings"] = timings
    if state.is_main_process:
        output.write_whole(compression.folder, partial(_write, compression, done, results))
        rows = budget_rows(results) if len(results) > 1 else results_rows(*results.values())
        summary = "\n".join(_conclusion(compression, results, images))
        logger.warning("\n%s\n\n%s", text_table(rows), summary)
    return results if len(results) > 1 else next(iter(results.values()))


def _elapsed(compression: Compression, timings: dict[str, float]) -> float:
    """Return the seconds since the beginning that are not those of earlier steps."""
    return round(time.monotonic() - compression.began - sum(timings.values()), 2)


# ---------------------------------------------------------------------------------------- measuring


def _measured(
    compression: Compression, done: dict[str, Compressed], progress: Progress
) -> tuple[dict[str, dict[str, Any]], "Measuring"]:
    """Return subfolder -> content of its `eval_results.json`, and what was measured on."""
    models = {DENSE: compression.model}
    sizes = {DENSE: describe_size(copy.deepcopy(compression.model).to(compression.stored_type))}
    for name, compressed in done.items():
        sizes[name] = describe_size(compressed.model)
        # what is measured are the weights as they are stored, computed in float32
        models[name] = copy.deepcopy(compressed.model).float()
    images = Measuring(compression, progress)
    measured, by_class = compare(models, images)
    if PartialState().is_main_process:
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
            self.what = f"{self.count} images that were held out"
        else:
            self.count = _num_measured(compression)
            self.numbers = evaluated_rows(len(found.measured), self.count)
            self.what = f"the split {found.measured_split}"
            if self.count < len(found.measured):
                self.what = f"{self.count} images of {self.what}, drawn at random"
        self.labels = drawn.labels[compression.num_images :]

    def __iter__(self) -> Iterator[tuple[Tensor, list[int | None]]]:
        """Yield this process's batches."""
        state = PartialState()
        size = self.compression.args.batch_size
        starts = range(0, self.count, size)[state.process_index :: state.num_processes]
        for start in starts:
            # A batch whose images are all unreadable has none of them.
            for pixel_values, labels in self._batch(start, size):
                yield pixel_values, [self.class_of.get(label) for label in labels]
            self.progress("measuring the result", min(start + size, self.count), self.count)

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
    results |= {DENSE: measured[DENSE], "compressed": measured[name]}
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
    several = len(done) > 1
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
        f"({one['num_images']} images, basis {one['basis']!r}, {_duration(one['seconds'])})."
    ]
    if images.remarks:
        lines.append(f"Accuracy: {'; '.join(images.remarks)}.")
    if compression.drawn.skipped:
        lines.append(f"Skipped, as they cannot be decoded: {_named(compression.drawn.skipped)}.")
    if images.skipped:
        lines.append(f"Not measured, as they cannot be decoded: {_named(images.skipped)}.")
    lines.append(f"written to {compression.folder}")
    return lines
