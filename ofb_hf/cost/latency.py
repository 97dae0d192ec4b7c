"""Milliseconds as a cost like MACs and parameters: a sum of terms, with coefficients measured on
one machine.

The forward pass is cut into parts: what comes before the first block, the attention and MLP halves
of every block with their norm and residual, the reduction of tokens between them, patch merging,
and what comes after the last block. The time of a part is fitted as a sum of products of sizes and
tokens that work and memory traffic are proportional to (`parts.py`) with coefficients that are 0 or
positive, so that nothing gets faster by growing. The terms that they make are whole picoseconds: a
network's predicted latency is exact arithmetic, whatever the measurement was worth.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.description import Architecture, Part, Term, quantities
from ..families.subnet import SubnetSpec
from .counting import count_cost, evaluate_terms

PICOSECONDS = 10**9  # in a millisecond
LATENCY_TABLE_FILE = "latency_table.json"
COMMAND = "ofb-hf latency-table MODEL --output FILE"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dict_of(*types: type) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(each, types) for each in value.values())
    )


def _are_sizes(value: Any) -> bool:
    return _is_dict_of(list)(value) and all(
        size and all(map(_is_extent, size)) for size in value.values()
    )


def _is_extent(value: Any) -> bool:
    return value == 0 or _is_whole(value)


# What the entries of a table, and the settings under which latency is measured again later, have to
# be.
ENTRIES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "hardware"), _is_text),
    **dict.fromkeys(("frame", "settings", "versions", "check"), _is_dict_of(object)),
    **dict.fromkeys(("coefficients", "residuals"), _is_dict_of(dict)),
    "sizes": _are_sizes,
    "points": lambda value: isinstance(value, list),
}
SETTINGS = {
    "batch_size": _is_whole,
    "num_threads": _is_whole,
    "device": _is_text,
    "dtype": _is_text,
}


def amounts_of(part: Part, amounts: dict[str, int]) -> dict[str, int]:
    """The values of a part's products, given the value of every quantity."""
    return {name: evaluate_terms((product,), amounts) for name, product in part.products.items()}


