"""Token reductions of any family that has them: costs under a schedule, and the modules themselves.

Families say in `Family.tokens` whether their classifiers can follow a token schedule, and how.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .description import (
    Architecture,
    Part,
    Term,
    TokenReductions,
    UnsupportedArchitectureError,
    square_patch,
)
from .forward_parts import REDUCTION
from .registry import FAMILIES, describe, family_of

# Fields of a stock config that our config is not made with.
NOT_GIVEN = ("model_type", "architectures", "transformers_version", "dtype")


def supports_tokens(config: PreTrainedConfig) -> bool:
    """Return whether classifiers with this config, stock or ours, can follow a token schedule."""
    for config_class, family in FAMILIES.items():
        if isinstance(config, config_class):
            return family.tokens is not None
    return False


def require_class_token(model: nn.Module | PreTrainedConfig) -> None:
    """Raise `UnsupportedArchitectureError` unless a model, or one with this config, has token
    reductions, for which its tokens are ranked by a class token."""
    if not supports_tokens(getattr(model, "config", model)):
        raise UnsupportedArchitectureError(
            f"got a {type(model).__name__}; tokens are ranked by the attention of a class token, "
            f"which of the supported families only {_able()} has. (Swin has none, and its windows "
            "need the whole grid.)"
        )


def _able() -> str:
    """Return the model types with token reductions, for messages."""
    types: list[str] = []
    for config_class, family in FAMILIES.items():
        if family.tokens is not None:
            types.append(config_class.model_type)
    return " and ".join(types)


def _reductions_of(config: PreTrainedConfig) -> TokenReductions:
    require_class_token(config)
    return family_of(config).tokens


# --------------------------------------------------------------------------------------- schedules


def followed_schedule(
    config: PreTrainedConfig, schedule: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return the token counts that a classifier has under a token schedule; they do not rise.

    Args:
        config: of the classifier, stock or ours.
        schedule: as in `OFBViTConfig`.

    Raises:
        UnsupportedArchitectureError: for families without token reductions.
        ValueError: for a schedule that the classifier cannot follow.
    """
    if not supports_tokens(config):
        raise UnsupportedArchitectureError(
            f"a token_schedule is given for a {config.model_type}, but tokens are ranked by a "
            f"class token, which of the supported families only {_able()} has; leave it out."
        )
    config_class = family_of(config).model_class.config_class
    if config.model_type != config_class.model_type:
        fields = config.to_dict()
        for name in NOT_GIVEN:
            fields.pop(name, None)
        config = config_class(**fields)
    stored = config.stored_schedule(schedule)
    if stored is not None:
        return stored
    return [[config.num_tokens, config.num_tokens] for _ in range(config.num_hidden_layers)]


# ------------------------------------------------------------------------------------------- costs


def schedule_parts(config: PreTrainedConfig, schedule: Sequence[Sequence[Any]]) -> tuple[Part, ...]:
    """Return the forward parts of a classifier under a token schedule.

    Args:
        config: of the classifier, stock or ours.
        schedule: for each layer the tokens after dropping and after merging; counts do not rise
            from layer to layer, and may be scalar tensors.
    """
    return _reductions_of(config).parts(config, schedule)


def layer_parts(
    config: PreTrainedConfig,
    layer: int,
    before: Any,
    kept: Any,
    merged: Any,
    weighs: Any,
) -> tuple[Part, ...]:
    """Return the forward parts of one layer; counts as for `reducing_block`."""
    return _reductions_of(config).layer_parts(layer, before, kept, merged, weighs)


def scheduled(config: PreTrainedConfig, schedule: Sequence[Sequence[int]]) -> Architecture:
    """Return the architecture of a classifier under another token schedule than its own."""
    return replace(describe(config), parts=schedule_parts(config, schedule))


