"""The last word of a search: one candidate per submodule, worth as much as possible, exactly within
the budget.

With the residual widths fixed, every other submodule costs a constant per unit, so the choice is a
multiple-choice knapsack. It is solved by dynamic programming over rounded costs, every solution is
verified in exact integers, and when rounding hides the few subnets that fit, an exact set of
reachable costs finds one. One residual width is tried in all its sizes; several are first narrowed
down by giving cost a price (a Lagrangian relaxation), which is easy to solve.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from ..cost.budget import UnreachableBudgetError
from ..families.description import Term, quantities

BINS = 2048
# Costs of every size below the budget are told apart exactly up to so many. Picoseconds are far
# more: they are rounded, to so few that there are not as many ways to each of them as there are
# networks.
REACHABLE, ROUNDED = 2**22, 2**16
# How much of the budget a choice is to use, where the space is fine enough.
TIGHTNESS = 0.98
# Up to this many combinations of residual widths are all tried; beyond, the search starts where a
# relaxation points.
MAX_COMBINATIONS = 64
# In a coarse space it may end below the band although something lies in it: up to so many are all
# tried after all.
MAX_COMBINATIONS_BELOW = 4096
RELAXATION_STEPS = 40


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
    """A choice for every submodule, its exact cost and score; and a token schedule where tokens are
    chosen, too."""

    candidates: dict[str, Candidate]
    cost: int
    score: float
    token_schedule: list[list[int]] | None = None


def best_choice(
    options: dict[str, list[Candidate]],
    terms: tuple[Term, ...],
    fixed: dict[str, int],
    target: int,
    tightness: float = TIGHTNESS,
    needed: Collection[str] = (),
    show: Callable[[int], str] = "{:,}".format,
) -> Choice:
    """The best-scoring choice whose cost lies in [tightness * target, target].

    Args:
        options: candidates of every submodule that may still choose.
        terms: the cost as sums of products of at most two quantities.
        fixed: the quantities of the submodules that have no choice.
        target: the budget, in the unit of the terms.
        tightness: how much of the budget to use, unless the space is too coarse.
        needed: submodules, chosen or fixed, of which at least one has to keep units.
        show: a cost in words, for messages.

    Returns:
        The best choice within the band; where no subnet lies in it, the most expensive one below
        it, up to a millionth of the budget.

    Raises:
        UnreachableBudgetError: naming the smallest possible cost.
    """
    lowest = math.ceil(tightness * target)
    free = _Problem(options, terms, fixed, lowest, target)
    restricted = [
        _Problem(each, terms, fixed, lowest, target)
        for each in _that_keep_one(options, fixed, needed)
    ]
    floor = min(problem.floor for problem in restricted or [free])
    if floor > target:
        raise UnreachableBudgetError(
            f"the budget of {show(target)} is below the smallest subnet of the search space, "
            f"which costs "
            f"{show(floor)}; raise the target to at least that, or allow smaller candidates.",
            floor,
        )
    best = _solve(free)
    if not restricted or any(
        best.candidates[name].units for name in needed if name in best.candidates
    ):
        return best
    return max(
        (_solve(problem) for problem in restricted if problem.floor <= target), key=free.rank
    )


def _that_keep_one(
    options: dict[str, list[Candidate]], fixed: dict[str, int], needed: Collection[str]
) -> list[dict[str, list[Candidate]]]:
    """Restrictions of the options that together cover every choice in which a needed submodule has
    units.

    Empty if every choice is one.
    """
    kept = {
        name: [option for option in options[name] if option.units]
        for name in needed
        if name in options
    }
    if any(fixed.get(name) for name in needed) or any(kept[name] == options[name] for name in kept):
        return []
    return [options | {name: present} for name, present in kept.items() if present]


def _solve(problem: "_Problem") -> Choice:
    """The best choice of a problem that has one."""
    options, smallest = problem.options, problem.smallest
    combinations = math.prod(len(options[name]) for name in problem.widths)
    if combinations > MAX_COMBINATIONS:
        best = _climb(problem, [smallest, *_promising_widths(problem)])
        if best.cost >= problem.lowest or combinations > MAX_COMBINATIONS_BELOW:
            return best
    every = (
        dict(zip(problem.widths, c, strict=True))
        for c in itertools.product(*map(options.get, problem.widths))
    )
    return max(filter(None, map(problem.solve, every)), key=problem.rank)


def _climb(problem: "_Problem", starts: list[dict[str, Candidate]]) -> Choice:
    """Starts from the best of the given widths and moves one width at a time to a neighbour while
    that helps."""
    best = max(filter(None, map(problem.solve, starts)), key=problem.rank)
    improved = True
    while improved:
        improved = False
        for name in problem.widths:
            widths = {width: best.candidates[width] for width in problem.widths}
            ordered = sorted(problem.options[name], key=lambda o: o.units)
            at = ordered.index(widths[name])
            for option in ordered[max(0, at - 1) : at] + ordered[at + 1 : at + 2]:
                candidate = problem.solve(widths | {name: option})
                if candidate is not None and problem.rank(candidate) > problem.rank(best):
                    best, improved = candidate, True
    return best


def _promising_widths(problem: "_Problem") -> list[dict[str, Candidate]]:
    """Widths of the best choices when cost has a price instead of a limit, at prices around the one
    that meets it."""
    relaxation = _Relaxation(problem)
    # a price below which the choice is too expensive, one above
    below, above = 0.0, 1.0 / problem.target
    while relaxation.solve(above)[1] > problem.target:
        below, above = above, 4 * above
    found = []
    for _ in range(RELAXATION_STEPS):
        price = (below + above) / 2
        choice, cost = relaxation.solve(price)
        below, above = (price, above) if cost > problem.target else (below, price)
        widths = {name: choice[name] for name in problem.widths}
        if widths not in found:
            found.append(widths)
    return found


class _Relaxation:
    """The choice that maximises score - price x cost, exactly.

    Products of two submodules' sizes tie these together; the ties form a tree (a block to its
    residual width, a width to the next), so submodules can be maximised out from the leaves
    inwards.
    """

    def __init__(self, problem: "_Problem"):
        self.options = problem.options
        self.scores = {
            name: np.array([o.score for o in options]) for name, options in problem.options.items()
        }
        self.costs = {name: np.zeros(len(options)) for name, options in problem.options.items()}
        self.constant = 0.0
        self.pairs: dict[tuple[str, str], np.ndarray] = {}
        for term in problem.terms:
            free = [factor for factor in term.factors if factor not in problem.fixed]
            value = float(term.coefficient) * math.prod(
                problem.fixed.get(factor, 1) for factor in term.factors
            )
            owners, amounts = [problem.owners[f] for f in free], [problem.amounts[f] for f in free]
            if not free:
                self.constant += value
            elif len(free) == 1:
                self.costs[owners[0]] += value * amounts[0]
            else:
                table = value * np.multiply.outer(*amounts)
                for pair, entries in ((tuple(owners), table), (tuple(owners[::-1]), table.T)):
                    self.pairs[pair] = self.pairs.get(pair, 0.0) + entries

    def solve(self, price: float) -> tuple[dict[str, Candidate], float]:
        """The best choice and its cost."""
        gains = {name: self.scores[name] - price * self.costs[name] for name in self.options}
        ties = {name: {b for a, b in self.pairs if a == name} for name in self.options}
        order = []
        while ties:
            name = min(ties, key=lambda n: len(ties[n]))
            if len(ties[name]) > 1:
                raise ValueError(
                    f"the costs tie {sorted(ties)} together in a circle; they must form a tree."
                )
            for other in ties.pop(name):
                gain = gains[name][:, None] - price * self.pairs[name, other]
                order.append((name, other, gain.argmax(0)))
                gains[other] = gains[other] + gain.max(0)
                ties[other].discard(name)
                break
            else:
                order.append((name, None, gains[name].argmax()))
        picks: dict[str, int] = {}
        for name, other, best in reversed(order):
            picks[name] = int(best if other is None else best[picks[other]])
        cost = self.constant + sum(self.costs[name][pick] for name, pick in picks.items())
        # stored both ways
        cost += sum(table[picks[a], picks[b]] for (a, b), table in self.pairs.items()) / 2
        return {name: self.options[name][pick] for name, pick in picks.items()}, cost


class _Problem:
    """The knapsack that remains once the residual widths are given."""

    def __init__(
        self,
        options: dict[str, list[Candidate]],
        terms: tuple[Term, ...],
        fixed: dict[str, int],
        lowest: int,
        target: int,
    ):
        self.options, self.terms, self.fixed = options, terms, fixed
        self.lowest, self.target = lowest, target
        rows = {
            name: [quantities({name: option.size}) for option in options[name]] for name in options
        }
        self.owners = {quantity: name for name, row in rows.items() for quantity in row[0]}
        self.amounts = {
            q: np.array([amounts[q] for amounts in rows[name]]) for q, name in self.owners.items()
        }
        self.widths = self._coupled()
        self.smallest = {name: min(options[name], key=lambda o: o.units) for name in self.widths}
        self.floor = self._smallest_cost()

    def _coupled(self) -> list[str]:
        """Submodules to fix so that the rest enters the cost linearly: the larger side of every
        product."""
        tied = [[self.owners[f] for f in term.factors if f in self.owners] for term in self.terms]
        pairs = [tuple(names) for names in tied if len(names) == 2]
        degree: dict[str, int] = {}
        for name in itertools.chain.from_iterable(pairs):
            degree[name] = degree.get(name, 0) + 1
        widths: list[str] = []
        for first, second in sorted(pairs, key=lambda pair: -max(degree[name] for name in pair)):
            if first not in widths and second not in widths:
                widths.append(first if degree[first] >= degree[second] else second)
        return sorted(widths)

    def rank(self, choice: Choice) -> tuple[bool, float, float]:
        """Sorting key: first those that use the budget, by score; then the rest, by cost."""
        within = choice.cost >= self.lowest
        return within, choice.score if within else choice.cost, choice.score

    def _smallest_cost(self) -> int:
        """The least that any choice costs."""
        constant, costs = self._linear_costs(self.smallest)
        return constant + sum(map(min, costs.values()))

    def solve(self, widths: dict[str, Candidate]) -> Choice | None:
        """The best choice with these widths, None if nothing with them is within the budget."""
        constant, costs = self._linear_costs(widths)
        base = constant + sum(map(min, costs.values()))
        if base > self.target:
            return None
        above = [[cost - min(row) for cost in row] for row in costs.values()]
        scores = [[option.score for option in self.options[name]] for name in costs]
        picks = dict(
            zip(
                costs,
                _best_picks(above, scores, self.lowest - base, self.target - base),
                strict=True,
            )
        )
        choice = {
            name: self.options[name][picks[name]] if name in picks else widths[name]
            for name in self.options
        }
        cost = constant + sum(costs[name][pick] for name, pick in picks.items())
        return Choice(choice, cost, sum(option.score for option in choice.values()))

    def _linear_costs(self, widths: dict[str, Candidate]) -> tuple[int, dict[str, list[int]]]:
        """What the widths cost, and what each option of every other submodule costs beside them."""
        known = self.fixed | quantities({name: option.size for name, option in widths.items()})
        constant, rates = 0, {}
        for term in self.terms:
            value = term.coefficient * math.prod(known.get(factor, 1) for factor in term.factors)
            free = [factor for factor in term.factors if factor not in known]
            if free:
                rates[free[0]] = rates.get(free[0], 0) + value
            else:
                constant += value
        costs = {
            name: np.zeros(len(self.options[name]), dtype=np.int64)
            for name in self.options
            if name not in widths
        }
        for quantity, rate in rates.items():
            costs[self.owners[quantity]] += rate * self.amounts[quantity]
        return constant, {name: row.tolist() for name, row in costs.items()}


def _best_picks(
    costs: list[list[int]], scores: list[list[float]], lowest: int, room: int
) -> list[int]:
    """One index per group: best total score with exact cost in [lowest, room], else the largest
    cost <= room."""
    if sum(map(max, costs)) < lowest:  # even everything at full size stays below the band
        return [
            max(range(len(row)), key=lambda i: (row[i], value[i]))
            for row, value in zip(costs, scores, strict=True)
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

    Bit b of a set means cost b is reachable; only choices on the way to the largest such cost are
    compared. Where there are more than `REACHABLE` costs, each is rounded up, so that what is
    chosen still fits.
    """
    scale = max(math.gcd(*itertools.chain.from_iterable(costs)), 1)
    if room // scale > REACHABLE:
        scale = room // ROUNDED
    steps = [[-(-cost // scale) for cost in row] for row in costs]
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
