"""Measure how long the parts of a model take on this machine, and fit a `LatencyTable` to that.

Networks of the model's search space, of random sizes and token schedules, run as a whole, and marks
in the forward pass say when each part is done: every half of a block is timed where it will run,
with the weights and activations of a whole network in the caches. Networks take turns, so that
other work on the machine slows all of them down alike.
"""

import copy
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .._moved import refusing_renamed
from ..cost.latency import (
    PICOSECONDS,
    LatencyTable,
    amounts_of,
    count_latency,
    fit_coefficients,
    frame_of,
    milliseconds,
    threads_text,
)
from ..cost.latency_entries import SETTINGS
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
from .timing import CLOCKS, Clock, Timeline, turn, whole_pass

# of names that the module had in version 0.1
__getattr__ = refusing_renamed(__name__)

logger = logging.get_logger(__name__)

ROUNDS = 15  # of the models of a run, whose latency is measured at its end
UNREST = 0.1  # by how much the median of whole passes may lie above the fastest of them
# Whole networks that the fit does not see, besides the dense one: this many of random widths, and
# this many with fewer tokens.
CHECKED = 4

Sizes = dict[str, tuple[int, ...]]  # submodule -> its size along every axis
Times = dict[str, list[float]]  # forward part -> milliseconds, one sample per pass


@dataclass
class Sampler:
    """Draw networks of a model's search space: random sizes, and fewer tokens where possible.

    Attributes:
        config: of the dense model, as a model of this package.
        space: where sizes are drawn from.
        rng: source of all random sizes.
    """

    config: PreTrainedConfig
    space: SearchSpace
    rng: random.Random

    @classmethod
    def of(cls, wanted: LatencyTableArguments) -> "Sampler":
        """Return the sampler for the model that is named.

        Raises:
            ValueError: if it cannot be loaded, belongs to no family, or cannot be searched.
        """
        model = load_for_counting(wanted.model_name_or_path, wanted.num_labels)
        family = family_of(model.config)
        if isinstance(model, family.model_class):
            config = copy.deepcopy(model.config)
        else:
            config = family.from_dense(model).config
        # The table is about the model with all its tokens: a search for tokens starts there.
        if getattr(config, "token_schedule", None):
            config.token_schedule = None
        family.pin(config)
        settings = {}
        if wanted.multiple_of is not None:
            settings["multiple_of"] = wanted.multiple_of
        space = default_config(config, **settings).search_space(config)
        return cls(config, space, random.Random(wanted.seed))

    @property
    def sizes(self) -> Sizes:
        """The sizes of the dense model."""
        return describe(self.config).sizes

    def networks(
        self, count: int, device: torch.device, dtype: torch.dtype
    ) -> list[PreTrainedModel]:
        """Return networks with random weights, the dense one first."""
        family = family_of(self.config)
        configs = [copy.deepcopy(self.config) for _ in range(count)]
        sampled = sample_sizes(self.space, self.sizes, count - 1, self.rng)
        for config, sizes in zip(configs, [self.sizes, *sampled], strict=True):
            family.resize(config, sizes)
        _reduce_tokens_(configs, self.config, self.rng)
        return [family.model_class(config).eval().to(device, dtype) for config in configs]


