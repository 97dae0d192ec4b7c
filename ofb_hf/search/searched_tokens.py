"""Tokens as a part of the search for widths: observed with the units, chosen with them, gone when
they are cut.

While units are observed, every layer also asks, with the same gradients, what merging its tokens
down to n would do to the loss: first order of the change, squared, as for a unit. So the choice
can weigh units and tokens against each other. Nothing is merged before it has decided: hidden
patches are repainted from all tokens.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig

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
from ..families.vit import scheduled
from ..models import OFBViTForImageClassification
from ..models.modeling_ofb_vit import rank_tokens
from ..tokens.schedules import Cost, Schedule, full_schedule, num_tokens

# numbers of tokens to which merging is tried in each layer, about evenly apart on a scale of square
# roots
TRIED = 16
ROUNDS = 2


def tried_counts(tokens: int) -> list[int]:
    """Numbers of tokens, from 2 to one less than all, to which merging is tried."""
    roots = np.linspace(SMALLEST_COUNT**0.5, (tokens - 1) ** 0.5, TRIED)
    return sorted({round(float(root) ** 2) for root in roots})


def merging_changes(
    tokens: Tensor, gradient: Tensor, importance: Tensor, counts: list[int]
) -> Tensor:
    """First-order change of the loss if each image's tokens were merged down to n, all of them
    staying in place.

    Tokens that meet get the mean of their features, as many times as there are of them: what
    attention sees of a merged token that counts by its size.

    Args:
        tokens: (B, N, C), class token first; gradient: of the loss, likewise.
        importance: of the patch tokens, (B, N - 1).
        counts: K values of n, 2 to N - 1.

    Returns:
        (K, B), in float32 or the inputs' wider type.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    order = rank_tokens(importance, tokens.shape[1])[..., None].expand_as(tokens)
    tokens, gradient = (tensor.to(wide).gather(1, order) for tensor in (tokens, gradient))
    directions = F.normalize(tokens, dim=-1)
    similarity, changes = directions @ directions.mT, []
    for count in counts:
        match = similarity[:, count:, 1:count].argmax(-1) + 1
        joins = F.one_hot(match, count).to(wide)  # (B, N - n, n)
        first = tokens[:, :count]
        means = (first + joins.mT @ tokens[:, count:]) / (1 + joins.sum(1))[..., None]
        moved = torch.cat([means, joins @ means], 1) - tokens
        changes.append((gradient * moved).sum((1, 2)))
    return torch.stack(changes)