def at_image_size(
    config: PreTrainedConfig,
    image_size: int | Sequence[int],
    schedule: Sequence[Sequence[int]] | None,
) -> Architecture:
    """Return what a classifier is on images of another size, with interpolated positions.

    Its sizes are the same; its forward parts have other numbers of tokens. A layer that reduces
    tokens still reduces them to its counts, and the others let pass what they get.

    Args:
        config: of the classifier, stock or ours; it stays as it is.
        image_size: pixels, of a side or (height, width).
        schedule: the token counts that it has at its own image size; None if it keeps all tokens.

    Raises:
        ValueError: unless the images hold at least one patch.
    """
    sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    patch = square_patch(config)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= patch for side in sides):
        raise ValueError(
            f"image_size is {image_size!r}; give the pixels of a side or (height, width), whole "
            f"numbers of at least {patch}, the size of a patch."
        )
    resized = copy.deepcopy(config)
    if schedule is not None:
        resized.token_schedule = None
    resized.image_size = sides
    if schedule is None:
        return describe(resized)
    before, left = (math.prod(describe(each).patch_grid) + 1 for each in (config, resized))
    counts: list[list[int]] = []
    in_vain: list[Part] = []
    for layer, (kept, merged) in enumerate(schedule):
        entering = left
        kept_here = left
        if merged < before:
            kept_here = min(kept, left)
            left = min(merged, kept_here)
            if left == entering:
                # It ranks its tokens and removes none; see `reducing_block`.
                attention = f"layers.{layer}.attention"
                ranking = (Term(entering, (attention,)),)
                in_vain.append(Part(f"layers.{layer}.{REDUCTION}", REDUCTION, ranking, {}))
        counts.append([kept_here, left])
        before = merged
    architecture = scheduled(resized, counts)
    return replace(architecture, parts=(*architecture.parts, *in_vain))


def with_fewest_tokens(config: PreTrainedConfig) -> Architecture:
    """Return an architecture that has every kind of forward part that token schedules bring."""
    # From 3 tokens to 2: every layer drops and merges.
    return scheduled(config, [(3, 2)] * config.num_hidden_layers)


# ----------------------------------------------------------------------------------------- modules


def token_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a classifier in order; each returns the tokens that leave it."""
    return list(_reductions_of(model.config).layers(model))


def token_reductions(model: PreTrainedModel) -> list[nn.Module | None]:
    """Return the token reduction of each layer of a classifier; None where all tokens pass."""
    return [getattr(layer, REDUCTION, None) for layer in token_layers(model)]


def set_token_reduction_(
    model: PreTrainedModel,
    layer: int,
    reduction: nn.Module | None,
) -> None:
    """Put a module in the place of a layer's token reduction; None lets all tokens pass.

    Args:
        model: a classifier of this package.
        layer: its number.
        reduction: called as `TokenReduction`, with tokens, their sizes and their importance.
    """
    setattr(token_layers(model)[layer], REDUCTION, reduction)


@contextmanager
def same_tokens(
    leader: PreTrainedModel, follower: PreTrainedModel, decisions: Callable[[], dict[int, Any]]
) -> Iterator[None]:
    """Let one classifier reduce its tokens exactly as another one does, for the time of a block.

    Args:
        leader: decides, by its own token reductions; runs first.
        follower: of the same layers; its own token reductions rest.
        decisions: returns the dictionary, layer -> decision, that both passes over one batch share.
    """
    if not supports_tokens(leader.config):
        yield
        return
    leading, following = token_reductions(leader), token_reductions(follower)
    for layer, reduction in enumerate(leading):
        if reduction is not None:
            set_token_reduction_(leader, layer, _Leading(reduction, layer, decisions))
        follows = None if reduction is None else _Following(layer, decisions)
        set_token_reduction_(follower, layer, follows)
    try:
        yield
    finally:
        for layer, (leads, followed) in enumerate(zip(leading, following, strict=True)):
            set_token_reduction_(leader, layer, leads)
            set_token_reduction_(follower, layer, followed)


class _Leading(nn.Module):
    """Reduce tokens and remember how."""

    def __init__(self, reduction: nn.Module, layer: int, decisions: Callable[[], dict[int, Any]]):
        super().__init__()
        self.reduction = reduction
        self.layer = layer
        self.decisions = decisions

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        decision = self.reduction.decide(tokens, importance)
        self.decisions()[self.layer] = decision
        return decision.reduce(tokens, sizes)


class _Following(nn.Module):
    """Reduce tokens as another network did."""

    def __init__(self, layer: int, decisions: Callable[[], dict[int, Any]]):
        super().__init__()
        self.layer = layer
        self.decisions = decisions

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return self.decisions()[self.layer].reduce(tokens, sizes)
