"""The best widths of a search space under a budget, with submodules that are tied together."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ..families.description import Architecture, Term, heads_of, presence_of, quantities
from ..space.search_space import SearchSpace
from .knapsack import TIGHTNESS, best_choice
from .problem import Candidates, Choice


class WidthChoice:
    """Choose the widths of a space under one budget, for any costs of them.

    Args:
        space: the submodules to choose for.
        dense: the architecture before any choice; what is not in the space keeps its units.
        target: the budget, in the unit of the costs.
        show: formats a cost for messages.

    Attributes:
        leaders: submodule -> the one whose choice it follows: its own unless it is tied.
    """

    def __init__(
        self,
        space: SearchSpace,
        dense: Architecture,
        target: int,
        show: Callable[[int], str] = "{:,}".format,
    ):
        self.leaders = {each.name: each.tied_to or each.name for each in space}
        self.attentions = dense.attentions
        self.target = target
        self.show = show
        fixed = {name: size for name, size in dense.sizes.items() if name not in self.leaders}
        self.fixed = quantities(fixed)

    def best(
        self, candidates: Candidates, terms: tuple[Term, ...], kept: Collection[str] = ()
    ) -> Choice:
        """Return the best widths, of every submodule of the space.

        Args:
            candidates: of every leader, with the scores of those that follow it added.
            terms: the cost.
            kept: submodules that have to keep units.

        Raises:
            UnreachableBudgetError: naming the smallest possible cost.
        """
        allowed = dict(candidates)
        for name in kept:
            if name in self.leaders:  # one that is not searched keeps its units anyway
                leader = self.leaders[name]
                allowed[leader] = [candidate for candidate in allowed[leader] if candidate.units]
        choice = best_choice(
            allowed,
            _of_leaders(terms, self.leaders),
            self.fixed,
            self.target,
            tightness=TIGHTNESS,
            needed=self.attentions,
            show=self.show,
        )
        followed = {name: choice.candidates[leader] for name, leader in self.leaders.items()}
        return replace(choice, candidates=followed)


def _of_leaders(terms: tuple[Term, ...], leaders: Mapping[str, str]) -> tuple[Term, ...]:
    """Return cost terms in which the quantities of a tied submodule are those of its leader."""
    follows: dict[str, str] = {}
    for name, leader in leaders.items():
        for quantity_of in (str, heads_of, presence_of):
            follows[quantity_of(name)] = quantity_of(leader)
    renamed = []
    for term in terms:
        factors = tuple(follows.get(factor, factor) for factor in term.factors)
        renamed.append(replace(term, factors=factors))
    return tuple(renamed)