def run_latency_table(wanted: LatencyTableArguments) -> LatencyTable:
    """Measure a model's parts and some whole networks, and write the table.

    Raises:
        ValueError: if the model cannot be loaded, belongs to no family, or cannot be searched.
    """
    sampler = Sampler.of(wanted)
    config, sizes = sampler.config, sampler.sizes
    device = torch.device(wanted.device)
    dtype = getattr(torch, wanted.dtype)
    # Weights are random: how long a pass takes does not depend on their values.
    torch.manual_seed(wanted.seed)
    fitted = sampler.networks(wanted.networks, device, dtype)
    # the dense network, and CHECKED of each kind
    kinds = 2 if may_reduce_tokens(config) else 1
    checked = sampler.networks(1 + CHECKED * kinds, device, dtype)
    images = random_images(config, wanted.batch_size).to(device, dtype)
    with torch.inference_mode(), threads(wanted.num_threads):
        times, totals = _measure(fitted, checked, images, wanted)
    points = _points(fitted, times)
    coefficients, residuals = _fitted(points)
    table = LatencyTable(
        model=Path(wanted.model_name_or_path).name,
        sizes={name: list(size) for name, size in sizes.items()},
        frame=frame_of(describe(config), sizes),
        settings=_settings(wanted, fitted[0].config._attn_implementation),
        hardware=processor(device),
        versions=library_versions(),
        coefficients=coefficients,
        residuals=residuals,
        points=points,
    )
    table.check = _checked(table, checked, totals)
    output.write_json(Path(wanted.output), table.to_dict())
    return table


def _settings(wanted: LatencyTableArguments, attention: str) -> dict[str, Any]:
    """Return under which settings a table is measured.

    Args:
        attention: the implementation of attention, as transformers names it.
    """
    settings = {name: getattr(wanted, name) for name in SETTINGS}
    settings["engine"] = "eager"
    settings["attention"] = attention
    for name in ("multiple_of", "clock", "networks", "rounds", "seed"):
        settings[name] = getattr(wanted, name)
    return settings


def sample_sizes(
    space: SearchSpace, sizes: Sizes, count: int, rng: random.Random
) -> list[dict[str, tuple[int, ...]]]:
    """Return the sizes of random networks of a space.

    Every submodule is drawn by itself; residual widths are spread evenly over their range.
    """
    rows: list[Sizes] = [dict(sizes) for _ in range(count)]
    for submodule in space:
        # a submodule of size 0 has no time to measure
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
    """Return whether a model of this package may have a token schedule.

    There has to be something to remove, and a layer with attention to rank tokens by besides the
    first one, which keeps all.
    """
    return supports_tokens(config) and num_tokens(config) > 2 and len(ranking_layers(config)) > 1


def sample_schedule(config: PreTrainedConfig, rng: random.Random) -> Schedule:
    """Return a random token schedule as a search might learn it.

    Some layers keep all tokens, some only drop or only merge, some do both.
    """
    remaining = num_tokens(config)
    num_learning = len(ranking_layers(config)) - 2
    # what each layer keeps if it removes tokens: fewer from layer to layer
    targets = rng.choices(range(2, remaining + 1), k=num_learning)
    targets.sort(reverse=True)
    counts = []
    for target in targets:
        before = remaining
        # a third of the layers keeps all
        remaining = rng.choice([before, target, target])
        # after dropping: all (only merges), what remains (only drops), or a number in between
        both = rng.randint(remaining, before)
        dropped = rng.choice([before, remaining, both])
        counts.append([dropped, remaining])
    return learned_schedule(config, counts)


def _reduce_tokens_(
    configs: list[PreTrainedConfig], dense: PreTrainedConfig, rng: random.Random
) -> None:
    """Give every second config a random token schedule, if such networks may have one.

    Every second one of these has all widths, as a search for tokens alone leaves them.
    """
    if not may_reduce_tokens(dense):
        return
    for number in range(1, len(configs), 2):
        if number % 4 == 1:
            configs[number] = copy.deepcopy(dense)
        configs[number].token_schedule = sample_schedule(dense, rng)


def _measure(
    fitted: list[PreTrainedModel],
    checked: list[PreTrainedModel],
    images: Tensor,
    wanted: LatencyTableArguments,
) -> tuple[list[Times], list[list[float]]]:
    """Time networks in turns.

    Args:
        fitted: networks whose parts are timed.
        checked: networks that are timed as a whole.
        images: (B, C, H, W).

    Returns:
        For each of the first its parts' times, for each of the others its times: milliseconds, the
        samples of all rounds.
    """
    clock = CLOCKS[wanted.clock]
    timelines = [Timeline(model, clock) for model in fitted]
    # samples of all rounds, by network
    times: list[Times] = [{} for _ in fitted]
    totals: list[list[float]] = [[] for _ in checked]
    num_turns = wanted.rounds * (len(fitted) + len(checked))
    with tqdm(total=num_turns, unit="turn", disable=wanted.disable_tqdm) as progress:
        for _ in range(wanted.rounds):
            for timeline, parts in zip(timelines, times, strict=True):
                for name, elapsed in _part_samples(timeline, images):
                    parts.setdefault(name, []).append(elapsed)
                progress.update()
            for model, total in zip(checked, totals, strict=True):
                total += _whole_samples(model, images, clock)
                progress.update()
    return times, totals


