"""Measures how long the parts of one model take on this machine, and fits a `LatencyTable` to that.

Networks of the model's search space, of random sizes and token schedules, run whole, and marks in
the forward pass say when each part is done: every half of a block is timed where it will run, with
the weights and activations of a whole network in the caches. Networks take turns, so that a machine
that is busy for a while is so for all of them.
"""

import copy
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..cost.latency import (
    PICOSECONDS,
    SETTINGS,
    LatencyTable,
    amounts_of,
    count_latency,
    fit_coefficients,
    frame_of,
    milliseconds,
)
from ..families.description import quantities
from ..families.registry import describe, family_of
from ..families.token_reduction import supports_tokens
from ..space.configuration import default_config
from ..space.search_space import SearchSpace
from ..tokens.schedules import Schedule, learned_schedule, num_tokens, ranking_layers
from . import output
from .arguments import LatencyTableArguments
from .inputs import load_for_counting
from .measure import library_versions, processor, random_images, threads
from .report import text_table
from .timing import CLOCKS, Timeline, turn, whole_pass

logger = logging.get_logger(__name__)

ROUNDS = 15  # of the models of a run, whose latency is measured at its end
UNREST = 0.1  # by how much the median of whole passes may lie above the fastest of them
# whole networks that the fit does not see: of random widths, and as many with fewer tokens
CHECKED = 4


def run_latency_table(wanted: LatencyTableArguments) -> LatencyTable:
    """Measures a model's parts and some whole networks, and writes the table.

    Raises:
        ValueError: if the model cannot be loaded, belongs to no family, or is one that cannot be
            searched.
    """
    model = load_for_counting(wanted.model_name_or_path, wanted.num_labels)
    family = family_of(model.config)
    config = (
        copy.deepcopy(model.config)
        if isinstance(model, family.model_class)
        else family.from_dense(model).config
    )
    if getattr(config, "token_schedule", None):
        config.token_schedule = None
    family.pin(config)
    sampled = {} if wanted.multiple_of is None else {"multiple_of": wanted.multiple_of}
    space = default_config(config, **sampled).search_space(config)
    sizes, rng = describe(config).sizes, random.Random(wanted.seed)
    device, dtype = torch.device(wanted.device), getattr(torch, wanted.dtype)

    def networks(count: int) -> list[PreTrainedModel]:
        configs = [copy.deepcopy(config) for _ in range(count)]
        for each, units in zip(
            configs, [sizes, *sample_sizes(space, sizes, count - 1, rng)], strict=True
        ):
            family.resize(each, units)
        _reduce_tokens_(configs, config, rng)
        return [family.model_class(each).eval().to(device, dtype) for each in configs]

    torch.manual_seed(wanted.seed)
    fitted, checked = (
        networks(wanted.networks),
        networks(1 + CHECKED * (2 if may_reduce_tokens(config) else 1)),
    )
    images = random_images(config, wanted.batch_size).to(device, dtype)
    with torch.inference_mode(), threads(wanted.num_threads):
        times, totals = _measure(fitted, checked, images, wanted)
    points = _points(fitted, times)
    coefficients, residuals = _fitted(points)
    table = LatencyTable(
        model=Path(wanted.model_name_or_path).name,
        sizes={name: list(size) for name, size in sizes.items()},
        frame=frame_of(describe(config), sizes),
        settings={
            **{name: getattr(wanted, name) for name in SETTINGS},
            **{
                "engine": "eager",
                "attention": fitted[0].config._attn_implementation,
                "multiple_of": wanted.multiple_of,
            },
            **{name: getattr(wanted, name) for name in ("clock", "networks", "rounds", "seed")},
        },
        hardware=processor(device),
        versions=library_versions(),
        coefficients=coefficients,
        residuals=residuals,
        points=points,
    )
    table.check = _checked(table, checked, totals)
    output.write_json(Path(wanted.output), table.to_dict())
    return table


