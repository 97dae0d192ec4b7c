"""What a search would cost and come to, before there is any data: exact counts, and measured seconds and memory."""

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures import require_classifier
from ..checkpoints import load_complete_classifier
from ..configuration import BiMaskConfig, default_config
from ..flops import COUNTS, count_macs, count_params
from ..models.shapes import SHAPES
from ..search_space import Kept, SubnetSpec
from ..supernet import install_bi_masks
from ..token_choice import smallest_schedule
from ..training_args import OFBTrainingArguments, check_search_arguments
from .arguments import PlanArguments, SearchArguments
from .inputs import load_classifier
from .measure import hardware, peak_bytes
from .report import text_table
from .trial import TrialSearch

# A plan is to be there within a minute; this is left for measuring, over all budgets.
SECONDS = 20.0
MEASURED_STEPS = 5


def run_plan(wanted: PlanArguments, search: SearchArguments, args: OFBTrainingArguments) -> dict[str, Any]:
    """Counts what the space holds and what every budget comes to, then takes some steps of each search.

    Returns:
        {"model", "dense", "space", "budgets", "trial"}: counts are integers, times seconds, memory bytes. Of every
        budget: `target` (its limit), `macs` and `params` of what is chosen if all units of a submodule are worth the
        same (a search ends at another choice, in the same band below the limit), `before` and `after` that choice the
        seconds of a step, and `seconds` of the whole search.

    Raises:
        ValueError: if the model cannot be loaded, or for arguments that a search refuses.
        UnreachableBudgetError: for a budget that nothing in the space meets, before anything is measured.
    """
    check_search_arguments(args)
    model = _load(wanted)
    configs = {name: default_config(model.config, **values) for name, values in search.by_budget().items()}
    budgets = {name: _outcome(model, config) for name, config in configs.items()}
    batches = math.ceil(wanted.num_images / (args.train_batch_size * args.world_size))
    epochs = _epochs(wanted, args)
    peaks = []
    for name, config in configs.items():
        before, after, peak = _measure(model, args, config, SECONDS / len(configs))
        peaks.append(peak)
        steps = config.settle_at * before + (1 - config.settle_at) * after
        budgets[name] |= {"before": before, "after": after, "seconds": epochs * batches * steps}
    first = next(iter(configs.values()))
    return {
        "model": wanted.model_name_or_path,
        "dense": {"macs": count_macs(model), "params": count_params(model)},
        "space": describe_space(model, first),
        "budgets": budgets,
        "trial": {
            "hardware": hardware(args.device),
            "batch_size": args.train_batch_size,
            "batches_per_epoch": batches,
            "num_images": wanted.num_images,
            "epochs": epochs,
            "settle_at": first.settle_at,
            "peak_bytes": max(peaks),
        },
    }


def describe_space(model: PreTrainedModel, config: BiMaskConfig) -> dict[str, Any]:
    """How much there is to choose from, and how small a network may get.

    Returns:
        `choices`: submodules that choose for themselves; `candidates`: over all of them; `subnets`: what they multiply
        to; `macs` and `params` of the smallest subnet; `share`: the smallest budget as a share of the dense model,
        rounded up to four decimals.
    """
    space, count = config.search_space(model.config), COUNTS[config.budget[0]]
    sizes = {submodule.name: submodule.sizes for submodule in space if submodule.tied_to is None}
    units = {submodule.name: _first_units(submodule.sizes[0]) for submodule in space}
    smallest = SubnetSpec(units, smallest_schedule(model.config) if config.search_tokens else None)
    return {
        "choices": len(sizes),
        "candidates": space.num_candidates,
        "subnets": math.prod(map(len, sizes.values())),
        "macs": count_macs(model, smallest),
        "params": count_params(model, smallest),
        "share": math.ceil(1e4 * count(model, smallest) / count(model)) / 1e4,
    }


def plan_text(plan: dict[str, Any]) -> str:
    """What `run_plan` found, for people to read."""
    dense, space, trial = plan["dense"], plan["space"], plan["trial"]
    rows = [["budget", "limit", "MACs", "of dense", "params", "of dense", "step", "then", "epoch", "then", "search"]]
    for name, budget in plan["budgets"].items():
        row = [name, f"{budget['target']:,}"]
        for what in ("macs", "params"):
            row += [f"{budget[what]:,}", f"{budget[what] / dense[what]:.4f}"]
        steps = [budget["before"], budget["after"]]
        epochs = [seconds * trial["batches_per_epoch"] for seconds in steps]
        rows.append([*row, *map(_duration, [*steps, *epochs, budget["seconds"]])])
    return f"""{plan["model"]}: {dense["macs"]:,} MACs, {dense["params"]:,} parameters
space: {space["choices"]} choices among {space["candidates"]} candidates, 10^{math.log10(space["subnets"]):.0f} subnets
smallest: {space["macs"]:,} MACs, {space["params"]:,} parameters; the lowest budget is {space["share"]:.4f} of dense

{text_table(rows)}

MACs and params: the choice if all units are worth the same; a search makes its own, likewise within the limit.
Time: steps with {trial["batch_size"]} random images on {trial["hardware"]}, teacher included, loading of data not;
before the choice, which is made after {trial["settle_at"]:.0%} of the steps, and "then", after it.
Search: {trial["epochs"]:g} epochs of {trial["num_images"]:,} images, each budget by itself.
Memory: {trial["peak_bytes"] / 2**30:.2f} GiB at most while the steps ran."""


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3f} s"


def _load(wanted: PlanArguments) -> PreTrainedModel:
    name = wanted.model_name_or_path
    if name in SHAPES:
        return load_classifier(name, [str(label) for label in range(wanted.num_labels)], seed=0)
    model = load_complete_classifier(name)
    require_classifier(model)
    return model


def _outcome(model: PreTrainedModel, config: BiMaskConfig) -> dict[str, int]:
    """A budget in absolute numbers, and what the space offers for it."""
    supernet = install_bi_masks(model, config)
    subnet = supernet.settle_()
    return {"target": supernet.target, "macs": count_macs(model, subnet), "params": count_params(model, subnet)}


def _epochs(wanted: PlanArguments, args: OFBTrainingArguments) -> float:
    """How often the search sees every image."""
    if args.max_steps <= 0:
        return args.num_train_epochs
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * batch / wanted.num_images


def _measure(
    model: PreTrainedModel, args: OFBTrainingArguments, config: BiMaskConfig, limit: float
) -> tuple[float, float, int]:
    """Seconds of a step before and after the choice, and the peak of memory in bytes."""
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    trial = TrialSearch(model, args, config)
    batch = trial.batch(args.train_batch_size)
    before = _step_seconds(trial, batch, limit / 2)
    trial.settle()
    return before, _step_seconds(trial, batch, limit / 2), peak_bytes(args.device)


def _step_seconds(trial: TrialSearch, batch: dict[str, Tensor], limit: float) -> float:
    """Median seconds of a step, the first left out; no other is begun after `limit` seconds, but for one."""
    began, times = time.perf_counter(), []
    while len(times) < 2 or (len(times) <= MEASURED_STEPS and time.perf_counter() - began < limit):
        start = time.perf_counter()
        float(trial.step(batch))  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _first_units(size: tuple[int, ...]) -> Kept:
    """A choice of units that has this size, (U',) or (heads, channels per head); which ones does not matter."""
    units = tuple(range(size[-1]))
    return units if len(size) == 1 else dict.fromkeys(range(size[0]), units)
