"""Milliseconds as a cost like MACs and parameters: a sum of terms measured on one machine.

The forward pass is cut into parts: what comes before the first block, the attention and MLP halves
of every block with their norm and residual, the token reduction between them, patch merging, and
what comes after the last block. The time of a part is fitted as a sum of products of sizes and
tokens that work and memory traffic are proportional to (`families/forward_parts.py`). Coefficients
are 0 or positive, so that nothing gets faster by growing. The resulting terms are whole
picoseconds: the predicted latency of a network is exact arithmetic, however good the measurement
was.
"""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.description import Architecture, Part, Term, quantities
from ..families.subnet import SubnetSpec
from .counting import count_cost, evaluate_terms
from .latency_entries import COMMAND, check_entries

PICOSECONDS = 10**9  # in a millisecond
LATENCY_TABLE_FILE = "latency_table.json"


def amounts_of(part: Part, amounts: dict[str, int]) -> dict[str, int]:
    """Return the values of a part's products, given the value of every quantity."""
    values: dict[str, int] = {}
    for name, product in part.products.items():
        values[name] = evaluate_terms((product,), amounts)
    return values


def fit_coefficients(rows: list[list[int]], picoseconds: list[float]) -> list[float]:
    """Fit coefficients, 0 or positive, of a sum over products to measured times.

    Relative errors are minimised; coefficients have six digits.

    Args:
        rows: (P, K) values of the products of every point.
        picoseconds: (P,) how long each took.
    """
    times = np.array(picoseconds, dtype=np.float64)  # (P,)
    values = np.array(rows, dtype=np.float64)  # (P, K)
    num_products = values.shape[1]
    scale = np.maximum(values.max(0), 1.0)  # (K,), for the condition of the problem
    # Divided by the times, every row of the sum should be 1: that weighs relative errors.
    weighted = values / scale / times[:, None]  # (P, K)
    ones = np.ones(len(times))
    best = np.zeros(num_products)
    least = math.inf
    # Which coefficients are 0 in the least-squares solution is not known in advance; there are few
    # enough to try all subsets.
    for count in range(1, num_products + 1):
        for subset in itertools.combinations(range(num_products), count):
            chosen = list(subset)
            columns = weighted[:, chosen]  # (P, count)
            found = np.linalg.lstsq(columns, ones, rcond=None)[0]  # (count,)
            error = float(np.square(columns @ found - 1).sum())
            if (found >= 0).all() and error < least:
                least = error
                best = np.zeros(num_products)
                best[chosen] = found
    coefficients = (best / scale).tolist()
    return [float(f"{coefficient:.6g}") for coefficient in coefficients]


