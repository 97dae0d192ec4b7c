"""Predict cost and time of a search without data: exact counts, measured seconds and memory."""

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
from ..search.rewriting import as_bi_masks
from ..search.supernet import install_bi_masks
from ..space.configuration import BiMaskConfig, default_config
from ..training.arguments import OFBTrainingArguments, check_search_arguments
from .arguments import PlanArguments, SearchArguments
from .inputs import load_for_counting
from .latency_table import warn_if_elsewhere
from .measure import hardware, peak_bytes
from .report import text_table
from .trial import TrialSearch

# A plan should take less than a minute; this is for measuring, over all budgets.
SECONDS = 20.0
MEASURED_STEPS = 5
# For every cost the header of its column, the format of a number, and its unit in a sentence.
COSTS = {
    "macs": ("MACs", "{:,}", "MACs"),
    "params": ("params", "{:,}", "parameters"),
    "latency_ms": ("ms", "{:.3f}", "ms predicted"),
}


def run_plan(
    wanted: PlanArguments, search: SearchArguments, args: OFBTrainingArguments
) -> dict[str, Any]:
    """Count what the space holds and what every budget leaves, then run some steps of each search.

    Returns:
        {"model", "dense", "space", "budgets", "trial"}: counts are integers, times seconds, memory
        bytes. For every budget there is `target` (its limit); `macs` and `params` of the best
        choice if all units of a submodule are equally important (a search makes another choice, as
        close below the limit); `before` and `after`, the seconds of a step before and after that
        choice; and `seconds` of the whole search. With a latency table, MACs come with
        `latency_ms`.

    Raises:
        ValueError: if the model cannot be loaded, or for arguments that a search refuses.
        UnreachableBudgetError: for a budget that nothing in the space meets, before anything is
            measured.
    """
    check_search_arguments(args)
    model = load_for_counting(wanted.model_name_or_path, wanted.num_labels)
    configs = {}
    for name, values in search.by_budget().items():
        # There are no images to find another basis by, and sizes and speed are the same in all.
        configs[name] = as_bi_masks(default_config(model.config, **values), model.config)
    # refuses what no subnet meets, before anything is measured
    budgets = {name: _outcome(model, config) for name, config in configs.items()}
    first = next(iter(configs.values()))  # the budgets have everything else in common
    warn_if_elsewhere(first.table, args.device)
    batches = math.ceil(wanted.num_images / (args.train_batch_size * args.world_size))
    epochs = _epochs(wanted, args)
    peaks = []
    for name, config in configs.items():
        # One fit is enough: what it holds is decided by the dense network.
        fits = not peaks
        before, after, peak = _measure(model, args, config, SECONDS / len(configs), fits)
        peaks.append(peak)
        # mean seconds of a step: the choice is made after the fraction `settle_at` of the steps
        step = config.settle_at * before + (1 - config.settle_at) * after
        budgets[name] |= {"before": before, "after": after, "seconds": epochs * batches * step}
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
    """Count how much there is to choose from, and how small a network may get.

    Returns:
        `choices`: submodules that choose for themselves; `candidates`: over all of them; `subnets`:
        the product of their numbers; `macs` and `params` of the smallest subnet; `share`: the
        smallest budget as a fraction of the dense model, rounded up to four decimals.
    """
    space = config.search_space(model.config)
    free = [submodule for submodule in space if submodule.tied_to is None]
    smallest = _smallest(model, config)
    cost = count_cost(model, config.terms, smallest)
    dense_cost = count_cost(model, config.terms)
    return {
        "choices": len(free),
        "candidates": space.num_candidates,
        "subnets": math.prod(len(submodule.sizes) for submodule in free),
        **_costs(model, config, smallest),
        # rounded up, so that a search accepts it as a budget
        "share": math.ceil(1e4 * cost / dense_cost) / 1e4,
    }


def _smallest(model: PreTrainedModel, config: BiMaskConfig) -> SubnetSpec:
    """Return what the search would choose under the lowest budget that it does not refuse."""
    name, _ = config.budget
    # 1 or less would be a fraction of the dense model, so 2 is the lowest absolute budget
    lowest = replace(config, **{name: 2 / config.unit})
    try:
        return install_bi_masks(model, lowest).decisions.settle_()
    except UnreachableBudgetError as error:
        reachable = replace(config, **{name: config.absolute(error.smallest)})
        return install_bi_masks(model, reachable).decisions.settle_()