def _part_samples(timeline: Timeline, images: Tensor) -> Iterator[tuple[str, float]]:
    """Yield part and milliseconds, for every part of every pass of one turn."""
    for sample in turn(lambda: timeline(images)):
        yield from sample.items()


def _whole_samples(model: PreTrainedModel, images: Tensor, clock: Clock) -> list[float]:
    """Return the milliseconds of every pass of one turn."""
    return turn(lambda: whole_pass(model, images, clock))


def measured_latency(models: dict[str, PreTrainedModel], table: LatencyTable) -> dict[str, float]:
    """Measure the milliseconds of a batch under the settings of a table, the models taking turns.

    Returns:
        Model -> median; empty, with a warning, where the table's device is missing.
    """
    settings = table.settings
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        logger.warning(
            "the latency table was measured on a GPU and there is none here; latency is not "
            "measured."
        )
        return {}
    device = torch.device(settings["device"])
    dtype = getattr(torch, settings["dtype"])
    clock = CLOCKS[settings.get("clock", "wall")]  # tables of version 0.1 do not name it
    copies = {}
    for name, model in models.items():
        copies[name] = copy.deepcopy(model).eval().to(device, dtype)
    samples: Times = {name: [] for name in models}
    # many short turns: other work on the machine falls on all models
    with torch.inference_mode(), threads(settings["num_threads"]):
        for _ in range(ROUNDS):
            for name, model in copies.items():
                images = random_images(model.config, settings["batch_size"]).to(device, dtype)
                samples[name] += _whole_samples(model, images, clock)
    return {name: round(statistics.median(times), 4) for name, times in samples.items()}


def _points(networks: list[PreTrainedModel], times: list[Times]) -> list[dict[str, Any]]:
    """Return one entry per part of every network.

    Returns:
        Entries {"kind", one value per product of sizes, "ms": median time}.
    """
    points = []
    for network, samples in zip(networks, times, strict=True):
        architecture = describe(network.config)
        amounts = quantities(architecture.sizes)
        for part in architecture.parts:
            if part.name not in samples:  # a half of a block without units takes no time
                continue
            point = {"kind": part.kind, **amounts_of(part, amounts)}
            point["ms"] = statistics.median(samples[part.name])
            points.append(point)
    return points


