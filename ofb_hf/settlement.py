"""The last word of a search: one candidate per submodule, worth as much as possible, exactly within the budget.

With the residual widths fixed, every other submodule costs a constant per unit, so the choice is a multiple-choice
knapsack. It is solved by dynamic programming over rounded costs, every solution is verified in exact integers, and
when rounding hides the few subnets that fit, an exact set of reachable costs finds one.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from .architectures import Term
from .flops import evaluate_terms

BINS = 2048
# More combinations of residual widths than this are searched one width at a time instead of all together.
MAX_COMBINATIONS = 256


class UnreachableBudgetError(ValueError):
    """The budget lies below the smallest subnet of the space."""


@dataclass(frozen=True)
class Option:
    """One candidate of a submodule: its size along each axis, and how good it would be to choose it."""

    size: tuple[int, ...]
    score: float

    @property
    def units(self) -> int:
        """Units kept: the product over the axes."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Settlement:
    """A choice for every submodule, its exact cost and its score."""

    choice: dict[str, Option]
    cost: int
    score: float


def settle(
    options: dict[str, list[Option]],
    terms: tuple[Term, ...],
    fixed: dict[str, int],
    target: int,
    tightness: float = 0.98,
) -> Settlement:
    """The best-scoring choice whose cost lies in [tightness * target, target].

    Args:
        options: candidates of every submodule that may still choose.
        terms: the cost as sums of products of at most two submodules.
        fixed: units of the submodules that have no choice.
        target: the budget, in the unit of the terms.
        tightness: how much of the budget to use, unless the space is too coarse.

    Returns:
        The best choice within the band; where no subnet lies in it, the most expensive one below it.

    Raises:
        UnreachableBudgetError: naming the smallest possible cost.
    """
    smallest = {name: min(candidates, key=lambda o: o.units) for name, candidates in options.items()}
    floor = evaluate_terms(terms, fixed | {name: option.units for name, option in smallest.items()})
    if floor > target:
        raise UnreachableBudgetError(
            f"the budget of {target:,} is below the smallest subnet of the search space, which costs {floor:,}; "
            "raise the target to at least that, or allow smaller candidates."
        )
    widths = _coupled(terms, set(options))
    problem = _Problem(options, terms, fixed, math.ceil(tightness * target), target)
    combinations = math.prod(len(options[name]) for name in widths)
    if combinations <= MAX_COMBINATIONS:
        solutions = [
            problem.solve(dict(zip(widths, combination, strict=True)))
            for combination in itertools.product(*(options[name] for name in widths))
        ]
        return max(filter(None, solutions), key=problem.rank)
    return _descend(problem, widths, {name: smallest[name] for name in widths})


def _descend(problem: "_Problem", widths: list[str], start: dict[str, Option]) -> Settlement:
    """Coordinate search over the residual widths: improves one at a time until none improves."""
    current, best = dict(start), problem.solve(start)
    improved = True
    while improved:
        improved = False
        for name in widths:
            for option in problem.options[name]:
                candidate = problem.solve(current | {name: option})
                if candidate is not None and (best is None or problem.rank(candidate) > problem.rank(best)):
                    best, improved = candidate, True
                    current = {width: candidate.choice[width] for width in widths}
    return best


def _coupled(terms: tuple[Term, ...], searched: set[str]) -> list[str]:
    """Submodules to fix so that the rest enters the cost linearly: the larger side of every product."""
    pairs = [term.factors for term in terms if len(term.factors) == 2 and set(term.factors) <= searched]
    degree: dict[str, int] = {}
    for name in itertools.chain.from_iterable(pairs):
        degree[name] = degree.get(name, 0) + 1
    widths: list[str] = []
    for first, second in sorted(pairs, key=lambda pair: -max(degree[name] for name in pair)):
        if first not in widths and second not in widths:
            widths.append(first if degree[first] >= degree[second] else second)
    return sorted(widths)


