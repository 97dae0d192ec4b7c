"""Tokens in the search for widths: observed with the units, chosen with them, reduced with the cut.

While units are observed, the same gradients also tell for every layer what merging its tokens down
to n would do to the loss: the first-order change, squared, as for a unit. So the choice can weigh
units against tokens. Until the model is cut no token is merged, because hidden patches are
repainted from all tokens.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTConfig

from ..choice.knapsack import TIGHTNESS, Choice
from ..choice.schedule_candidates import (
    SMALLEST_COUNT,
    attention_of,
    best_schedule,
    candidate_schedules,
    reducing_layers,
    spread_choices,
)
from ..choice.scores import IMPORTANCE_SCORE
from ..cost.budget import UnreachableBudgetError
from ..families.description import Architecture, quantities
from ..families.token_reduction import scheduled, set_token_reduction_, token_reductions
from ..models.modeling_ofb_vit import rank_tokens
from ..tokens.schedules import Cost, Schedule, full_schedule, num_tokens, ranking_layers

# Numbers of tokens to which merging is tried in each layer.
TRIED = 16


def tried_counts(tokens: int) -> list[int]:
    """Return the numbers of tokens to which merging is tried, from 2 to one less than all.

    They are about evenly spaced on a scale of square roots.
    """
    smallest = SMALLEST_COUNT**0.5
    largest = (tokens - 1) ** 0.5
    roots = np.linspace(smallest, largest, TRIED)
    return sorted({round(float(root) ** 2) for root in roots})


def merging_changes(
    tokens: Tensor, gradient: Tensor, importance: Tensor, counts: list[int]
) -> Tensor:
    """Return the first-order change of the loss if each image's tokens were merged down to n.

    All tokens stay in place. Those that are merged together all get the mean of their features:
    that is what attention sees of a merged token that counts by its size.

    Args:
        tokens: (B, N, C), class token first.
        gradient: of the loss with respect to them, (B, N, C).
        importance: of the patch tokens, (B, N - 1).
        counts: K values of n, 2 to N - 1.

    Returns:
        (K, B), in float32 or the wider type of the inputs.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    order = rank_tokens(importance, tokens.shape[1])  # (B, N)
    order = order[..., None].expand_as(tokens)  # (B, N, C)
    tokens = tokens.to(wide).gather(1, order)  # (B, N, C), the most important first
    gradient = gradient.to(wide).gather(1, order)  # (B, N, C)
    directions = F.normalize(tokens, dim=-1)
    similarity = directions @ directions.mT  # (B, N, N)
    changes = []
    for count in counts:
        # The last N - n tokens join the most similar of the first n; the class token is no match.
        first = tokens[:, :count]  # (B, n, C)
        last = tokens[:, count:]  # (B, N - n, C)
        match = similarity[:, count:, 1:count].argmax(-1) + 1  # (B, N - n)
        joins = F.one_hot(match, count).to(wide)  # (B, N - n, n)
        members = 1 + joins.sum(1)  # (B, n)
        means = (first + joins.mT @ last) / members[..., None]  # (B, n, C)
        merged = torch.cat([means, joins @ means], 1)  # (B, N, C)
        change = gradient * (merged - tokens)  # (B, N, C)
        changes.append(change.sum((1, 2)))  # (B,)
    return torch.stack(changes)


