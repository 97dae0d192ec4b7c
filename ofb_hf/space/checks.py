"""Refuse values of a search's config that are out of range or exclude each other."""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

from ..families.subnet import require_basis

# Which halves of a block may be left out.
DepthSearch = Literal[False, True, "attention", "mlp"]
ALPHA_INITS = ("zeros", "uniform")
IMPORTANCE_SOURCES = ("gradients", "error_curves")

# Of the steps, of patches, of a full size, or of a bi-mask.
FRACTIONS = (
    "smallest_share",
    "importance_start",
    "importance_end",
    "importance_hold",
    "warmup",
    "one_hot_begin",
    "one_hot_end",
    "retire_begin",
    "settle_at",
    "retire_threshold",
    "keep_ratio_start",
    "keep_ratio_end",
)
AMOUNTS = (
    "flops_weight",
    "one_hot_weight",
    "importance_penalty",
    "importance_init_std",
    "importance_learning_rate",
    "architecture_learning_rate",
    "pmim_weight",
    "pmim_max_ratio",
)
COUNTS = ("multiple_of", "retire_events")


def check_settings(config: Any) -> None:
    """Raise ValueError, naming field and value, for settings that cannot work.

    Args:
        config: a `BiMaskConfig` with the values of its preset filled in.
    """
    require_basis(config.basis)
    _check_ranges(config)
    _check_importance(config)
    _check_searched(config)
    _check_depth(config)
    _check_tokens(config)


def _check_ranges(config: Any) -> None:
    for name in FRACTIONS:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it is a fraction from 0 to 1.")
    for name in AMOUNTS:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be 0 or positive.")
    # Alpha sees the budget through this loss alone.
    if not config.flops_weight > 0:
        raise ValueError(
            f"flops_weight is {config.flops_weight}; it must be positive, or no budget is ever met."
        )
    for name in COUNTS:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    if config.alpha_init not in ALPHA_INITS:
        raise ValueError(f"alpha_init is {config.alpha_init!r}; allowed are 'zeros' and 'uniform'.")
    if config.pmim and config.pmim_until_settled and config.chooses_first:
        raise ValueError(
            "pmim is True, but settle_at is 0 and pmim_until_settled True: no patch would ever be "
            "hidden. Give pmim_until_settled=False, which hides patches to the end, or "
            'preset="bi_mask".'
        )
    window = config.pmim_window
    # A window has a middle pixel, and neighbours on both sides.
    if window is not None and (window < 3 or window % 2 == 0):
        raise ValueError(f"pmim_window is {window}; give an odd number of pixels, 3 or more.")


def _check_importance(config: Any) -> None:
    _check_importance_source(config)
    if config.chooses_first:
        return
    if not config.importance_hold and not config.importance_learning_rate:
        raise ValueError(
            "importance_hold and importance_learning_rate are 0, so nothing would find out "
            "which units matter. Give importance_hold a fraction of the steps (0.05), to rank "
            "units by observed gradients, or let importance learn."
        )
    if config.importance_hold > config.settle_at:
        raise ValueError(
            f"importance_hold is {config.importance_hold}, but settle_at is {config.settle_at}; "
            "the choice cannot come before importance is known."
        )


def _check_importance_source(config: Any) -> None:
    source = config.importance_source
    if source not in IMPORTANCE_SOURCES:
        allowed = " and ".join(map(repr, IMPORTANCE_SOURCES))
        raise ValueError(f"importance_source is {source!r}; allowed are {allowed}.")
    if source == "gradients":
        if config.chooses_first:
            raise ValueError(
                f"settle_at is 0 and importance_source {source!r}, but there are no gradients "
                'before the first step. Give importance_source="error_curves", or '
                'preset="bi_mask", which observes gradients and chooses later.'
            )
        return
    if config.chooses_first:
        return
    if config.basis != "equivalent":
        raise ValueError(
            f"importance_source is {source!r} and basis {config.basis!r}: error curves count the "
            'first channels of a rewritten network. Give basis="equivalent" as well.'
        )
    if config.search_tokens:
        raise ValueError(
            f"importance_source is {source!r}, settle_at {config.settle_at} and search_tokens "
            "True: while bi-masks decide, tokens are ranked by gradients, which cannot be compared "
            "with error curves. Give settle_at=0, which tries tokens with widths, or leave one of "
            "the others out."
        )


def _check_searched(config: Any) -> None:
    if not (config.search_embedding or config.search_attention or config.search_mlp):
        raise ValueError(
            "nothing to search: turn on search_embedding, search_attention or search_mlp."
        )


def may_vanish(config: Any, kind: str) -> bool:
    """Return whether submodules of a kind may be left out."""
    # The residual stream can never be left out.
    searched = {"attention": config.search_attention, "mlp": config.search_mlp}
    return searched.get(kind, False) and config.search_depth in (True, kind)


def _check_depth(config: Any) -> None:
    if config.search_depth not in get_args(DepthSearch):
        raise ValueError(
            f"search_depth is {config.search_depth!r}; allowed are True, False, 'attention' and "
            "'mlp'."
        )
    if not config.search_depth:
        return
    if not may_vanish(config, "attention") and not may_vanish(config, "mlp"):
        raise ValueError(
            f"search_depth is {config.search_depth!r}, search_attention "
            f"{config.search_attention}, search_mlp {config.search_mlp}: nothing could be left "
            "out. Search the attentions or MLPs to leave out, or turn search_depth off."
        )
    if config.uniform_across_layers:
        raise ValueError(
            f"search_depth is {config.search_depth!r} and uniform_across_layers True: layers that "
            "choose together would all be left out together. Turn one of them off."
        )


def _check_tokens(config: Any) -> None:
    if not config.search_tokens:
        return
    for reason, advice in _token_conflicts(config):
        raise ValueError(
            f"search_tokens is True, but {reason}; {advice}, or search tokens afterwards."
        )


def _token_conflicts(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (why tokens cannot be searched, what to do about it)."""
    if config.target_params is not None:
        reason = f"target_params is {config.target_params}, and tokens have no parameters"
        yield reason, "give target_macs or target_latency_ms"
    if not config.importance_hold and not config.chooses_first:
        reason = "importance_hold is 0, and without observed gradients nothing tells what tokens "
        reason += "are worth"
        yield reason, "give importance_hold a fraction of the steps, 0.05 for example"
    if config.pmim and not config.pmim_until_settled:
        reason = f"pmim_until_settled is {config.pmim_until_settled}, and hidden patches are "
        reason += "repainted from all tokens"
        yield reason, "turn it on, or pmim off"
    if not config.prune_during_search:
        reason = f"prune_during_search is {config.prune_during_search}, and heads that are "
        reason += "switched off but still there would vote on which tokens stay"
        yield reason, "turn it on"
