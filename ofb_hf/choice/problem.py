"""A choice under a budget as a problem: candidates of every submodule and what they cost together.

The cost is a sum of terms, each a coefficient times at most two quantities (units of one submodule
or of two). Two submodules in a term make the problem quadratic. But they are always a residual
width and something along it: with the widths given, every other submodule costs a constant per
unit, and what remains is a multiple-choice knapsack (`choice/picks.py`).
"""

import math
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from ..families.description import Term, quantities
from .picks import best_picks


@dataclass(frozen=True)
class Candidate:
    """One candidate of a submodule: its size along each axis, and how good it would be to choose
    it."""

    size: tuple[int, ...]
    score: float

    @property
    def units(self) -> int:
        """Units kept: the product over the axes."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Choice:
    """One candidate for every submodule, with exact cost and score.

    With a token schedule where tokens are chosen as well.
    """

    candidates: dict[str, Candidate]
    cost: int
    score: float
    token_schedule: list[list[int]] | None = None


# The candidates of every submodule that may still choose, by its name.
Candidates = dict[str, list[Candidate]]
# One candidate of each of some submodules.
Sizes = dict[str, Candidate]


class Problem:
    """Find the best choice whose cost lies in [lowest, target], for given residual widths.

    Args:
        candidates: of every submodule that may still choose.
        terms: the cost as sums of products of at most two quantities.
        fixed: the quantities of the submodules that have no choice.
        lowest: cost from which on the budget counts as used.
        target: the budget.

    Attributes:
        owners: quantity -> the submodule that it belongs to.
        amounts: quantity -> its value for each candidate of its owner, (K,).
        widths: submodules to fix, so that the others enter the cost linearly.
        smallest: the smallest candidate of each of the widths.
        floor: the least that any choice costs.
    """

    def __init__(
        self,
        candidates: Candidates,
        terms: tuple[Term, ...],
        fixed: dict[str, int],
        lowest: int,
        target: int,
    ):
        self.candidates = candidates
        self.terms = terms
        self.fixed = fixed
        self.lowest = lowest
        self.target = target
        self.owners: dict[str, str] = {}
        self.amounts: dict[str, np.ndarray] = {}
        for name, row in candidates.items():
            # Quantities of a submodule are its units, its heads and its presence.
            rows = [quantities({name: candidate.size}) for candidate in row]
            for quantity in rows[0]:
                values = [amounts[quantity] for amounts in rows]
                self.owners[quantity] = name
                self.amounts[quantity] = np.array(values)  # (K,)
        self.widths = self._coupling_submodules()
        self.smallest: Sizes = {
            name: min(candidates[name], key=attrgetter("units")) for name in self.widths
        }
        constant, costs = self._linear_costs(self.smallest)
        self.floor = constant + sum(map(min, costs.values()))

    def _coupling_submodules(self) -> list[str]:
        """Return the submodules to fix so that every term has one open factor at most.

        That is a vertex cover of the pairs that occur in terms. It is built greedily: of each pair
        the submodule that occurs in more pairs, which is the residual width of a stage.
        """
        pairs = []
        degree: dict[str, int] = {}
        for term in self.terms:
            names = [self.owners[factor] for factor in term.factors if factor in self.owners]
            if len(names) == 2:
                pairs.append(tuple(names))
                for name in names:
                    degree[name] = degree.get(name, 0) + 1

        def largest_degree(pair: tuple[str, str]) -> int:
            return max(degree[name] for name in pair)

        # `reverse` keeps the order of equal ones, as sorting does.
        pairs.sort(key=largest_degree, reverse=True)
        widths: list[str] = []
        for first, second in pairs:
            if first not in widths and second not in widths:
                widths.append(first if degree[first] >= degree[second] else second)
        return sorted(widths)

    def rank(self, choice: Choice) -> tuple[bool, float, float]:
        """Return a sorting key: first the choices that use the budget, by score; then by cost."""
        within = choice.cost >= self.lowest
        return within, choice.score if within else choice.cost, choice.score

    def solve(self, widths: Sizes) -> Choice | None:
        """Return the best choice with these widths, None if none of them is within the budget."""
        constant, costs = self._linear_costs(widths)
        # What is left of the budget when everything else has its cheapest candidate is the room of
        # the knapsack, whose costs count from there.
        base = constant + sum(map(min, costs.values()))
        if base > self.target:
            return None
        costs_above_base = []
        scores = []
        for name, row in costs.items():
            cheapest = min(row)
            costs_above_base.append([cost - cheapest for cost in row])
            scores.append([candidate.score for candidate in self.candidates[name]])
        picked = best_picks(
            costs_above_base,
            scores,
            lowest=self.lowest - base,
            room=self.target - base,
        )
        picks = dict(zip(costs, picked, strict=True))
        chosen: Sizes = {}  # in the order of the candidates
        for name, row in self.candidates.items():
            if name in picks:
                chosen[name] = row[picks[name]]
            else:
                chosen[name] = widths[name]
        cost = constant
        for name, pick in picks.items():
            cost += costs[name][pick]
        score = sum(candidate.score for candidate in chosen.values())
        return Choice(chosen, cost, score)

    def _linear_costs(self, widths: Sizes) -> tuple[int, dict[str, list[int]]]:
        """Return the cost of the widths alone, and that of each candidate of the others with them.

        Args:
            widths: candidates of all of `self.widths`.
        """
        sizes = {name: candidate.size for name, candidate in widths.items()}
        known = self.fixed | quantities(sizes)
        constant = 0
        rates: dict[str, int] = {}  # quantity -> cost of one of it
        for term in self.terms:
            value = term.coefficient
            unknown = None
            for factor in term.factors:
                if factor in known:
                    value *= known[factor]
                else:
                    unknown = factor
            if unknown is None:
                constant += value
            else:
                rates[unknown] = rates.get(unknown, 0) + value
        # Whole numbers, in arithmetic that is exact up to 9.2e18.
        costs = {}  # (K,) each
        for name, row in self.candidates.items():
            if name not in widths:
                costs[name] = np.zeros(len(row), dtype=np.int64)
        for quantity, rate in rates.items():
            costs[self.owners[quantity]] += rate * self.amounts[quantity]
        return constant, {name: row.tolist() for name, row in costs.items()}
