"""Token reductions of any family that has them: costs under a schedule, and the modules themselves.

Families say in `Family.tokens` whether their classifiers can follow a token schedule, and how.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .description import Architecture, Part, TokenReductions, UnsupportedArchitectureError
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
