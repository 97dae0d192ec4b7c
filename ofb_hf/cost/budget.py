"""What the result of a search may cost: MACs, parameters or milliseconds, each a sum of terms.

Budgets are checked and converted here; `choice/knapsack.py` enforces them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..families.description import Architecture, Part, Term, macs_of
from .latency import PICOSECONDS, LatencyTable
from .latency_entries import COMMAND

# The fields of which a search gets one.
BUDGETS = ("target_macs", "target_params", "target_latency_ms")


@dataclass
class Budget:
    """The half of a search's config that knows about cost.

    Attributes:
        target_params: a field of searches for what has parameters.
        default_macs: the budget if none is given.
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
            "its content becomes part of the config. Needed by target_latency_ms; with other "
            "budgets the predicted latency is reported as well."
        },
    )

    target_params: ClassVar[float | None] = None
    default_macs: ClassVar[float] = 0.5
    table: ClassVar[LatencyTable | None] = None

    def check_budget(self) -> None:
        """Read the latency table and fill in the default budget.

        Raises:
            ValueError: for several budgets, a budget that is no fraction and no count, and one in
                milliseconds without a table.
        """
        if self.latency_table is not None:
            self.table = _read_table(self.latency_table)
            self.latency_table = self.table.without_points()
        budgets = {name: getattr(self, name) for name in BUDGETS}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) > 1:
            settings = [f"{name}={value}" for name, value in given.items()]
            listed = " and ".join(settings)
            raise ValueError(
                f"{listed} are given together; a search has one budget, give one of them."
            )
        if not given:
            self.target_macs = self.default_macs
        name, target = self.budget
        is_number = isinstance(target, int | float) and not isinstance(target, bool)
        if not is_number or not 0 < target < math.inf:
            allowed = "a fraction of the dense model in (0, 1] or an absolute number above 1"
            if name == "target_latency_ms":
                allowed = "milliseconds above 0"
            raise ValueError(f"{name} is {target!r}; give {allowed}.")
        if name == "target_latency_ms" and self.table is None:
            raise ValueError(
                f"target_latency_ms is {target}, but latency_table is not given, and how fast "
                f"this machine is has to be measured first: {COMMAND}, then latency_table=FILE."
            )

    def require_fit(self, architecture: Architecture, *others: Architecture) -> None:
        """Raise ValueError, with an explanation, if the latency table is of another network.

        Args:
            architecture: the table has to be of this network or a larger one.
            others: the table has to have all of their parts; a search may come to them.
        """
        if self.table is None:
            return
        self.table.require_fit(architecture)
        for other in others:
            self.table.terms(other)

    @property
    def budget(self) -> tuple[str, float]:
        """The given budget: the name of its field, and its value."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        return given[0], getattr(self, given[0])

    @property
    def unit(self) -> int:
        """How many units of the cost terms make 1 of an absolute budget: picoseconds in a
        millisecond, else 1."""
        return PICOSECONDS if self.budget[0] == "target_latency_ms" else 1

    def terms(self, architecture: Architecture) -> tuple[Term, ...]:
        """Return what the budget counts, as a sum of terms: MACs, parameters, or picoseconds."""
        if self.target_params is not None:
            return architecture.params
        return self.terms_of(architecture.parts)

    def terms_of(self, parts: Iterable[Part]) -> tuple[Term, ...]:
        """Return what a budget in MACs or milliseconds counts of some forward parts."""
        return macs_of(parts) if self.unit == 1 else self.table.terms_of(parts)

    def target(self, dense_cost: int) -> int:
        """Return the budget as an absolute cost, in the unit of the terms.

        Args:
            dense_cost: what the dense model costs.

        Raises:
            ValueError: for a budget above that.
        """
        name, value = self.budget
        if self.unit > 1:
            # Milliseconds are always absolute.
            target = round(value * self.unit)
        else:
            target = int(value * dense_cost if value <= 1 else value)
        if target > dense_cost:
            raise ValueError(
                f"{name} is {value:,}, more than the {self.show(dense_cost)} of the model itself; "
                "nothing would be removed."
            )
        return target

    def absolute(self, cost: int) -> int | float:
        """Convert a cost from the unit of the terms to that of a budget: a count, or
        milliseconds."""
        return cost if self.unit == 1 else cost / self.unit

    def show(self, cost: int) -> str:
        """Return the same as text: exact, so that it can be typed as a budget."""
        if self.unit == 1:
            return f"{cost:,}"
        # Nine decimals of a millisecond are whole picoseconds.
        milliseconds = f"{cost / self.unit:,.9f}"
        shortened = milliseconds.rstrip("0").rstrip(".")
        return f"{shortened} ms"


def _read_table(table: str | dict[str, Any] | LatencyTable) -> LatencyTable:
    """Return a latency table that is given as a file, as its entries, or as it is."""
    if isinstance(table, LatencyTable):
        return table
    if isinstance(table, dict):
        return LatencyTable.from_dict(table)
    return LatencyTable.load(table)


class UnreachableBudgetError(ValueError):
    """The budget lies below the smallest subnet of the space.

    Args:
        message: the explanation.
        smallest: what that subnet costs, in the unit of the cost terms, where it is known.
    """

    def __init__(self, message: str, smallest: int | None = None):
        super().__init__(message)
        self.smallest = smallest