class TokenProbe(nn.Module):
    """Module in the place of a layer's `TokenReduction` that observes and lets all tokens pass.

    Args:
        counts: numbers of tokens to which merging is tried.

    Attributes:
        changes: `merging_changes` of the last backward pass, (K, B); None before it.
    """

    def __init__(self, counts: list[int]):
        super().__init__()
        self.counts = counts
        self.changes: Tensor | None = None

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what came in; arguments as for `TokenReduction.forward`."""
        if tokens.requires_grad:
            # Detached, or the hook would keep the graph alive that it is called from.
            values = tokens.detach()
            ranking = importance.detach()

            def observe(gradient: Tensor) -> None:
                self.changes = merging_changes(values, gradient, ranking, self.counts)

            tokens.register_hook(observe)
        return tokens, sizes


class SearchedTokens(nn.Module):
    """Store what a search has observed of the tokens of its model, and what it has decided.

    Args:
        config: of the model.

    Attributes:
        first_order: buffer (layers, K), sums over images of squared `merging_changes`, one for each
            of `counts`; 0 in layers that cannot reduce their tokens.
        schedule: buffer (layers, 2), as `OFBViTConfig.token_schedule`; zeros while it is undecided.
        acts: buffer, bool: whether the model has this token schedule by now.
        num_tokens: N, tokens of one image, class token included.
        counts: K numbers of tokens to which merging is tried.

    Raises:
        ValueError: for models with fewer than 3 patches.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        layers = config.num_hidden_layers
        tokens = num_tokens(config)
        if tokens < 4:
            raise ValueError(
                f"search_tokens is True, but an image has {tokens - 1} patches (image_size "
                f"{config.image_size}, patch_size {config.patch_size}), too few to merge any; turn "
                "search_tokens off."
            )
        self.num_tokens = tokens
        self.counts = tried_counts(tokens)
        self.register_buffer("first_order", torch.zeros(layers, len(self.counts)))
        self.register_buffer("schedule", torch.zeros(layers, 2, dtype=torch.long))
        self.register_buffer("acts", torch.tensor(False))

    @property
    def decided(self) -> Schedule | None:
        """Return the token schedule that was decided on, None while there is none."""
        return self.schedule.tolist() if self.schedule.any() else None

    def decide_(self, schedule: Schedule) -> None:
        """Decide on a token schedule."""
        self.schedule.copy_(torch.tensor(schedule))

    def watch_(self, model: PreTrainedModel, on: bool = True) -> None:
        """Put probes into all layers that may reduce their tokens, or take them out again."""
        for layer in ranking_layers(model.config):
            if layer > 0:
                set_token_reduction_(model, layer, TokenProbe(self.counts) if on else None)

    @torch.no_grad()
    def changes(self, model: PreTrainedModel, images: int) -> Tensor:
        """Return what the probes observed in the last backward pass, and forget it there.

        Args:
            model: with probes.
            images: B, the images of that pass.

        Returns:
            (B, layers, K), 0 in layers without a probe.
        """
        changes = self.first_order.new_zeros(images, *self.first_order.shape)
        for layer, probe in enumerate(token_reductions(model)):
            if isinstance(probe, TokenProbe) and probe.changes is not None:
                changes[:, layer] = probe.changes.mT
                probe.changes = None
        return changes

    def curves(self, total: float | None) -> np.ndarray:
        """Return what each layer loses by merging all tokens down to n, (layers, N + 1).

        It is in the unit of the scores of candidates, so that a choice can add both up.

        Args:
            total: sum of the first order over all units, by which their scores are normalised; None
                if nothing was observed. Then all tokens of a layer are worth the same, and more the
                more layers come after it.
        """
        layers = len(self.first_order)
        counts = np.arange(self.num_tokens + 1)  # (N + 1,)
        if total is None:
            lost = (self.num_tokens - counts) / self.num_tokens  # (N + 1,)
            rows = [(1 - layer / layers) * lost for layer in range(layers)]
            return IMPORTANCE_SCORE * np.stack(rows)
        observed_counts = [*self.counts, self.num_tokens]
        observed = F.pad(self.first_order.double().cpu(), (0, 1))  # (layers, K + 1)
        observed = observed.numpy()
        # Observations are noisy, but fewer tokens are never worth more: the running maximum from
        # all tokens downwards.
        rising = np.maximum.accumulate(observed[:, ::-1], axis=1)
        rows = [np.interp(counts, observed_counts, row[::-1]) for row in rising]
        return IMPORTANCE_SCORE / total * np.stack(rows)

    def architecture(self, config: ViTConfig) -> Architecture:
        """Return the model under the token schedule that was decided on, or with all tokens."""
        return scheduled(config, self.decided or full_schedule(config))

    def best_choice(
        self,
        *,
        config: ViTConfig,
        sizes: Mapping[str, tuple[int, ...]],
        target: int,
        total: float | None,
        cost: Cost,
        solve: Callable[[Architecture, list[str]], Choice],
        choose: Callable[[list[Choice]], Choice] | None = None,
    ) -> Choice:
        """Return the best widths and token schedule under one budget.

        A token schedule that was decided on stays, and only the widths are chosen.

        Args:
            config: of the model.
            sizes: submodule name -> units, of the dense model.
            target: the budget, in what `cost` counts.
            total: as for `curves`.
            cost: what counts.
            solve: (the model under a token schedule, attentions that have to keep units) -> the
                best widths; raises UnreachableBudgetError if none fit.
            choose: picks one of several choices that differ in how much of the budget tokens give
                up; by default the one with the best score.

        Raises:
            UnreachableBudgetError: if no choice fits, with the smallest possible cost.
        """

        def best_widths(schedule: Schedule) -> Choice:
            # A layer that reduces its tokens needs an attention to rank them by.
            reducing = reducing_layers(schedule, self.num_tokens)
            needed = [attention_of(layer) for layer in reducing]
            return solve(scheduled(config, schedule), needed)

        if self.decided is not None:
            return best_widths(self.decided)

        curves = self.curves(total)
        lowest = TIGHTNESS * target

        def best_for(amounts: Mapping[str, int]) -> tuple[Choice, list[Schedule]]:
            """Return the best choice, and the token schedules that it is one of."""
            layers = range(1, config.num_hidden_layers)
            reducing = [layer for layer in layers if amounts[attention_of(layer)]]
            schedules = candidate_schedules(config, amounts, curves, reducing, cost)
            return best_schedule(schedules, best_widths, curves, lowest), schedules

        def rank(choice: Choice) -> tuple[bool, float]:
            return choice.cost >= lowest, choice.score

        # Which reductions pay depends on the widths, and, where attentions may be left out, so does
        # which layers can reduce tokens at all. So the token schedule is chosen twice: for the
        # dense widths, and for those that would be best under the first token schedule if no layer
        # needed its attention to rank tokens.
        best, schedules = best_for(quantities(sizes))
        free = solve(scheduled(config, best.token_schedule), []).candidates
        free_sizes = dict(sizes)
        for name, candidate in free.items():
            free_sizes[name] = candidate.size
        try:
            second, second_schedules = best_for(quantities(free_sizes))
        except UnreachableBudgetError:
            pass  # too few attentions are left to reduce tokens by; the first choice has more
        else:
            if rank(second) > rank(best):
                best = second
                schedules = second_schedules

        if choose is None:
            return best
        others = spread_choices(schedules, best_widths, curves, lowest)
        return choose([best, *others])