@dataclass
class LatencyTable:
    """The time of each forward part of one model on one machine, and how well it was predicted.

    Attributes:
        model: name of the measured model.
        sizes: submodule name -> its full units; a model with smaller ones fits as well.
        frame: what else has to be the same: patches, colour channels, activation, and MACs and
            parameters at `sizes`, which depend on tokens, labels, windows and biases.
        settings: batch size, threads, device, dtype, engine, attention kernel.
        hardware: of the machine.
        versions: of libraries on the machine.
        coefficients: kind of part -> {product: picoseconds}.
        residuals: kind of part -> {"points", "median", "worst"}, relative errors of the fit.
        check: {"median_error", "worst_error", "unrest", "networks"}: predicted and measured
            milliseconds of whole networks that were not fitted, and of the dense one; `unrest` is
            by how much medians lie above the fastest tenth of the passes, little on a quiet
            machine.
        points: the measurements: {"kind", one entry per product, "ms"}.

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
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or not 0 <= value < math.inf:
                    raise ValueError(
                        f"the coefficient of {product!r} in {kind!r} is {value!r}; it is a number "
                        f"of picoseconds, 0 or more. Measure the table again: {COMMAND}."
                    )

    def terms(self, architecture: Architecture) -> tuple[Term, ...]:
        """Return the predicted latency of a network, in picoseconds, as a sum over terms.

        Raises:
            ValueError: if a part of it has no coefficients here.
        """
        return self.terms_of(architecture.parts)

    def terms_of(self, parts: Iterable[Part]) -> tuple[Term, ...]:
        """Return the predicted latency of some forward parts; errors as `terms`."""
        terms: list[Term] = []
        for part in parts:
            known = self.coefficients.get(part.kind)
            if known is None or set(known) != set(part.products):
                raise ValueError(
                    f"the latency table of {self.model} has no {list(part.products)} for "
                    f"{part.kind!r}; measure one for this model: {COMMAND}."
                )
            for name, product in part.products.items():
                picoseconds = known[name]
                if picoseconds:
                    coefficient = _whole(picoseconds * product.coefficient)
                    terms.append(Term(coefficient, product.factors))
        return tuple(terms)

    def require_fit(self, architecture: Architecture) -> None:
        """Raise ValueError, with an explanation, unless the table is of a network or a larger one.

        Args:
            architecture: the measured one, or one that could be cut from it, with measured parts.
        """
        differing = self._differences(architecture)
        if differing:
            raise ValueError(
                f"the latency table is of {self.model}, which this model is no smaller version "
                f"of; (table, here) differ in {differing}. Measure one for this model, with as "
                f"many labels: {COMMAND}."
            )
        self.terms(architecture)

    def _differences(self, architecture: Architecture) -> dict[str, tuple[Any, Any]]:
        """Return why an architecture cannot be cut from the measured one: {what: (table, here)}."""
        measured = {name: tuple(size) for name, size in self.sizes.items()}
        here = architecture.sizes
        if list(measured) != list(here):
            return {"submodules": (_summary(measured), _summary(here))}
        for name, size in here.items():
            if len(size) != len(measured[name]):
                return {name: (measured[name], size)}
        differing: dict[str, tuple[Any, Any]] = {}
        for name, size in here.items():
            axes = zip(size, measured[name], strict=True)
            if any(units > full for units, full in axes):
                differing[name] = (measured[name], size)
                break  # one is enough for the message
        for name, value in frame_of(architecture, measured).items():
            if self.frame.get(name) != value:
                differing[name] = (self.frame.get(name), value)
        return differing

    def to_dict(self) -> dict[str, Any]:
        """Return all entries, for JSON."""
        return asdict(self)

    def without_points(self) -> dict[str, Any]:
        """Return what a prediction needs, and how good it is, without the measurements."""
        entries = self.to_dict()
        # Both are large, and no prediction needs them.
        del entries["points"]
        entries["check"].pop("networks", None)
        return entries

    @classmethod
    def from_dict(cls, values: Any) -> "LatencyTable":
        """Return the table with these entries.

        Raises:
            ValueError: for anything that is no latency table.
        """
        check_entries(values, {each.name for each in fields(cls)})
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Return the table in a file.

        Raises:
            ValueError: naming the file, if it does not exist or holds no latency table.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"latency_table {path} is no file; measure one: {COMMAND}. A run keeps its own in "
                f"its output_dir, as {LATENCY_TABLE_FILE}."
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
    """Return what the speed of a network depends on besides its sizes: `LatencyTable.frame`.

    Args:
        architecture: of the network.
        sizes: the full sizes, those of the table.
    """
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
    model: PreTrainedModel | PreTrainedConfig,
    table: LatencyTable,
    subnet: SubnetSpec | None = None,
) -> int:
    """Return the predicted latency of one batch in picoseconds.

    Args:
        model: as for `count_macs`; errors as well.
        table: measured for this model or a larger one.
        subnet: as for `count_macs`.
    """
    return count_cost(model, table.terms, subnet)


def threads_text(count: int) -> str:
    """Return a number of threads as text: `1 thread`, `2 threads`."""
    return f"{count} thread" if count == 1 else f"{count} threads"


def milliseconds(picoseconds: float) -> float:
    """Return a time in milliseconds."""
    return picoseconds / PICOSECONDS


def _whole(picoseconds: Any) -> Any:
    """Round numbers and arrays to whole numbers; leave scalar tensors, to be differentiated."""
    if isinstance(picoseconds, int | float):
        return round(picoseconds)
    if isinstance(picoseconds, np.ndarray):
        return np.rint(picoseconds)
    return picoseconds


def _summary(sizes: dict[str, tuple[int, ...]]) -> str:
    """Describe submodules in a few words, for messages."""
    return f"{len(sizes)}, the first {next(iter(sizes), 'none')!r}"