def sample_sizes(
    space: SearchSpace, sizes: dict[str, tuple[int, ...]], count: int, rng: random.Random
) -> list[dict[str, tuple[int, ...]]]:
    """Sizes of random networks of a space: every submodule by itself, residual widths spread over
    their range."""
    rows: list[dict[str, tuple[int, ...]]] = [dict(sizes) for _ in range(count)]
    for submodule in space:
        candidates = [size for size in submodule.sizes if all(size)]
        if submodule.kind == "embedding":
            # Few networks draw few widths; left to chance, a whole range might be missing.
            picks = [candidates[index * len(candidates) // count] for index in range(count)]
            rng.shuffle(picks)
        else:
            picks = rng.choices(candidates, k=count)
        for row, pick in zip(rows, picks, strict=True):
            row[submodule.name] = pick
    return rows


def may_reduce_tokens(config: PreTrainedConfig) -> bool:
    """Whether a network of this config, ours, may have a token schedule."""
    return supports_tokens(config) and num_tokens(config) > 2 and len(ranking_layers(config)) > 1


def sample_schedule(config: PreTrainedConfig, rng: random.Random) -> Schedule:
    """A random token schedule that might be learned: with layers that let all pass, only drop, only
    merge, or both."""
    left = num_tokens(config)
    learning = range(len(ranking_layers(config)) - 2)
    falling, counts = sorted(rng.choices(range(2, left + 1), k=len(learning)), reverse=True), []
    for layer in learning:
        before, left = left, rng.choice([left, falling[layer], falling[layer]])
        counts.append([rng.choice([before, left, rng.randint(left, before)]), left])
    return learned_schedule(config, counts)


def _reduce_tokens_(
    configs: list[PreTrainedConfig], dense: PreTrainedConfig, rng: random.Random
) -> None:
    """Gives every second config a random token schedule, if such networks may have one, and every
    fourth all widths."""
    if not may_reduce_tokens(dense):
        return
    for number in range(1, len(configs), 2):
        if number % 4 == 1:  # as a search for tokens alone leaves it
            configs[number] = copy.deepcopy(dense)
        configs[number].token_schedule = sample_schedule(dense, rng)


def _measure(
    fitted: list[PreTrainedModel],
    checked: list[PreTrainedModel],
    images: Tensor,
    wanted: LatencyTableArguments,
) -> tuple[list[dict[str, list[float]]], list[list[float]]]:
    """Milliseconds of every part of the first networks, and of the others as a whole; samples of
    all rounds."""
    clock = CLOCKS[wanted.clock]
    timelines = [Timeline(model, clock) for model in fitted]
    times: list[dict[str, list[float]]] = [{} for _ in fitted]
    totals: list[list[float]] = [[] for _ in checked]
    turns = tqdm(
        total=wanted.rounds * (len(fitted) + len(checked)), unit="turn", disable=wanted.disable_tqdm
    )
    for _ in range(wanted.rounds):
        for timeline, parts in zip(timelines, times, strict=True):
            for sample in turn(lambda timeline=timeline: timeline(images)):
                for name, elapsed in sample.items():
                    parts.setdefault(name, []).append(elapsed)
            turns.update()
        for model, total in zip(checked, totals, strict=True):
            total += turn(lambda model=model: whole_pass(model, images, clock))
            turns.update()
    turns.close()
    return times, totals


def measured_latency(models: dict[str, PreTrainedModel], table: LatencyTable) -> dict[str, float]:
    """Median milliseconds of a batch, measured as the table's networks were, the models taking
    turns.

    Returns:
        By model; empty, with a warning, where the table's device is not to be had.
    """
    settings = table.settings
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        logger.warning(
            "the latency table was measured on a GPU and there is none here; latency is not "
            "measured."
        )
        return {}
    place = torch.device(settings["device"]), getattr(torch, settings["dtype"])
    clock = CLOCKS[settings.get("clock", "wall")]
    copies = {name: copy.deepcopy(model).eval().to(*place) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), threads(settings["num_threads"]):
        for _ in range(ROUNDS):
            for name, model in copies.items():
                images = random_images(model.config, settings["batch_size"]).to(*place)
                samples[name] += turn(
                    lambda model=model, images=images: whole_pass(model, images, clock)
                )
    return {name: round(statistics.median(times), 4) for name, times in samples.items()}


def _points(
    networks: list[PreTrainedModel], times: list[dict[str, list[float]]]
) -> list[dict[str, Any]]:
    """One entry per part of every network: its kind, the values of its products, and its median
    time."""
    points = []
    for network, samples in zip(networks, times, strict=True):
        architecture = describe(network.config)
        amounts = quantities(architecture.sizes)
        for part in architecture.parts:
            if part.name in samples:
                elapsed = statistics.median(samples[part.name])
                points.append({"kind": part.kind, **amounts_of(part, amounts), "ms": elapsed})
    return points


def _fitted(
    points: list[dict[str, Any]],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Coefficients of every kind of part, and how far the fit is from its points."""
    coefficients, residuals = {}, {}
    for kind in dict.fromkeys(point["kind"] for point in points):
        rows = [point for point in points if point["kind"] == kind]
        products = [name for name in rows[0] if name not in ("kind", "ms")]
        values, times = (
            [[row[name] for name in products] for row in rows],
            [PICOSECONDS * row["ms"] for row in rows],
        )
        found = fit_coefficients(values, times)
        coefficients[kind] = dict(zip(products, found, strict=True))
        errors = [
            abs(sum(c * v for c, v in zip(found, row, strict=True)) / t - 1)
            for row, t in zip(values, times, strict=True)
        ]
        residuals[kind] = {
            "points": len(rows),
            "median": statistics.median(errors),
            "worst": max(errors),
        }
    return coefficients, residuals


def _checked(
    table: LatencyTable, networks: list[PreTrainedModel], totals: list[list[float]]
) -> dict[str, Any]:
    """Whole networks as predicted and as measured."""
    rows = []
    for network, samples in zip(networks, totals, strict=True):
        predicted, measured = (
            milliseconds(count_latency(network, table)),
            statistics.median(samples),
        )
        # With little else running the median of a whole pass is close to the fastest ones.
        fastest = sorted(samples)[len(samples) // 10]
        row = {"predicted_ms": predicted, "measured_ms": measured, "fastest_tenth_ms": fastest}
        schedule = getattr(network.config, "token_schedule", None)
        rows.append(
            row
            | {"error": predicted / measured - 1}
            | ({"token_schedule": schedule} if schedule else {})
        )
    errors = [abs(row["error"]) for row in rows]
    unrest = statistics.median(row["measured_ms"] / row["fastest_tenth_ms"] - 1 for row in rows)
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "unrest": unrest,
        "networks": rows,
    }


def table_text(table: LatencyTable) -> str:
    """What was measured, for people to read."""
    settings, check = table.settings, table.check
    lines = [
        f"{table.model} on {table.hardware}, {settings['device']}, {settings['num_threads']} "
        f"threads, batch "
        f"{settings['batch_size']}, {settings['dtype']}, {settings['engine']}, "
        f"{settings['clock']} time",
        "",
    ]
    rows = [["part", "points", "median error", "worst error"]]
    for kind, residual in table.residuals.items():
        errors = [f"{100 * residual[name]:.1f} %" for name in ("median", "worst")]
        rows.append([kind, str(residual["points"]), *errors])
    lines += [text_table(rows), "", "whole networks, the dense one first:"]
    rows = [["network", "predicted ms", "measured ms", "fastest tenth", "error"]]
    for number, row in enumerate(check["networks"]):
        values = [
            f"{row[name]:.3f}" for name in ("predicted_ms", "measured_ms", "fastest_tenth_ms")
        ]
        name = (
            f"random {number}, fewer tokens"
            if "token_schedule" in row
            else f"random {number}"
            if number
            else "dense"
        )
        rows.append([name, *values, f"{100 * row['error']:+.1f} %"])
    lines += [text_table(rows), ""]
    lines.append(
        f"error: {100 * check['median_error']:.1f} % median, {100 * check['worst_error']:.1f} % "
        f"worst"
    )
    if check["unrest"] > UNREST:
        lines.append(
            f"The machine was busy: typical passes took {100 * check['unrest']:.0f} % longer than "
            f"the fastest. Parts "
            "are short and seldom interrupted, so what is predicted is closer to a quiet machine; "
            "measure again on one."
        )
    return "\n".join(lines)


def warn_if_elsewhere(table: LatencyTable | None, device: torch.device) -> None:
    """Says so when a table was measured on another machine, or with other threads, than this
    process would use."""
    if table is None:
        return
    measured_on = torch.device(table.settings["device"])
    here, there = (
        [processor(measured_on if measured_on.type == "cpu" else device)],
        [table.hardware],
    )
    if measured_on.type == "cpu":
        here.append(f"{torch.get_num_threads()} threads")
        there.append(f"{table.settings['num_threads']} threads")
    if here != there:
        logger.warning(
            f"the latency table was measured on {', '.join(there)}; this process runs on "
            f"{', '.join(here)}. "
            "Predictions are those of the table; measure one where the model will run."
        )
