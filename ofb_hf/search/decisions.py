"""What a search has still to choose, and the choices: under the budget, of widths, and of tokens
with them."""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..choice.knapsack import TIGHTNESS, Candidate, Choice, best_choice
from ..choice.scores import first_order_candidates, scored_candidates, search_scores
from ..cost.counting import ExpectedCost
from ..families.description import Architecture, Term, heads_of, presence_of, quantities
from ..families.subnet import SubnetSpec, all_units
from ..masks.bi_mask import BiMask
from ..space.configuration import BiMaskConfig
from ..space.search_space import SearchSpace
from ..tokens.schedules import Schedule
from .searched_tokens import SearchedTokens


class Choices(nn.Module):
    """The deciding half of a `Supernet`, which says what its attributes are."""

    bi_masks: nn.ModuleList
    bi_mask_config: BiMaskConfig
    space: SearchSpace
    tokens: SearchedTokens | None
    model: nn.Module
    architecture: Architecture
    dense_architecture: Architecture
    dense_sizes: dict[str, tuple[int, ...]]
    target: int
    lam: Tensor

    @property
    def terms(self) -> tuple[Term, ...]:
        """What the budget counts: MACs, parameters or picoseconds."""
        return self.bi_mask_config.terms(self.decided_architecture)

    @property
    def decided_architecture(self) -> Architecture:
        """The model with the tokens that were decided on, whether they act yet or not."""
        return self.architecture if self.tokens is None else self.tokens.architecture(self.config)

    def expect_costs_(self) -> None:
        """Brings the differentiable costs up to date with what was decided about tokens."""
        names = list(quantities(self.dense_sizes))
        for name, terms in (
            ("expected_cost", self.terms),
            ("expected_macs", self.decided_architecture.macs),
        ):
            setattr(self, name, ExpectedCost(terms, names).to(self.model.device))

    @property
    def named_masks(self) -> dict[str, BiMask]:
        """Submodule name -> its bi-mask."""
        return {mask.name: mask for mask in self.bi_masks}

    @property
    def leaders(self) -> dict[str, str]:
        """Submodule name -> the submodule whose choice it follows; its own name unless it is
        tied."""
        return {space.name: space.tied_to or space.name for space in self.space}

    @property
    def groups(self) -> list[list[BiMask]]:
        """The bi-masks that choose together, the one that owns the choice first."""
        groups: dict[str, list[BiMask]] = {}
        for mask in self.bi_masks:
            groups.setdefault(self.leaders[mask.name], []).append(mask)
        return list(groups.values())

    @property
    def num_active_candidates(self) -> int:
        """Candidates still in the race, over all submodules that choose for themselves."""
        return int(
            torch.stack([leader.active_candidates.sum() for leader, *_ in self.groups]).sum()
        )

    @property
    def is_settled(self) -> bool:
        """Whether every submodule has one candidate left."""
        return self.num_active_candidates == len(self.groups)

    def options(self) -> dict[str, list[Candidate]]:
        """Every active candidate of every submodule that chooses, with its score."""
        return scored_candidates(
            self.groups, lambda mask: search_scores(mask, self.terms, self.dense_sizes)
        )

    def best_choice(
        self,
        options: dict[str, list[Candidate]] | None = None,
        choose: Callable[[list[Choice]], Choice] | None = None,
    ) -> Choice:
        """The best choice within the budget as things stand, for every searched submodule, and for
        undecided tokens.

        Args:
            options: with first-order scores instead of those of `options`.
            choose: as for `SearchedTokens.best_choice`.

        Raises:
            UnreachableBudgetError: naming the smallest possible cost.
        """
        total = (
            None
            if options is None
            else sum(float(mask.first_order.double().sum()) for mask in self.bi_masks)
        )
        options = options or self.options()
        if self.tokens is None:
            return self._best_widths(options, self.terms)

        def solve(architecture: Architecture, kept: Collection[str]) -> Choice:
            return self._best_widths(options, self.bi_mask_config.terms(architecture), kept)

        cost = self.bi_mask_config.terms_of
        return self.tokens.best_choice(
            config=self.config,
            sizes=self.dense_sizes,
            target=self.target,
            total=total,
            cost=cost,
            solve=solve,
            choose=choose,
        )

    def _best_widths(
        self,
        options: dict[str, list[Candidate]],
        terms: tuple[Term, ...],
        kept: Collection[str] = (),
    ) -> Choice:
        """The best widths under these cost terms, if the submodules that are named keep units."""
        for name in {self.leaders[name] for name in kept if name in self.leaders}:
            options = options | {name: [option for option in options[name] if option.units]}
        fixed = quantities(
            {name: size for name, size in self.dense_sizes.items() if name not in self.named_masks}
        )
        named = (str, heads_of, presence_of)
        follows = {
            quantity(name): quantity(leader)
            for name, leader in self.leaders.items()
            for quantity in named
        }
        terms = tuple(
            replace(term, factors=tuple(follows.get(f, f) for f in term.factors)) for term in terms
        )
        settings = {"needed": self.dense_architecture.attentions, "show": self.bi_mask_config.show}
        choice = best_choice(options, terms, fixed, self.target, tightness=TIGHTNESS, **settings)
        followed = {name: choice.candidates[leader] for name, leader in self.leaders.items()}
        return replace(choice, candidates=followed)

    def settle_(self) -> SubnetSpec:
        """Makes the final choice in every submodule and returns it; the units left out are exactly
        0 from now on."""
        choice = self.best_choice()
        self.decide_tokens_(choice.token_schedule)
        for mask in self.bi_masks:
            mask.settle_(*choice.candidates[mask.name].size)
        kept = {name: all_units(shape) for name, shape in self.dense_sizes.items()}
        schedule = self.token_schedule and self.config.meant_schedule(self.token_schedule)
        return SubnetSpec(kept | {mask.name: mask.kept() for mask in self.bi_masks}, schedule)

    def retire_candidates(self) -> int:
        """Retires weak candidates, except those of the best choice within the budget. Returns how
        many.

        Sparing that choice keeps the budget within reach whatever the softmaxes do.
        """
        best = self.best_choice().candidates
        retired = 0
        for leader, *tied in self.groups:
            weak = leader.weak_candidates(self.bi_mask_config.retire_threshold)
            weak[leader.index_of(best[leader.name].size)] = False
            if weak.any():
                for mask in (leader, *tied):
                    mask.retire_(weak)
                retired += int(weak.sum())
        return retired

    def estimate_importance_(self, choose: Callable[[list[Choice]], Choice] | None = None) -> None:
        """Sets importance from the gradients that were observed: high for the units that the best
        choice within the budget keeps, if each unit is worth its first-order score. Without any
        observation importance stays.

        Args:
            choose: as for `SearchedTokens.best_choice`.
        """
        if options := first_order_candidates(self.groups):
            choice = self.best_choice(options, choose)
            self.decide_tokens_(choice.token_schedule)
            for mask in self.bi_masks:
                mask.estimate_importance_(choice.candidates[mask.name].units)

    def decide_tokens_(self, schedule: Schedule | None) -> None:
        """Decides on a token schedule, if it is one; it acts once widths are settled and cut."""
        if schedule is not None:
            self.tokens.decide_(schedule)
            self.expect_costs_()

    def watch_tokens_(self, on: bool) -> None:
        """Begins to observe tokens, where they are searched, or ends it."""
        if self.tokens is not None and not self.tokens.acts:
            self.tokens.watch_(self.model, on)

    @property
    def first_order_of_tokens(self) -> Tensor:
        """The buffer of what was observed of tokens, (layers, K); without any entry where they are
        not searched."""
        return self.lam.new_zeros(0) if self.tokens is None else self.tokens.first_order

    @property
    def token_schedule(self) -> Schedule | None:
        """The schedule that was decided on, also one of all tokens; None while there is none."""
        return None if self.tokens is None else self.tokens.decided

    def fit_alpha_(self) -> None:
        """Fits every alpha to the importance curve of its submodule, or to the mean of those tied
        together."""
        for leader, *tied in self.groups:
            curves = [mask.importance_by_rank() for mask in (leader, *tied)]
            leader.fit_alpha_(curve=torch.stack(curves).mean(0))
