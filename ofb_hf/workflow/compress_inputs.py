"""Everything that a compression needs, loaded and checked before it begins; nothing is written."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cost.budget import UnreachableBudgetError
from ..cost.counting import evaluate_terms
from ..data import (
    FoundImages,
    ImageArguments,
    ImageBatches,
    ImageTransform,
    build_transform,
    cropping,
    draw,
    find_images,
    labelled_batches,
)
from ..data.drawing import Drawn
from ..data.processors import CHANNELS
from ..families.description import quantities
from ..families.loading import load_classifier_or_features
from ..families.registry import describe, family_of
from ..families.token_reduction import with_fewest_tokens
from ..frozen.compression import frozen_config, require_compressible
from ..space.configuration import BiMaskConfig
from . import output
from .arguments import CompressArguments
from .inputs import load_image_processor, require_findable, require_same_size
from .latency_table import warn_if_elsewhere
from .measure import SECONDS_PER_ROUND, SPEED_ROUNDS
from .results import source_of

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
# What it takes to measure the speed of a model.
SECONDS_OF_SPEED = (SPEED_ROUNDS + 1) * SECONDS_PER_ROUND
# Step of the compressor -> what the progress bar calls it.
STEPS = {
    "rewriting": "rewriting the basis",
    "measuring": "measuring errors",
    "fitting": "fitting weights",
}


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
        # A link stays; what it points to is the folder.
        return Path(self.args.output_dir).resolve()

    @property
    def num_images(self) -> int:
        """How many images errors are measured on and weights are fitted to."""
        return len(self.drawn) - self.held_out

    @property
    def batches(self) -> ImageBatches:
        """Those images."""
        levels = self.drawn.levels[: self.num_images]
        return ImageBatches(levels, self.transform, self.args.batch_size)

    @property
    def num_measured(self) -> int:
        """How many images the result is measured on."""
        if self.found.measured is None:
            return self.held_out
        return min(len(self.found.measured), self.image_args.max_eval_samples)


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
    model = _load_model(name, transform)
    stored_type = model.dtype
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
    held_out = _num_held_out(found, drawn)
    if found.measured is not None:
        _require_readable(found, transform, args.batch_size)
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


def _load_model(name: str, transform: ImageTransform) -> PreTrainedModel:
    """Load a classifier that can be compressed and takes the images that a transform makes."""
    model = load_classifier_or_features(name)
    require_compressible(model)
    channels = describe(model.config).num_channels
    if channels != CHANNELS:
        raise ValueError(
            f"{name} takes images of {channels} channels, but this command reads images in "
            f"{CHANNELS} colours; use ofb_hf.compress_frozen with tensors of your own."
        )
    require_same_size(name, model, (transform.height, transform.width))
    return model


def _num_held_out(found: FoundImages, drawn: Drawn) -> int:
    """Return how many of the drawn images the result is measured on: none with a split for it."""
    held_out = 0
    if found.measured is None:
        held_out = max(1, min(MOST_HELD_OUT, len(drawn) // HELD_OUT))
    if len(drawn) - held_out < 1:
        raise ValueError(
            f"{found.name} has {len(drawn)} readable image; give at least two, one of them to "
            "measure the result on."
        )
    return held_out


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


def _require_readable(found: FoundImages, transform: ImageTransform, count: int) -> None:
    """Refuse a split to measure on whose first images cannot be decoded, none of them."""
    skipped: list[str] = []
    numbers = range(min(count, len(found.measured)))
    if not list(labelled_batches(found.measured, numbers, transform, count, skipped)):
        raise ValueError(
            f"the result would be measured on the split {found.measured_split}, but its first "
            f"images cannot be decoded: {named(skipped)}. Mend the split, or take it away; then "
            "some of the other images are held out."
        )


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
        lines.append(f"Skipped, as they cannot be decoded: {named(drawn.skipped)}.")
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
    measuring = seconds / compression.num_images * compression.num_measured * models
    measuring += models * SECONDS_OF_SPEED
    lines.append(
        f"This takes about {duration(passes * seconds + measuring)}: {passes} times what the given "
        f"model takes for these images ({duration(seconds)}), and measuring the result "
        f"({duration(measuring)})."
    )
    return lines


def named(names: list[str]) -> str:
    """Return the first of some names, and how many there are."""
    more = len(names) - MOST_NAMED
    shown = "; ".join(names[:MOST_NAMED])
    return f"{shown}; and {more} more" if more > 0 else shown


def duration(seconds: float) -> str:
    """Return a time as text."""
    if seconds < 1:
        return "less than a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