class _Problem:
    """The knapsack that remains once the residual widths are given."""

    def __init__(
        self, options: dict[str, list[Option]], terms: tuple[Term, ...], fixed: dict[str, int], lowest: int, target: int
    ):
        self.options, self.terms, self.fixed = options, terms, fixed
        self.lowest, self.target = lowest, target

    def rank(self, settlement: Settlement) -> tuple[bool, float, float]:
        """Sorting key: first those that use the budget, by score; then the rest, by cost."""
        within = settlement.cost >= self.lowest
        return within, settlement.score if within else settlement.cost, settlement.score

    def solve(self, widths: dict[str, Option]) -> Settlement | None:
        """The best settlement with these widths, None if they alone exceed the budget."""
        known = self.fixed | {name: option.units for name, option in widths.items()}
        names = [name for name in self.options if name not in widths]
        constant, rates = self._linear_costs(known, set(names))
        groups = [sorted(self.options[name], key=lambda o: o.units) for name in names]
        base = constant + sum(rates[name] * group[0].units for name, group in zip(names, groups, strict=True))
        room = self.target - base
        if room < 0:
            return None
        costs = [
            [rates[name] * (option.units - group[0].units) for option in group]
            for name, group in zip(names, groups, strict=True)
        ]
        lowest = self.lowest - base
        picks = _best_picks(costs, [[o.score for o in group] for group in groups], lowest, room)
        choice = widths | {name: group[pick] for name, group, pick in zip(names, groups, picks, strict=True)}
        choice = {name: choice[name] for name in self.options}
        cost = base + sum(row[pick] for row, pick in zip(costs, picks, strict=True))
        return Settlement(choice, cost, sum(option.score for option in choice.values()))

    def _linear_costs(self, known: dict[str, int], free: set[str]) -> tuple[int, dict[str, int]]:
        constant, rates = 0, dict.fromkeys(free, 0)
        for term in self.terms:
            value = term.coefficient * math.prod(known[name] for name in term.factors if name not in free)
            unknown = [name for name in term.factors if name in free]
            if unknown:
                rates[unknown[0]] += value
            else:
                constant += value
        return constant, rates


def _best_picks(costs: list[list[int]], scores: list[list[float]], lowest: int, room: int) -> list[int]:
    """One index per group: best total score with exact cost in [lowest, room], else the largest cost <= room."""
    if sum(map(max, costs)) < lowest:  # even everything at full size stays below the band
        return [
            max(range(len(row)), key=lambda i: (row[i], value[i])) for row, value in zip(costs, scores, strict=True)
        ]
    unit = max(1, -(-room // BINS))
    rounded = [[round(cost / unit) for cost in row] for row in costs]
    slack = len(costs)
    size = room // unit + slack + 1
    best, history = np.full(size, -np.inf), []
    best[0] = 0.0
    for steps, values in zip(rounded, scores, strict=True):
        table = np.full((len(steps), size), -np.inf)
        for index, (step, value) in enumerate(zip(steps, values, strict=True)):
            if step < size:
                table[index, step:] = best[: size - step] + value
        picked = table.argmax(0)
        history.append(picked)
        best = table[picked, np.arange(size)]
    for position in np.argsort(-best, kind="stable"):
        if best[position] == -np.inf:
            break
        picks = _trace(history, rounded, int(position))
        if lowest <= sum(row[pick] for row, pick in zip(costs, picks, strict=True)) <= room:
            return picks
    return _largest_picks(costs, scores, room)


def _trace(history: list[np.ndarray], rounded: list[list[int]], position: int) -> list[int]:
    picks = []
    for picked, steps in zip(reversed(history), reversed(rounded), strict=True):
        picks.append(int(picked[position]))
        position -= steps[picks[-1]]
    return picks[::-1]


def _largest_picks(costs: list[list[int]], scores: list[list[float]], room: int) -> list[int]:
    """The best-scoring of the picks whose cost comes closest to `room` from below, exactly.

    Bit b of a set means cost b is reachable; only choices on the way to the largest such cost are compared.
    """
    scale = math.gcd(*itertools.chain.from_iterable(costs)) or 1
    steps = [[cost // scale for cost in row] for row in costs]
    limit = (1 << (room // scale + 1)) - 1
    reachable = [1]
    for row in steps:
        following = 0
        for step in row:
            following |= reachable[-1] << step
        reachable.append(following & limit)

    @functools.cache
    def best(groups: int, position: int) -> tuple[float, tuple[int, ...]]:
        if not groups:
            return 0.0, ()
        answers = []
        for index, step in enumerate(steps[groups - 1]):
            if step <= position and reachable[groups - 1] >> (position - step) & 1:
                score, picks = best(groups - 1, position - step)
                answers.append((score + scores[groups - 1][index], (*picks, index)))
        return max(answers)

    return list(best(len(steps), reachable[-1].bit_length() - 1)[1])
