"""What a search would cost and come to, before there is any data: exact counts, and measured
seconds and memory."""

import math
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cost.budget import UnreachableBudgetError
from ..cost.counting import count_cost, count_macs, count_params
from ..cost.latency import count_latency, milliseconds
from ..families.subnet import SubnetSpec
from ..search.supernet import install_bi_masks
from ..space.configuration import BiMaskConfig, default_config
from ..training.arguments import OFBTrainingArguments, check_search_arguments
from .arguments import PlanArguments, SearchArguments
from .inputs import load_for_counting
from .latency_table import warn_if_elsewhere
from .measure import hardware, peak_bytes
from .report import text_table
from .trial import TrialSearch

# A plan is to be there within a minute; this is left for measuring, over all budgets.
SECONDS = 20.0
MEASURED_STEPS = 5
# Head of the column, number, and unit of every cost.
COSTS = {
    "macs": ("MACs", "{:,}", "MACs"),
    "params": ("params", "{:,}", "parameters"),
    "latency_ms": ("ms", "{:.3f}", "ms predicted"),
}


def run_plan(
    wanted: PlanArguments, search: SearchArguments, args: OFBTrainingArguments
) -> dict[str, Any]:
    """Counts what the space holds and what every budget comes to, then takes some steps of each
    search.

    Returns:
        {"model", "dense", "space", "budgets", "trial"}: counts are integers, times seconds, memory
        bytes. Of every
        budget: `target` (its limit), `macs` and `params` of what is chosen if all units of a
        submodule are worth the same (a search ends at another choice, in the same band below the
        limit), `before` and `after` that choice the seconds of a step, and `seconds` of the whole
        search. With a latency table, `latency_ms` beside MACs.

    Raises:
        ValueError: if the model cannot be loaded, or for arguments that a search refuses.
        UnreachableBudgetError: for a budget that nothing in the space meets, before anything is
            measured.
    """
    check_search_arguments(args)
    model = load_for_counting(wanted.model_name_or_path, wanted.num_labels)
    configs = {
        name: default_config(model.config, **values) for name, values in search.by_budget().items()
    }
    budgets = {name: _outcome(model, config) for name, config in configs.items()}
    warn_if_elsewhere(next(iter(configs.values())).table, args.device)
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
        "dense": _costs(model, first),
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
        `choices`: submodules that choose for themselves; `candidates`: over all of them; `subnets`:
        what they multiply to; `macs` and `params` of the smallest subnet; `share`: the smallest
        budget as a share of the dense model, rounded up to four decimals.
    """
    space = config.search_space(model.config)
    sizes = {submodule.name: submodule.sizes for submodule in space if submodule.tied_to is None}
    smallest = _smallest(model, config)
    return {
        "choices": len(sizes),
        "candidates": space.num_candidates,
        "subnets": math.prod(map(len, sizes.values())),
        **_costs(model, config, smallest),
        "share": math.ceil(
            1e4 * count_cost(model, config.terms, smallest) / count_cost(model, config.terms)
        )
        / 1e4,
    }


def _smallest(model: PreTrainedModel, config: BiMaskConfig) -> SubnetSpec:
    """What the search would choose under the lowest budget that it does not refuse."""
    name, _ = config.budget
    try:
        return install_bi_masks(model, replace(config, **{name: 2 / config.unit})).settle_()
    except UnreachableBudgetError as error:
        return install_bi_masks(
            model, replace(config, **{name: config.absolute(error.smallest)})
        ).settle_()


def plan_text(plan: dict[str, Any]) -> str:
    """What `run_plan` found, for people to read."""
    dense, space, trial = plan["dense"], plan["space"], plan["trial"]
    costs = [what for what in ("macs", "params", "latency_ms") if what in dense]
    heads = [head for what in costs for head in (COSTS[what][0], "of dense")]
    rows = [["budget", "limit", *heads, "step", "then", "epoch", "then", "search"]]
    for name, budget in plan["budgets"].items():
        row = [name, f"{budget['target']:,}"]
        for what in costs:
            row += [COSTS[what][1].format(budget[what]), f"{budget[what] / dense[what]:.4f}"]
        steps = [budget["before"], budget["after"]]
        epochs = [seconds * trial["batches_per_epoch"] for seconds in steps]
        rows.append([*row, *map(_duration, [*steps, *epochs, budget["seconds"]])])
    in_words = ", ".join(f"{COSTS[what][1].format(dense[what])} {COSTS[what][2]}" for what in costs)
    smallest = ", ".join(f"{COSTS[what][1].format(space[what])} {COSTS[what][2]}" for what in costs)
    return f"""{plan["model"]}: {in_words}
space: {space["choices"]} choices among {space["candidates"]} candidates, 10^{math.log10(space["subnets"]):.0f} subnets
smallest: {smallest}; the lowest budget is {space["share"]:.4f} of dense

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


def _outcome(model: PreTrainedModel, config: BiMaskConfig) -> dict[str, Any]:
    """A budget in absolute numbers, and what the space offers for it."""
    supernet = install_bi_masks(model, config)
    subnet = supernet.settle_()
    return {"target": config.absolute(supernet.target), **_costs(model, config, subnet)}


def _costs(
    model: PreTrainedModel, config: BiMaskConfig, subnet: SubnetSpec | None = None
) -> dict[str, Any]:
    """MACs and parameters of a model or a subnet of it, and its predicted latency where there is a
    table."""
    costs = {"macs": count_macs(model, subnet), "params": count_params(model, subnet)}
    if config.table is not None:
        costs["latency_ms"] = milliseconds(count_latency(model, config.table, subnet))
    return costs


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
    """Median seconds of a step, the first left out; no other is begun after `limit` seconds, but
    for one."""
    began, times = time.perf_counter(), []
    while len(times) < 2 or (len(times) <= MEASURED_STEPS and time.perf_counter() - began < limit):
        start = time.perf_counter()
        float(trial.step(batch))  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