def plan_text(plan: dict[str, Any]) -> str:
    """Return what `run_plan` found, as text for people."""
    dense, space, trial = plan["dense"], plan["space"], plan["trial"]
    exponent = math.log10(space["subnets"])
    when = "of what the choice leaves, which is made before the first step."
    if trial["settle_at"]:
        when = f"before the choice, which is made after {trial['settle_at']:.0%} of the steps,"
        when += '\nand "then", after it.'
    lines = [
        f"{plan['model']}: {_sentence(dense, dense)}",
        f"space: {space['choices']} choices among {space['candidates']} candidates, "
        f"10^{exponent:.0f} subnets",
        f"smallest: {_sentence(space, dense)}; the lowest budget is {space['share']:.4f} of dense",
        "",
        text_table(_budget_rows(plan)),
        "",
        "MACs and params: of the best choice if all units are equally important; a search makes",
        "its own choice, within the same limit.",
        f"Time: steps with {trial['batch_size']} random images on {trial['hardware']}, with the "
        "teacher",
        "and without loading data;",
        when,
        f"Search: {trial['epochs']:g} epochs of {trial['num_images']:,} images, for each budget "
        "alone.",
        f"Memory: {trial['peak_bytes'] / 2**30:.2f} GiB at most in the steps and in the fit after "
        "the choice.",
    ]
    return "\n".join(lines)


def _costs_of(dense: dict[str, Any]) -> list[str]:
    """Return the names of the costs in a plan: latency is among them where there is a table."""
    return [name for name in COSTS if name in dense]


def _shown(name: str, values: dict[str, Any]) -> str:
    """Return one cost as text, without its unit."""
    _, number, _ = COSTS[name]
    return number.format(values[name])


def _sentence(values: dict[str, Any], dense: dict[str, Any]) -> str:
    """Return all costs of a network with their units: `1,000 MACs, 20 parameters`."""
    parts = []
    for name in _costs_of(dense):
        _, _, unit = COSTS[name]
        parts.append(f"{_shown(name, values)} {unit}")
    return ", ".join(parts)


def _budget_rows(plan: dict[str, Any]) -> list[list[str]]:
    """Return a header and a row for every budget, as text."""
    dense = plan["dense"]
    costs = _costs_of(dense)
    header = ["budget", "limit"]
    for name in costs:
        header += [COSTS[name][0], "of dense"]
    # before the choice and after it, where any step comes before it
    places = ("before", "after") if plan["trial"]["settle_at"] else ("after",)
    then = ["then"] * (len(places) - 1)
    rows = [[*header, "step", *then, "epoch", *then, "search"]]
    for name, budget in plan["budgets"].items():
        row = [name, f"{budget['target']:,}"]
        for cost in costs:
            row += [_shown(cost, budget), f"{budget[cost] / dense[cost]:.4f}"]
        steps = [budget[place] for place in places]
        # seconds of an epoch, if all its steps were before the choice or all after it
        epochs = [seconds * plan["trial"]["batches_per_epoch"] for seconds in steps]
        row += [_duration(seconds) for seconds in (*steps, *epochs, budget["seconds"])]
        rows.append(row)
    return rows


def _duration(seconds: float) -> str:
    """Return a duration in the largest unit that it fills."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3f} s"


def _outcome(model: PreTrainedModel, config: BiMaskConfig) -> dict[str, Any]:
    """Return a budget in absolute numbers, and what the space offers for it."""
    supernet = install_bi_masks(model, config)
    # without training all units of a submodule are equally important
    subnet = supernet.decisions.settle_()
    return {"target": config.absolute(supernet.target), **_costs(model, config, subnet)}


def _costs(
    model: PreTrainedModel, config: BiMaskConfig, subnet: SubnetSpec | None = None
) -> dict[str, Any]:
    """Return MACs and parameters of a model or a subnet of it.

    Where there is a latency table, the predicted latency in milliseconds is among them.
    """
    costs = {"macs": count_macs(model, subnet), "params": count_params(model, subnet)}
    if config.table is not None:
        costs["latency_ms"] = milliseconds(count_latency(model, config.table, subnet))
    return costs


def _epochs(wanted: PlanArguments, args: OFBTrainingArguments) -> float:
    """Return how often the search sees every image."""
    if args.max_steps <= 0:  # transformers then counts epochs
        return args.num_train_epochs
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * batch / wanted.num_images


def _measure(
    model: PreTrainedModel,
    args: OFBTrainingArguments,
    config: BiMaskConfig,
    limit: float,
    fits: bool,
) -> tuple[float, float, int]:
    """Measure steps of a search.

    Args:
        limit: seconds for the steps.
        fits: whether the fit after the choice is made, too; only the peak of memory shows it.

    Returns:
        Seconds of a step before and after the choice, and the peak of memory in bytes.
    """
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    trial = TrialSearch(model, args, config, fits)
    batch = trial.batch(args.train_batch_size)
    if config.chooses_first:
        trial.settle()
        after = _step_seconds(trial, batch, limit)
        return after, after, peak_bytes(args.device)
    before = _step_seconds(trial, batch, limit / 2)
    trial.settle()
    after = _step_seconds(trial, batch, limit / 2)
    return before, after, peak_bytes(args.device)


def _step_seconds(trial: TrialSearch, batch: dict[str, Tensor], limit: float) -> float:
    """Return the median seconds of a step.

    The first step is slower and does not count. After `limit` seconds no step is begun, except a
    second one if there was only the first.
    """
    times: list[float] = []
    began = time.perf_counter()
    while len(times) <= MEASURED_STEPS:
        if len(times) >= 2 and time.perf_counter() - began >= limit:
            break
        start = time.perf_counter()
        float(trial.step(batch))  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