class TokenProbe(nn.Module):
    """Stands in a layer's place for reduction while it is observed, and lets all tokens pass.

    Attributes:
        changes: `merging_changes` of the last backward pass, (K, B); None before it.
    """

    def __init__(self, counts: list[int]):
        super().__init__()
        self.counts, self.changes = counts, None

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `TokenReduction.forward`, with all tokens."""
        if tokens.requires_grad:
            seen, ranked = tokens.detach(), importance.detach()

            def note(gradient: Tensor) -> None:
                self.changes = merging_changes(seen, gradient, ranked, self.counts)

            tokens.register_hook(note)
        return tokens, sizes


class SearchedTokens(nn.Module):
    """What a search knows and has decided about the tokens of its model.

    Attributes:
        first_order: buffer (layers, K), sums over images of squared `merging_changes`, one for each
            of `counts`; 0 in layers that cannot reduce their tokens.
        schedule: buffer (layers, 2), as `OFBViTConfig.token_schedule`; zeros while it is undecided.
        acts: buffer, bool: whether the model has this schedule by now.
        counts: what `first_order` is about.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        layers = config.num_hidden_layers
        if num_tokens(config) < 4:
            raise ValueError(
                f"search_tokens is True, but an image has {num_tokens(config) - 1} patches, too "
                f"few to merge any "
                f"(image_size {config.image_size}, patch_size {config.patch_size}); turn it off."
            )
        self.num_tokens, self.counts = num_tokens(config), tried_counts(num_tokens(config))
        self.register_buffer("first_order", torch.zeros(layers, len(self.counts)))
        self.register_buffer("schedule", torch.zeros(layers, 2, dtype=torch.long))
        self.register_buffer("acts", torch.tensor(False))

    @property
    def decided(self) -> Schedule | None:
        """The schedule that was chosen, if one was."""
        return self.schedule.tolist() if self.schedule.any() else None

    def decide_(self, schedule: Schedule) -> None:
        """Chooses a schedule."""
        self.schedule.copy_(torch.tensor(schedule))

    def watch_(self, model: OFBViTForImageClassification, on: bool = True) -> None:
        """Puts probes into all layers that may reduce their tokens; or takes them out again."""
        for number, layer in enumerate(model.vit.layers):
            if number and layer.attention.num_attention_heads:
                layer.reduction = TokenProbe(self.counts) if on else None

    @torch.no_grad()
    def changes(self, model: OFBViTForImageClassification, images: int) -> Tensor:
        """What the probes saw in the last backward pass, (B, layers, K); 0 in layers that have
        none.

        Args:
            images: B, how many entered it.
        """
        changes = self.first_order.new_zeros(images, *self.first_order.shape)
        for number, layer in enumerate(model.vit.layers):
            if isinstance(layer.reduction, TokenProbe) and layer.reduction.changes is not None:
                changes[:, number] = layer.reduction.changes.mT
                layer.reduction.changes = None
        return changes

    def curves(self, total: float | None) -> np.ndarray:
        """What each layer loses by going from all tokens to n, (layers, N + 1), in the unit of the
        choice's scores.

        Args:
            total: sum of the units' first order, which makes scores; None = nothing was observed.
                Then each token is worth the same in a layer, and the more the more layers come
                after it.
        """
        layers, every = len(self.first_order), np.arange(self.num_tokens + 1)
        if total is None:
            lost = (self.num_tokens - every) / self.num_tokens
            return IMPORTANCE_SCORE * np.stack(
                [(1 - layer / layers) * lost for layer in range(layers)]
            )
        points = [*self.counts, self.num_tokens]
        observed = F.pad(self.first_order.double().cpu(), (0, 1)).numpy()
        # fewer tokens are never worth more
        falling = np.maximum.accumulate(observed[:, ::-1], axis=1)[:, ::-1]
        return (
            IMPORTANCE_SCORE / total * np.stack([np.interp(every, points, row) for row in falling])
        )

    def architecture(self, config: ViTConfig) -> Architecture:
        """The model under the schedule that was decided, or with all tokens."""
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
        """The best widths and schedule under one budget; a schedule that was decided stays.

        A layer that reduces its tokens needs an attention to rank them by. So, where attentions may
        be left out, the family of schedules is made a second time, for those that would stay if
        that were no condition.

        Args:
            config: of the model. sizes: submodule name -> units, of the dense model.
            target: the budget, in what `cost` counts. total: as for `curves`.
            solve: (the model under a schedule, attentions that have to keep units) -> the best
                widths.
            choose: picks among choices that differ in how much of the budget tokens give up; by
                default the one with the best score.

        Raises:
            UnreachableBudgetError: naming the smallest possible cost.
        """

        def widths(schedule: Schedule) -> Choice:
            needed = [*map(attention_of, reducing_layers(schedule, self.num_tokens))]
            return solve(scheduled(config, schedule), needed)

        if (decided := self.decided) is not None:
            return widths(decided)
        curves, best, amounts = self.curves(total), None, quantities(sizes)
        for _ in range(ROUNDS):
            reducing = [
                layer
                for layer in range(1, config.num_hidden_layers)
                if amounts[attention_of(layer)]
            ]
            family = candidate_schedules(config, amounts, curves, reducing, cost)
            try:
                found = best_schedule(family, widths, curves, TIGHTNESS * target)
            except UnreachableBudgetError:
                if best is None:
                    raise
                break  # too few attentions to reduce tokens in; the family before had more
            if best is None or (found.cost >= TIGHTNESS * target, found.score) > (
                best.cost >= TIGHTNESS * target,
                best.score,
            ):
                best, chosen_from = found, family
            free = solve(scheduled(config, best.token_schedule), []).candidates
            amounts = quantities(dict(sizes) | {name: option.size for name, option in free.items()})
        if choose is None:
            return best
        return choose([best, *spread_choices(chosen_from, widths, curves, TIGHTNESS * target)])
