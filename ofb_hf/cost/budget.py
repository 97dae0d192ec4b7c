"""What the result of a search may cost: MACs, parameters or milliseconds, each a sum of terms."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..families.description import Architecture, Part, Term, macs_of
from .latency import COMMAND, PICOSECONDS, LatencyTable

# The fields of which a search has one.
BUDGETS = ("target_macs", "target_params", "target_latency_ms")


@dataclass
class Budget:
    """The half of a search's config that knows about cost.

    Attributes:
        target_params: a field of searches for what has parameters. default_macs: the budget where
            none is given.
        table: the latency table, None if none is given.
    """

    target_macs: float | None = None
    target_latency_ms: float | None = field(
        default=None,
        metadata={
            "help": "Budget in milliseconds of one batch instead, as latency_table predicts them; "
            "always absolute."
        },
    )
    # In this order: the command line takes the second of a union's types.
    latency_table: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "File of `ofb-hf latency-table`, which measures this machine for this model; "
            "what it says becomes "
            "part of the config. Needed by target_latency_ms; beside other budgets the predicted "
            "latency is written "
            "down."
        },
    )

    target_params: ClassVar[float | None] = None
    default_macs: ClassVar[float] = 0.5
    table: ClassVar[LatencyTable | None] = None

    def check_budget(self) -> None:
        """Reads the latency table and fills in the default budget.

        Raises:
            ValueError: for several budgets, one that is no share and no count, and one in
                milliseconds without a table.
        """
        table = self.latency_table
        self.table = None if table is None else self._read_table(table)
        self.latency_table = None if self.table is None else self.table.without_points()
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(f'{name}={value}' for name, value in given.items())} are given "
                f"together; "
                "a search has one budget, give one of them."
            )
        if not given:
            self.target_macs = self.default_macs
        name, target = self.budget
        if (
            isinstance(target, bool)
            or not isinstance(target, int | float)
            or not 0 < target < math.inf
        ):
            allowed = "a share of the dense model in (0, 1] or an absolute number above 1"
            allowed = "milliseconds above 0" if name == "target_latency_ms" else allowed
            raise ValueError(f"{name} is {target!r}; give {allowed}.")
        if name == "target_latency_ms" and self.table is None:
            raise ValueError(
                f"target_latency_ms is {target}, but latency_table is not given, and how fast "
                f"this machine is has to "
                f"be measured first: {COMMAND}, then latency_table=FILE."
            )

    @staticmethod
    def _read_table(table: str | dict[str, Any] | LatencyTable) -> LatencyTable:
        if isinstance(table, LatencyTable):
            return table
        return (
            LatencyTable.from_dict(table) if isinstance(table, dict) else LatencyTable.load(table)
        )

    def require_fit(self, architecture: Architecture, *others: Architecture) -> None:
        """Raises ValueError, in words, unless the latency table, where there is one, was measured
        for a network like this one, and for all parts of others that a search may come to."""
        if self.table is not None:
            self.table.require_fit(architecture)
            for other in others:
                self.table.terms(other)

    @property
    def budget(self) -> tuple[str, float]:
        """Which budget is given, and its value: the field's name; share or absolute, or
        milliseconds."""
        return next(
            (name, getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None
        )

    @property
    def unit(self) -> int:
        """How much of the cost that terms count is 1 of an absolute budget: picoseconds in a
        millisecond, else 1."""
        return PICOSECONDS if self.budget[0] == "target_latency_ms" else 1

    def terms(self, architecture: Architecture) -> tuple[Term, ...]:
        """What the budget counts, as a sum of terms: MACs, parameters, or picoseconds."""
        return (
            architecture.params
            if self.target_params is not None
            else self.terms_of(architecture.parts)
        )

    def terms_of(self, parts: Iterable[Part]) -> tuple[Term, ...]:
        """The same of parts of the forward pass, which have no parameters."""
        return macs_of(parts) if self.unit == 1 else self.table.terms_of(parts)

    def target(self, dense_cost: int) -> int:
        """The budget as an absolute cost, given what the dense model costs; in the unit of the
        terms.

        Raises:
            ValueError: for a budget above what the dense model costs.
        """
        name, value = self.budget
        target = (
            round(value * self.unit)
            if self.unit > 1
            else int(value * dense_cost if value <= 1 else value)
        )
        if target > dense_cost:
            raise ValueError(
                f"{name} is {value:,}, more than the {self.show(dense_cost)} of the model itself; "
                f"nothing would be "
                "removed."
            )
        return target

    def absolute(self, cost: int) -> int | float:
        """A cost in the unit of the terms as one gives it for a budget: a count, or
        milliseconds."""
        return cost if self.unit == 1 else cost / self.unit

    def show(self, cost: int) -> str:
        """The same in words: exact, so that it can be typed as a budget."""
        return (
            f"{cost:,}"
            if self.unit == 1
            else f"{cost / self.unit:,.9f}".rstrip("0").rstrip(".") + " ms"
        )


class UnreachableBudgetError(ValueError):
    """The budget lies below the smallest subnet of the space.

    Args:
        message: in words. smallest: what that subnet costs, in the unit of the cost terms, where it
            is known.
    """

    def __init__(self, message: str, smallest: int | None = None):
        super().__init__(message)
        self.smallest = smallest
