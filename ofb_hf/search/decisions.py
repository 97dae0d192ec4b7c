"""The choices of a search: what is open, what is best under the budget, and making it final."""

from collections.abc import Callable, Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from ..choice.problem import Candidates, Choice
from ..choice.scores import first_order_candidates, scored_candidates, search_scores
from ..choice.widths import WidthChoice
from ..cost.counting import ExpectedCost, evaluate_terms
from ..families.description import Architecture, Term, quantities
from ..families.registry import describe
from ..families.subnet import SubnetSpec, all_units
from ..masks.bi_mask import BiMask
from ..space.configuration import BiMaskConfig
from ..space.search_space import SearchSpace
from ..tokens.schedules import Schedule, full_schedule
from .searched_tokens import SearchedTokens

# Picks one of several choices within the budget.
Choose = Callable[[list[Choice]], Choice]


class Decisions(nn.Module):
    """The choices of a supernet: which are open, which is best within the budget, and making them.

    It reads and changes bi-masks and tokens that belong to the supernet. Its state is in them: it
    adds nothing to a state dict.

    Args:
        model: the classifier, with its full widths; it shrinks later.
        config: what is searched, and the budget.
        space: the candidates of every searched submodule.
        bi_masks: one for each submodule of the space, in its order.
        tokens: the searched tokens, or None.

    Attributes:
        dense_architecture: of the model before the search.
        dense_cost, target: cost of that model, and the budget, in the budget's unit.
        expected_cost, expected_macs: modules that turn amounts of the quantities (Q,) into a scalar
            cost, in the budget's unit and in MACs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: BiMaskConfig,
        space: SearchSpace,
        bi_masks: nn.ModuleList,
        tokens: SearchedTokens | None,
    ):
        super().__init__()
        # In a tuple: these are modules of the supernet, not of this one.
        self._decided = (model, bi_masks, tokens)
        self.config = config
        self.space = space
        self.dense_architecture = describe(model.config)
        self.dense_cost = evaluate_terms(self.terms, quantities(self.dense_sizes))
        self.target = config.target(self.dense_cost)
        self.expect_costs_()

    @property
    def model(self) -> PreTrainedModel:
        """The classifier of the supernet as it is now."""
        return self._decided[0]

    @property
    def bi_masks(self) -> nn.ModuleList:
        """The bi-masks of the supernet."""
        return self._decided[1]

    @property
    def tokens(self) -> SearchedTokens | None:
        """The searched tokens of the supernet, None where tokens are not searched."""
        return self._decided[2]

    @property
    def dense_sizes(self) -> dict[str, tuple[int, ...]]:
        """Submodule name -> its units in the model before the search."""
        return self.dense_architecture.sizes

    # ------------------------------------------------------------------------------ what it costs

    @property
    def decided_architecture(self) -> Architecture:
        """The model under the token schedule that was decided on, whether it acts yet or not."""
        if self.tokens is None:
            return describe(self.model.config)
        return self.tokens.architecture(self.model.config)

    @property
    def terms(self) -> tuple[Term, ...]:
        """What the budget counts: MACs, parameters or picoseconds."""
        return self.config.terms(self.decided_architecture)

    def expect_costs_(self) -> None:
        """Bring the differentiable costs up to date with the decided token schedule."""
        names = list(quantities(self.dense_sizes))
        device = self.model.device
        self.expected_cost = ExpectedCost(self.terms, names).to(device)
        self.expected_macs = ExpectedCost(self.decided_architecture.macs, names).to(device)

    # ------------------------------------------------------------------------------- what is open

    @property
    def leaders(self) -> dict[str, str]:
        """Submodule name -> the submodule whose choice it follows: its own unless it is tied."""
        return {space.name: space.tied_to or space.name for space in self.space}

    @property
    def groups(self) -> list[list[BiMask]]:
        """The bi-masks that choose together, the one that owns the choice first."""
        leaders = self.leaders
        groups: dict[str, list[BiMask]] = {}
        for mask in self.bi_masks:
            groups.setdefault(leaders[mask.name], []).append(mask)
        return list(groups.values())

    @property
    def num_active_candidates(self) -> int:
        """The number of candidates that have not retired, over all submodules that choose."""
        counts = [leader.active_candidates.sum() for leader, *_ in self.groups]
        # Added up on the device: reading each count would wait for it.
        return int(torch.stack(counts).sum())

    @property
    def is_settled(self) -> bool:
        """Whether every submodule has one candidate left."""
        return self.num_active_candidates == len(self.groups)

    @property
    def token_schedule(self) -> Schedule | None:
        """The schedule that was decided on, also one of all tokens; None while there is none."""
        return None if self.tokens is None else self.tokens.decided

    # ---------------------------------------------------------------------------- the best choice

    def candidates(self) -> Candidates:
        """Return every active candidate of every submodule that chooses, with its score."""
        terms = self.terms
        return scored_candidates(
            self.groups, lambda mask: search_scores(mask, terms, self.dense_sizes)
        )

    def best_choice(self) -> Choice:
        """Return the best choice within the budget as things stand, undecided tokens included.

        Returns:
            A choice for every searched submodule.

        Raises:
            UnreachableBudgetError: naming the smallest possible cost.
        """
        return self._best_choice(self.candidates())

    def _best_choice(
        self,
        candidates: Candidates,
        observed: float | None = None,
        choose: Choose | None = None,
    ) -> Choice:
        """Return the best choice among scored candidates.

        Args:
            candidates: of every submodule that chooses.
            observed: sum of the first-order scores of all units, if `candidates` have those.
            choose: picks among choices that differ in how much of the budget tokens give up; by
                default the one with the best score.
        """
        if self.tokens is None:
            return self._best_widths(candidates, self.terms)

        # The cost of a width depends on the numbers of tokens, so widths are chosen anew for every
        # schedule that is tried.
        def solve(architecture: Architecture, kept: Collection[str]) -> Choice:
            return self._best_widths(candidates, self.config.terms(architecture), kept)

        return self.tokens.best_choice(
            config=self.model.config,
            sizes=self.dense_sizes,
            target=self.target,
            total=observed,
            cost=self.config.terms_of,
            solve=solve,
            choose=choose,
        )

    def _best_widths(
        self,
        candidates: Candidates,
        terms: tuple[Term, ...],
        kept: Collection[str] = (),
    ) -> Choice:
        """Return the best widths under some cost terms.

        Args:
            candidates: of every submodule that chooses, with scores.
            terms: the cost.
            kept: submodules that have to keep units.
        """
        widths = WidthChoice(self.space, self.dense_architecture, self.target, self.config.show)
        return widths.best(candidates, terms, kept)

    # ----------------------------------------------------------------------------------- deciding

    def estimate_importance_(self, choose: Choose | None = None) -> None:
        """Set importance from observed gradients, and decide on tokens with it.

        Importance is high for the units that the best choice within the budget keeps, if each unit
        is worth its first-order score. If nothing was observed, importance stays.

        Args:
            choose: picks among choices that differ in how much of the budget tokens give up.
        """
        candidates = first_order_candidates(self.groups)
        if not candidates:
            return
        observed = sum(float(mask.first_order.double().sum()) for mask in self.bi_masks)
        choice = self._best_choice(candidates, observed, choose)
        self.decide_tokens_(choice.token_schedule)
        for mask in self.bi_masks:
            mask.estimate_importance_(choice.candidates[mask.name].units)

    def fit_alpha_(self) -> None:
        """Fit every alpha to the importance curve of its submodule, tied ones to their mean."""
        # Tied submodules share an alpha, which cannot follow each curve.
        for leader, *tied in self.groups:
            curves = [mask.importance_by_rank() for mask in (leader, *tied)]
            leader.fit_alpha_(curve=torch.stack(curves).mean(0))

    def retire_candidates(self) -> int:
        """Retire weak candidates and return how many.

        Those of the best choice within the budget are spared, so the budget stays within reach
        whatever the softmaxes do.
        """
        best = self.best_choice().candidates
        retired = 0
        for leader, *tied in self.groups:
            weak = leader.weak_candidates(self.config.retire_threshold)
            weak[leader.index_of(best[leader.name].size)] = False
            if weak.any():
                for mask in (leader, *tied):
                    mask.retire_(weak)
                retired += int(weak.sum())
        return retired

    def settle_to_(self, subnet: SubnetSpec) -> None:
        """Make a choice final that was made elsewhere.

        Args:
            subnet: units, and perhaps tokens, of a network that nothing was cut from yet.
        """
        if self.tokens is not None:
            self.decide_tokens_(subnet.token_schedule or full_schedule(self.model.config))
        for mask in self.bi_masks:
            mask.settle_to_(subnet.kept[mask.name])

    def settle_(self) -> SubnetSpec:
        """Make the best choice final in every submodule and return the subnet.

        The gates of the removed units are exactly 0 from now on.
        """
        choice = self.best_choice()
        self.decide_tokens_(choice.token_schedule)
        for mask in self.bi_masks:
            mask.settle_(*choice.candidates[mask.name].size)
        # A subnet names the submodules that were not searched as well.
        kept = {name: all_units(shape) for name, shape in self.dense_sizes.items()}
        for mask in self.bi_masks:
            kept[mask.name] = mask.kept()
        schedule = self.token_schedule
        if schedule is not None:
            # A config has none where all tokens stay.
            schedule = self.model.config.stored_schedule(schedule)
        return SubnetSpec(kept, schedule, self.config.basis)

    def decide_tokens_(self, schedule: Schedule | None) -> None:
        """Decide on a token schedule unless it is None; it acts once widths are settled and cut."""
        if schedule is not None:
            self.tokens.decide_(schedule)
            self.expect_costs_()