def _fitted(
    points: list[dict[str, Any]],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Fit the coefficients of every kind of part to its points.

    Returns:
        kind -> {product: picoseconds}, and kind -> {"points": how many, "median", "worst": relative
        error of the fit}.
    """
    coefficients = {}
    residuals = {}
    kinds = dict.fromkeys(point["kind"] for point in points)  # each once, in order
    for kind in kinds:
        rows = [point for point in points if point["kind"] == kind]
        # all parts of a kind have the same products
        products = [name for name in rows[0] if name not in ("kind", "ms")]
        values = []
        times = []
        for row in rows:
            values.append([row[name] for name in products])
            times.append(PICOSECONDS * row["ms"])
        found = fit_coefficients(values, times)
        coefficients[kind] = dict(zip(products, found, strict=True))
        errors = []
        for amounts, elapsed in zip(values, times, strict=True):
            predicted = sum(c * amount for c, amount in zip(found, amounts, strict=True))
            errors.append(abs(predicted / elapsed - 1))
        residuals[kind] = {
            "points": len(rows),
            "median": statistics.median(errors),
            "worst": max(errors),
        }
    return coefficients, residuals


def _checked(
    table: LatencyTable, networks: list[PreTrainedModel], totals: list[list[float]]
) -> dict[str, Any]:
    """Compare the prediction for whole networks with what was measured.

    Args:
        totals: milliseconds of every pass, for each of the networks.
    """
    rows = []
    for network, samples in zip(networks, totals, strict=True):
        predicted = milliseconds(count_latency(network, table))
        measured = statistics.median(samples)
        row = {
            "predicted_ms": predicted,
            "measured_ms": measured,
            # on an idle machine the median of a whole pass is close to the fastest ones
            "fastest_tenth_ms": sorted(samples)[len(samples) // 10],
            "error": predicted / measured - 1,
        }
        schedule = getattr(network.config, "token_schedule", None)
        if schedule:
            row["token_schedule"] = schedule
        rows.append(row)
    errors = [abs(row["error"]) for row in rows]
    # how much longer a typical pass takes than a fast one, as a fraction
    unrest = [row["measured_ms"] / row["fastest_tenth_ms"] - 1 for row in rows]
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "unrest": statistics.median(unrest),
        "networks": rows,
    }


def table_text(table: LatencyTable) -> str:
    """Return what was measured, as text for people."""
    settings, check = table.settings, table.check
    conditions = [
        settings["device"],
        threads_text(settings["num_threads"]),
        f"batch {settings['batch_size']}",
        settings["dtype"],
        settings["engine"],
        f"{settings['clock']} time",
    ]
    error = f"{_percent(check['median_error'])} median, {_percent(check['worst_error'])} worst"
    lines = [
        f"{table.model} on {table.hardware}, {', '.join(conditions)}",
        "",
        text_table(_part_rows(table)),
        "",
        "whole networks, the dense one first:",
        text_table(_network_rows(check["networks"])),
        "",
        f"error: {error}",
    ]
    if check["unrest"] > UNREST:
        lines.append(
            f"The machine was busy: typical passes took {100 * check['unrest']:.0f} % longer than "
            "the fastest. Parts are short and seldom interrupted, so the prediction is closer to "
            "an idle machine; measure again on one."
        )
    return "\n".join(lines)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _part_rows(table: LatencyTable) -> list[list[str]]:
    """Return a header and how well each kind of part is fitted, as text."""
    rows = [["part", "points", "median error", "worst error"]]
    for kind, residual in table.residuals.items():
        errors = [_percent(residual["median"]), _percent(residual["worst"])]
        rows.append([kind, str(residual["points"]), *errors])
    return rows


def _network_rows(networks: list[dict[str, Any]]) -> list[list[str]]:
    """Return a header and how well the time of each whole network is predicted, as text."""
    rows = [["network", "predicted ms", "measured ms", "fastest tenth", "error"]]
    for number, row in enumerate(networks):
        name = f"random {number}" if number else "dense"
        if "token_schedule" in row:
            name += ", fewer tokens"
        columns = ("predicted_ms", "measured_ms", "fastest_tenth_ms")
        times = [f"{row[column]:.3f}" for column in columns]
        rows.append([name, *times, f"{100 * row['error']:+.1f} %"])
    return rows


def warn_if_elsewhere(table: LatencyTable | None, device: torch.device) -> None:
    """Warn if a table was measured on another machine or with other threads than this process has.

    Args:
        device: that this process computes on.
    """
    if table is None:
        return
    measured_on = torch.device(table.settings["device"])
    there = [table.hardware]
    if measured_on.type == "cpu":
        # a process that trains on a GPU has a CPU, too, and that one is compared
        here = [processor(measured_on), threads_text(torch.get_num_threads())]
        there.append(threads_text(table.settings["num_threads"]))
    else:
        here = [processor(device)]
    if here != there:
        logger.warning(
            f"the latency table was measured on {', '.join(there)}; this process runs on "
            f"{', '.join(here)}. Predictions are those of the table; measure one where the model "
            "will run."
        )
