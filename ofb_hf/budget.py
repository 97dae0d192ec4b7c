"""What the result of a search may cost: MACs, parameters or milliseconds, each a sum of terms."""

import math
from typing import Any

from .latency import COMMAND, PICOSECONDS, LatencyTable
from .unit_groups import Architecture, Term

# The fields of which a search has one.
BUDGETS = ("target_macs", "target_params", "target_latency_ms")


class Budget:
    """The half of a search's config that knows about cost. `BiMaskConfig` has the fields.

    Attributes:
        table: the latency table, None if none is given.
    """

    target_macs: float | None
    target_params: float | None
    target_latency_ms: float | None
    latency_table: dict[str, Any] | str | None
    table: LatencyTable | None

    def check_budget(self) -> None:
        """Reads the latency table and fills in the default budget.

        Raises:
            ValueError: for several budgets, one that is no share and no count, and one in milliseconds without a table.
        """
        table = self.latency_table
        self.table = None if table is None else self._read_table(table)
        self.latency_table = None if self.table is None else self.table.without_points()
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(f'{name}={value}' for name, value in given.items())} are given together; "
                "a search has one budget, give one of them."
            )
        if not given:
            self.target_macs = 0.5
        name, target = self.budget
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < math.inf:
            allowed = "a share of the dense model in (0, 1] or an absolute number above 1"
            allowed = "milliseconds above 0" if name == "target_latency_ms" else allowed
            raise ValueError(f"{name} is {target!r}; give {allowed}.")
        if name == "target_latency_ms" and self.table is None:
            raise ValueError(
                f"target_latency_ms is {target}, but latency_table is not given, and how fast this machine is has to "
                f"be measured first: {COMMAND}, then latency_table=FILE."
            )

    @staticmethod
    def _read_table(table: str | dict[str, Any]) -> LatencyTable:
        return LatencyTable.from_dict(table) if isinstance(table, dict) else LatencyTable.load(table)

    @property
    def budget(self) -> tuple[str, float]:
        """Which budget is given, and its value: the field's name; share or absolute, or milliseconds."""
        return next((name, getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None)

    @property
    def unit(self) -> int:
        """How much of the cost that terms count is 1 of an absolute budget: picoseconds in a millisecond, else 1."""
        return PICOSECONDS if self.budget[0] == "target_latency_ms" else 1

    def terms(self, architecture: Architecture) -> tuple[Term, ...]:
        """What the budget counts, as a sum of terms: MACs, parameters, or picoseconds."""
        name, _ = self.budget
        return self.table.terms(architecture) if self.unit > 1 else getattr(architecture, name.removeprefix("target_"))

    def target(self, dense_cost: int) -> int:
        """The budget as an absolute cost, given what the dense model costs; in the unit of the terms."""
        _, target = self.budget
        if self.unit > 1:
            return round(target * self.unit)
        return int(target * dense_cost) if target <= 1 else int(target)

    def absolute(self, cost: int) -> int | float:
        """A cost in the unit of the terms as one gives it for a budget: a count, or milliseconds."""
        return cost if self.unit == 1 else cost / self.unit

    def show(self, cost: int) -> str:
        """The same in words, rounded up where it is rounded."""
        return f"{cost:,}" if self.unit == 1 else f"{math.ceil(1e4 * cost / self.unit) / 1e4:,.4f} ms"