def fit_coefficients(rows: list[list[int]], picoseconds: list[float]) -> list[float]:
    """Coefficients, 0 or positive, with which sums over products come closest to times, in relative
    terms; six digits.

    Args:
        rows: (P, K) values of the products of every point.
        picoseconds: (P,) how long each took.
    """
    times = np.array(picoseconds, dtype=np.float64)
    values = np.array(rows, dtype=np.float64)
    scale = np.maximum(values.max(0), 1.0)
    weighted = values / scale / times[:, None]
    best, least = np.zeros(values.shape[1]), math.inf
    # Which coefficients are 0 in the least-squares solution is not known beforehand; there are few
    # enough to try all.
    for count in range(1, values.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(values.shape[1]), count)):
            found = np.linalg.lstsq(weighted[:, chosen], np.ones(len(times)), rcond=None)[0]
            error = float(np.square(weighted[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(values.shape[1]), error
                best[chosen] = found
    return [float(f"{value:.6g}") for value in (best / scale).tolist()]


@dataclass
class LatencyTable:
    """What the parts of one model take on one machine, and how well that predicts whole networks.

    Attributes:
        model: what it was measured for.
        sizes: submodule name -> its full units; a model with smaller ones fits as well.
        frame: what else has to be the same: patches, colour channels, activation, and MACs and
            parameters at `sizes`, in which tokens, labels, windows and biases show.
        settings: batch size, threads, device, dtype, engine, attention kernel.
        hardware, versions: of the machine.
        coefficients: kind of part -> {product: picoseconds}.
        residuals: kind of part -> {"points", "median", "worst"}, relative errors of the fit.
        check: {"median_error", "worst_error", "unrest", "networks"}: predicted and measured
            milliseconds of whole networks that the fit did not see, and of the dense one; `unrest`
            is by how much medians lie above the fastest tenth of the passes, little on a quiet
            machine.
        points: what was measured: {"kind", one entry per product, "ms"}.

    Raises:
        ValueError: for coefficients that are no numbers of 0 or more.
    """

    model: str
    sizes: dict[str, list[int]]
    frame: dict[str, Any]
    settings: dict[str, Any]
    hardware: str
    versions: dict[str, str]
    coefficients: dict[str, dict[str, float]]
    residuals: dict[str, dict[str, float]] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self):
        for kind, products in self.coefficients.items():
            for product, value in products.items():
                if (
                    isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or not 0 <= value < math.inf
                ):
                    raise ValueError(
                        f"the coefficient of {product!r} in {kind!r} is {value!r}; it is a number "
                        f"of picoseconds, 0 or "
                        f"more. Measure the table again: {COMMAND}."
                    )

    def terms(self, architecture: Architecture) -> tuple[Term, ...]:
        """The predicted latency of a network, in picoseconds, as a cost; errors as `terms_of`."""
        return self.terms_of(architecture.parts)

    def terms_of(self, parts: Iterable[Part]) -> tuple[Term, ...]:
        """That of parts of one.

        Raises:
            ValueError: if a part has no coefficients here.
        """
        terms = []
        for part in parts:
            known = self.coefficients.get(part.kind)
            if known is None or set(known) != set(part.products):
                raise ValueError(
                    f"the latency table of {self.model} has no {list(part.products)} for "
                    f"{part.kind!r}; measure one "
                    f"for this model: {COMMAND}."
                )
            found = ((known[name], product) for name, product in part.products.items())
            terms += [
                Term(_whole(each * product.coefficient), product.factors)
                for each, product in found
                if each
            ]
        return tuple(terms)

    def require_fit(self, architecture: Architecture) -> None:
        """Raises ValueError, in words, unless an architecture is the measured one or could be cut
        from it, and all of its parts were measured."""
        theirs, ours = {name: tuple(size) for name, size in self.sizes.items()}, architecture.sizes
        differing: dict[str, tuple[Any, Any]] = {}
        if list(theirs) != list(ours):
            differing["submodules"] = (_summary(theirs), _summary(ours))
        else:
            other = [n for n, size in ours.items() if len(size) != len(theirs[n])]
            larger = other or [
                n
                for n, size in ours.items()
                if any(a > b for a, b in zip(size, theirs[n], strict=True))
            ]
            differing |= {name: (theirs[name], ours[name]) for name in (other or larger)[:1]}
            here = {} if other else frame_of(architecture, theirs)
            differing |= {
                n: (self.frame.get(n), here[n]) for n in here if self.frame.get(n) != here[n]
            }
        if differing:
            raise ValueError(
                f"the latency table is of {self.model}, which this model is no smaller version "
                f"of; (table, here) "
                f"differ in {differing}. Measure one for this model, with as many labels: "
                f"{COMMAND}."
            )
        self.terms(architecture)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def without_points(self) -> dict[str, Any]:
        """What a prediction needs, and how good it is: without the measurements behind it."""
        check = {name: value for name, value in self.check.items() if name != "networks"}
        return {name: value for name, value in self.to_dict().items() if name != "points"} | {
            "check": check
        }

    @classmethod
    def from_dict(cls, values: Any) -> "LatencyTable":
        """The table with these entries.

        Raises:
            ValueError: for anything that is no latency table.
        """
        known = {f.name for f in fields(cls)}
        needed = {"model", "sizes", "frame", "settings", "hardware", "versions", "coefficients"}
        if not isinstance(values, dict) or not needed <= set(values) <= known:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"this is no latency table: it has {got}, expected {sorted(known)}. Make one: "
                f"{COMMAND}."
            )
        for name, is_right in ENTRIES.items():
            if name in values and not is_right(values[name]):
                raise ValueError(
                    f"this is no latency table: {name} is {values[name]!r}. Make one: {COMMAND}."
                )
        if missing := [name for name in SETTINGS if name not in values["settings"]]:
            raise ValueError(
                f"this is no latency table: its settings have no {missing}. Make one: {COMMAND}."
            )
        if wrong := [
            name for name, is_right in SETTINGS.items() if not is_right(values["settings"][name])
        ]:
            given = {name: values["settings"][name] for name in wrong}
            raise ValueError(
                f"this is no latency table: its settings say {given}. Make one: {COMMAND}."
            )
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """The table that a file holds.

        Raises:
            ValueError: naming the file, if it is none or holds something else.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"latency_table {path} is no file; measure one: {COMMAND}. A run keeps its own in "
                f"its "
                f"output_dir, as {LATENCY_TABLE_FILE}."
            )
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"latency_table {path} is no JSON ({error}); measure one: {COMMAND}."
            ) from error
        except ValueError as error:
            raise ValueError(f"latency_table {path} cannot be read: {error}") from error


def frame_of(architecture: Architecture, sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What of a network decides its speed beside its sizes: `LatencyTable.frame` for the table's
    `sizes`."""
    amounts = quantities(sizes)
    return {
        "patch_grid": list(architecture.patch_grid),
        "patch_size": architecture.patch_size,
        "num_channels": architecture.num_channels,
        "activation": architecture.activation,
        "macs": evaluate_terms(architecture.macs, amounts),
        "params": evaluate_terms(architecture.params, amounts),
    }


def count_latency(
    model: PreTrainedModel | PreTrainedConfig, table: LatencyTable, subnet: SubnetSpec | None = None
) -> int:
    """Predicted latency of one batch in picoseconds; arguments and errors as `count_macs`."""
    return count_cost(model, table.terms, subnet)


def milliseconds(picoseconds: float) -> float:
    """The same time, for people."""
    return picoseconds / PICOSECONDS


def _whole(picoseconds: Any) -> Any:
    """The whole number next to a number, or those next to an array; scalar tensors, to be
    differentiated, stay."""
    if isinstance(picoseconds, int | float):
        return round(picoseconds)
    return np.rint(picoseconds) if isinstance(picoseconds, np.ndarray) else picoseconds


def _summary(sizes: dict[str, tuple[int, ...]]) -> str:
    return f"{len(sizes)}, the first {next(iter(sizes), 'none')!r}"
