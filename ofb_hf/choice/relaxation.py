"""Lagrangian relaxation: which residual widths are worth looking at, when there are too many.

Instead of a limit, cost gets a price p >= 0, and the choice x that maximises

    L(x, p) = score(x) - p * cost(x)

is found exactly. It is the best of all choices that cost no more than it does. Its cost falls as
the price rises (Everett, Operations Research 11, 1963), so bisection finds the price at which it
meets the budget. The choices on the way are good for budgets near the given one, and their widths
are where a search by exact costs starts.

Maximising L is easy because its couplings have the form of a tree. A term of the cost with the
sizes of two submodules ties these together: each attention and each MLP to its residual width, and
each width to that of the next stage. So submodules are eliminated from the leaves inwards, as in
dynamic programming over a tree (max-sum message passing). Leaf a with gains G_a, tied to b by the
costs C_ab, hands b what the best response to each candidate j of b is worth:

    G_b[j] += max_i ( G_a[i] - p * C_ab[i, j] ) .
"""

import math

import numpy as np

from .problem import Problem, Sizes

# Bisection steps; each one is a price at which the relaxation is solved.
STEPS = 40

# Two submodules that a term of the cost ties together.
Pair = tuple[str, str]


def promising_widths(problem: Problem) -> list[Sizes]:
    """Return the widths of the best choices at prices around the one that meets the budget."""
    relaxation = Relaxation(problem)
    # `low` is a price at which the choice is too expensive, `high` one at which it fits.
    low = 0.0
    high = 1.0 / problem.target
    while relaxation.solve(high)[1] > problem.target:
        low = high
        high = 4 * high
    found: list[Sizes] = []
    for _ in range(STEPS):
        price = (low + high) / 2
        choice, cost = relaxation.solve(price)
        if cost > problem.target:
            low = price
        else:
            high = price
        widths = {name: choice[name] for name in problem.widths}
        if widths not in found:
            found.append(widths)
    return found


class Relaxation:
    """The choice that maximises score - price x cost, exactly.

    Args:
        problem: its terms must tie the submodules together in one tree or several.

    Attributes:
        scores: of the candidates of each submodule, (K,).
        costs: what the candidates cost on their own, (K,).
        pairs: what candidates of two submodules that are tied together cost, (K_a, K_b); each pair
            is stored both ways, as (a, b) and transposed as (b, a).
        constant: what everything costs in any case.
        order: each submodule and the one that it is tied to when it is eliminated, None for the
            last of a tree; leaves come first.

    Raises:
        ValueError: if terms tie submodules together in a circle.
    """

    def __init__(self, problem: Problem):
        self.candidates = problem.candidates
        self.scores: dict[str, np.ndarray] = {}
        self.costs: dict[str, np.ndarray] = {}
        for name, row in problem.candidates.items():
            self.scores[name] = np.array([candidate.score for candidate in row])
            self.costs[name] = np.zeros(len(row))
        self.constant = 0.0
        self.pairs: dict[Pair, np.ndarray] = {}
        self._add_terms(problem)
        self.order = self._leaves_first()

    def _add_terms(self, problem: Problem) -> None:
        """Add every term of the cost to the constant, to `costs` or to `pairs`."""
        for term in problem.terms:
            known = [problem.fixed.get(factor, 1) for factor in term.factors]
            value = float(term.coefficient) * math.prod(known)
            free = [factor for factor in term.factors if factor not in problem.fixed]
            owners = [problem.owners[factor] for factor in free]
            amounts = [problem.amounts[factor] for factor in free]
            if not free:
                self.constant += value
            elif len(free) == 1:
                self.costs[owners[0]] += value * amounts[0]
            else:
                first, second = owners
                table = value * np.multiply.outer(*amounts)  # (K_first, K_second)
                self._add_pair(first, second, table)
                self._add_pair(second, first, table.T)

    def _add_pair(
        self,
        first: str,
        second: str,
        table: np.ndarray,
    ) -> None:
        """Add costs (K_first, K_second) of two submodules to those of other terms."""
        costs = self.pairs.get((first, second), 0.0)
        self.pairs[first, second] = costs + table

    def _leaves_first(self) -> list[tuple[str, str | None]]:
        """Return the order of elimination: each submodule and its only remaining neighbour."""
        neighbours: dict[str, set[str]] = {}
        for name in self.candidates:
            neighbours[name] = set()
        for first, second in self.pairs:
            neighbours[first].add(second)
        order: list[tuple[str, str | None]] = []
        while neighbours:
            leaf = min(neighbours, key=lambda name: len(neighbours[name]))
            around = neighbours[leaf]
            if len(around) > 1:
                raise ValueError(
                    f"the costs tie {sorted(neighbours)} together in a circle; they must form a "
                    "tree."
                )
            del neighbours[leaf]
            parent = next(iter(around), None)
            if parent is not None:
                neighbours[parent].discard(leaf)
            order.append((leaf, parent))
        return order

    def solve(self, price: float) -> tuple[Sizes, float]:
        """Return the best choice at a price and its cost."""
        gains = {}  # of each candidate with the best responses of what was eliminated, (K,)
        for name, scores in self.scores.items():
            gains[name] = scores - price * self.costs[name]
        responses = {}  # the best candidate for each candidate of the parent, (K_parent,)
        for name, parent in self.order:
            if parent is None:
                responses[name] = gains[name].argmax()
                continue
            pair_costs = self.pairs[name, parent]  # (K, K_parent)
            gain = gains[name][:, None] - price * pair_costs
            responses[name] = gain.argmax(0)
            gains[parent] = gains[parent] + gain.max(0)
        # Back from the last eliminated one, so that the parent's pick is known.
        picks: dict[str, int] = {}
        for name, parent in reversed(self.order):
            response = responses[name]
            if parent is not None:
                response = response[picks[parent]]
            picks[name] = int(response)
        choice = {name: self.candidates[name][pick] for name, pick in picks.items()}
        return choice, self._cost_of(picks)

    def _cost_of(self, picks: dict[str, int]) -> float:
        """Return the cost of one candidate of each submodule, given by its index."""
        own_costs = []
        for name, pick in picks.items():
            own_costs.append(self.costs[name][pick])
        pair_costs = []
        for (first, second), table in self.pairs.items():
            pair_costs.append(table[picks[first], picks[second]])
        # Every pair is stored both ways.
        return self.constant + sum(own_costs) + sum(pair_costs) / 2
