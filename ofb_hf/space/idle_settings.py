"""Settings of a search that have no effect next to others: refused, so that they cannot mislead.

A value that equals the preset's is not refused, wherever it comes from: it states what holds
anyway, and a file that holds all fields of a config has to be readable again.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from .presets import PRESETS

# (why they have no effect, what to do about it, names of the settings)
Idle = tuple[str, str, tuple[str, ...]]


# What says how bi-masks choose, besides `compensate`, which serves every choice.
BI_MASK_SETTINGS = (
    *("prune_during_search", "freeze_weights"),
    *("importance_start", "importance_end", "importance_hold", "importance_init_mean"),
    *("importance_init_std", "importance_learning_rate", "importance_penalty", "alpha_init"),
    *("normalize_importance", "architecture_learning_rate", "architecture_weight_decay"),
    *("masks_follow_schedule", "flops_weight", "one_hot_weight", "one_hot_begin", "one_hot_end"),
    *("retire_threshold", "retire_begin", "retire_events"),
)


class IdleSettingError(ValueError):
    """Settings that would have no effect.

    Attributes:
        names: of all of them; the message explains the first one.
    """

    def __init__(self, message: str, names: tuple[str, ...]):
        super().__init__(message)
        self.names = names


def require_effect(config: Any) -> None:
    """Refuse settings that differ from the preset's and that nothing would read.

    Args:
        config: a `BiMaskConfig` with the values of its preset filled in.

    Raises:
        IdleSettingError: naming the setting, its value, why it has no effect and what to do.
    """
    usual = {setting.name: setting.default for setting in fields(config)}
    usual |= PRESETS[config.preset]
    idle = (*_idle_candidates(config), *_idle_decisions(config), *_idle_training(config))
    messages: dict[str, str] = {}
    for reason, advice, names in idle:
        for name in names:
            value = getattr(config, name)
            if value != usual[name]:
                messages[name] = (
                    f"{name} is {value}, but {reason}: it would have no effect. Leave {name} out, "
                    f"or {advice}."
                )
    if messages:
        first, *others = messages.values()
        more = f" Neither would {', '.join(list(messages)[1:])}." if others else ""
        raise IdleSettingError(first + more, tuple(messages))


def _idle_candidates(config: Any) -> Iterator[Idle]:
    """Yield settings of the search space that no searched submodule takes its candidates from."""
    if not config.search_embedding:
        names = ("embedding_candidates", "smallest_share")
        yield "search_embedding is False", "turn search_embedding on", names
    elif config.embedding_candidates:
        yield "embedding_candidates lists the widths", "leave the list out", ("smallest_share",)
    if not config.search_attention:
        names = ("head_candidates", "head_dim_candidates")
        yield "search_attention is False", "turn search_attention on", names
    if not config.search_mlp:
        yield "search_mlp is False", "turn search_mlp on", ("mlp_candidates",)
    # Channel counts that are not listed are made of multiples; numbers of heads never are.
    listed = (
        (config.search_embedding, config.embedding_candidates),
        (config.search_attention, config.head_dim_candidates),
        (config.search_mlp, config.mlp_candidates),
    )
    if all(candidates for searched, candidates in listed if searched):
        reason = "all channel counts to choose from are listed"
        yield reason, "leave a list out", ("multiple_of",)
    if not (config.search_attention or config.search_mlp):
        reason = "search_attention and search_mlp are False, and residual widths are never tied"
        yield reason, "turn one of them on", ("uniform_across_layers",)
    if config.basis == "heads" and not config.search_attention:
        reason = "search_attention is False, and another basis of the heads changes no other cut"
        yield reason, "turn search_attention on", ("basis",)
    if config.basis == "equivalent" and not (config.search_attention or config.search_embedding):
        reason = "search_attention and search_embedding are False, and MLPs keep their basis"
        yield reason, "turn one of them on", ("basis",)


def _idle_decisions(config: Any) -> Iterator[Idle]:
    """Yield settings of decisions that are never taken."""
    if config.chooses_first:
        reason = "settle_at is 0, and error curves choose before the first step"
        yield reason, "let bi-masks choose (preset='bi_mask')", BI_MASK_SETTINGS
        return
    if config.retire_begin >= config.settle_at:
        reason = (
            f"retire_begin is {config.retire_begin} and settle_at {config.settle_at}, so no "
            "candidate retires before the final choice"
        )
        yield reason, "let retire_begin come first", ("retire_threshold", "retire_events")
    if config.retire_threshold == 0:
        reason = "retire_threshold is 0, and no candidate's probability falls to 0"
        yield reason, "give retire_threshold a value", ("retire_events", "retire_begin")
    # With both at 0 the choice still waits for the first step, and the pressure acts in it.
    if config.one_hot_begin > 0 and config.one_hot_begin >= config.settle_at:
        reason = (
            f"one_hot_begin is {config.one_hot_begin} and settle_at {config.settle_at}, so the "
            "final choice comes before any one-hot pressure"
        )
        yield reason, "let one_hot_begin come first", ("one_hot_weight", "one_hot_end")
    if config.one_hot_weight == 0:
        names = ("one_hot_begin", "one_hot_end")
        yield "one_hot_weight is 0", "give one_hot_weight a value", names
    if config.compensate and not config.prune_during_search and config.settle_at < 1:
        reason = (
            "prune_during_search is False and training goes on after the choice, which would undo "
            "a fit"
        )
        yield reason, "turn prune_during_search on", ("compensate",)


def _idle_training(config: Any) -> Iterator[Idle]:
    """Yield settings of what does not learn or is not part of the loss."""
    if not config.pmim:
        names = ("keep_ratio_start", "keep_ratio_end", "pmim_until_settled", "pmim_window")
        names += ("pmim_weight", "pmim_max_ratio")
        yield "pmim is False and no patches are hidden", "turn pmim on", names
    if config.chooses_first:
        return
    # Divided by their maximum, equal importances are 1. Where a submodule may vanish, the divisor
    # has a lower limit, and a low mean shows.
    starts_equal = config.normalize_importance and config.importance_init_std == 0
    if config.importance_hold > 0 and starts_equal and not config.search_depth:
        reason = (
            "importance_init_std is 0 and normalize_importance True, so all importance is 1 until "
            "importance_hold has observed it"
        )
        yield reason, "give importance_init_std a value", ("importance_init_mean",)
    if not config.importance_hold:
        reason = "importance_hold is 0, so importance is learned from its first value"
        yield reason, "give importance_hold a fraction of the steps", ("importance_source",)
    importance_rests = config.importance_learning_rate == 0
    alpha_rests = config.architecture_learning_rate == 0
    if importance_rests:
        reason = "importance_learning_rate is 0, so no loss moves importance"
        yield reason, "give importance_learning_rate a value", ("importance_penalty",)
    if alpha_rests:
        reason = "architecture_learning_rate is 0, so no loss moves alpha"
        names = ("architecture_weight_decay", "flops_weight", "one_hot_weight")
        yield reason, "give architecture_learning_rate a value", names
    if importance_rests and alpha_rests:
        reason = "importance_learning_rate and architecture_learning_rate are 0"
        yield reason, "give one of them a value", ("masks_follow_schedule",)
