"""The best choice under a budget: one candidate per submodule, never above the budget.

With the residual widths fixed, every other submodule costs a constant per unit, so the choice is a
multiple-choice knapsack (`choice/problem.py`, `choice/picks.py`). What is left is which widths to
fix. One residual width, as in a ViT, is tried in all its sizes. Several, as in a Swin, have too
many combinations: a relaxation proposes some (`choice/relaxation.py`), and from the best of them
one width at a time moves to a neighbour.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable
from operator import attrgetter

from ..cost.budget import UnreachableBudgetError
from ..families.description import Term
from .problem import Candidate, Candidates, Choice, Problem, Sizes
from .relaxation import promising_widths

# Fraction of the budget that a choice has to use, where the space is fine enough.
TIGHTNESS = 0.98
# Up to this many combinations of residual widths are all tried; beyond, the search starts where a
# relaxation points.
MAX_COMBINATIONS = 64
# In a coarse space that search may end below the band although some choice lies in it. Up to this
# many combinations are then all tried after all.
MAX_COMBINATIONS_BELOW = 4096


def best_choice(
    candidates: Candidates,
    terms: tuple[Term, ...],
    fixed: dict[str, int],
    target: int,
    *,
    tightness: float = TIGHTNESS,
    needed: Collection[str] = (),
    show: Callable[[int], str] = "{:,}".format,
) -> Choice:
    """Return the best-scoring choice whose cost lies in [tightness * target, target].

    Args:
        candidates: of every submodule that may still choose.
        terms: the cost as sums of products of at most two quantities.
        fixed: the quantities of the submodules that have no choice.
        target: the budget, in the unit of the terms.
        tightness: fraction of the budget to use, unless the space is too coarse.
        needed: submodules, chosen or fixed, of which at least one has to keep units.
        show: formats a cost for messages.

    Returns:
        The best choice within the band; where no subnet lies in it, the most expensive one below
        it, up to a millionth of the budget.

    Raises:
        UnreachableBudgetError: naming the smallest possible cost.
    """
    lowest = math.ceil(tightness * target)
    free = Problem(candidates, terms, fixed, lowest, target)
    restricted = [
        Problem(each, terms, fixed, lowest, target)
        for each in _that_keep_one(candidates, fixed, needed)
    ]
    floor = min(problem.floor for problem in restricted or [free])
    if floor > target:
        raise UnreachableBudgetError(
            f"the budget of {show(target)} is below the smallest subnet of the search space, which "
            f"costs {show(floor)}; raise the target to at least that, or allow smaller candidates.",
            floor,
        )
    # Usually the best choice keeps some needed submodule anyway. Where it does not, it is the best
    # of those that must keep a certain one.
    best = _solve(free)
    chosen = [best.candidates[name] for name in needed if name in best.candidates]
    if not restricted or any(candidate.units for candidate in chosen):
        return best
    reachable = [problem for problem in restricted if problem.floor <= target]
    return max(map(_solve, reachable), key=free.rank)


def _that_keep_one(
    candidates: Candidates,
    fixed: dict[str, int],
    needed: Collection[str],
) -> list[Candidates]:
    """Return restrictions of the candidates under which a needed submodule keeps units.

    Together they cover every choice in which one does. Empty if that is every choice.
    """
    if any(fixed.get(name) for name in needed):
        return []
    restrictions = []
    for name in needed:
        if name not in candidates:
            continue
        present = [candidate for candidate in candidates[name] if candidate.units]
        if present == candidates[name]:
            return []
        if present:
            restrictions.append(candidates | {name: present})
    return restrictions


def _solve(problem: Problem) -> Choice:
    """Return the best choice of a problem that has one."""
    # Without widths there is one combination, the empty one.
    candidates_of_widths = [problem.candidates[name] for name in problem.widths]
    combinations = math.prod(map(len, candidates_of_widths))
    if combinations > MAX_COMBINATIONS:
        best = _climb(problem, [problem.smallest, *promising_widths(problem)])
        if best.cost >= problem.lowest or combinations > MAX_COMBINATIONS_BELOW:
            return best
    every = []
    for combination in itertools.product(*candidates_of_widths):
        every.append(dict(zip(problem.widths, combination, strict=True)))
    return _best_of(problem, every)


def _best_of(
    problem: Problem,
    widths: Iterable[Sizes],
) -> Choice:
    """Return the best choice under any of the given widths, of which some must fit."""
    found = []
    for each in widths:
        choice = problem.solve(each)
        if choice is not None:
            found.append(choice)
    return max(found, key=problem.rank)


def _climb(
    problem: Problem,
    starts: list[Sizes],
) -> Choice:
    """Start from the best of the given widths and move one at a time while that helps."""
    best = _best_of(problem, starts)
    improved = True
    while improved:
        improved = False
        for name in problem.widths:
            # Both neighbours start from the same widths, also if the first one is an improvement.
            widths = {width: best.candidates[width] for width in problem.widths}
            for neighbour in _neighbours(problem.candidates[name], widths[name]):
                choice = problem.solve(widths | {name: neighbour})
                if choice is not None and problem.rank(choice) > problem.rank(best):
                    best = choice
                    improved = True
    return best


def _neighbours(
    candidates: list[Candidate],
    current: Candidate,
) -> list[Candidate]:
    """Return the next smaller and the next larger candidate, as far as there are such."""
    ordered = sorted(candidates, key=attrgetter("units"))
    at = ordered.index(current)
    smaller = ordered[max(0, at - 1) : at]
    larger = ordered[at + 1 : at + 2]
    return smaller + larger
