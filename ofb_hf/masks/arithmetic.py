"""The arithmetic of bi-masks, for M masks of one kind at once.

A submodule has U units (residual channels, MLP channels, or heads x channels per head) and K
candidate sizes. Two learned scores say which units matter and how many there is room for:

    importance  S_u = sigmoid(importance_logits_u)                     (U,)
    sparsity    V_u = P(chosen size > rank of u), p = softmax(alpha)   (U,)
    bi-mask     m_u = lam * S_u + (1 - lam) * V_u                      (U,)  arXiv:2403.15835

The rank of a unit is its position when the units are sorted by importance, 0 = most important.

Everything here takes grids: units (M, H, D) and candidates (M, K_heads, K_dims). A plain axis of U
units is a grid of one head, (M, 1, U), whose only candidate along the heads is 1. `BiMask` passes a
single mask (M = 1), `MaskStack` all masks of a kind, filled up to a common shape with dead units
and retired candidates.
"""

import math

import torch
from torch import Tensor


def probabilities(
    alpha: Tensor,
    active: Tensor,
) -> Tensor:
    """Return the softmax over the active candidates of each mask together; 0 for retired ones.

    Args:
        alpha: architecture logits (M, K_heads, K_dims). active: bool of the same shape.
    """
    # One softmax over the whole grid, not one per axis: heads and channels are chosen jointly.
    logits = alpha.masked_fill(~active, -math.inf).flatten(1)  # (M, K_heads * K_dims)
    return logits.softmax(1).view_as(alpha)


def importance_scores(
    logits: Tensor,
    alive: Tensor,
    normalize: bool,
    floor: float,
) -> Tensor:
    """Return how much each unit matters, in (0, 1]; 0 for dead units.

    Args:
        logits: importance logits (M, H, D). alive: bool of the same shape.
        normalize: whether to divide by the maximum of each mask, or by `floor` if that is larger.
        floor: smallest divisor.
    """
    importance = logits.sigmoid() * alive
    if not normalize:
        return importance
    # Detached: otherwise the strongest unit, useful or not, would be rewarded for making all others
    # look weaker.
    largest = importance.detach().amax((1, 2), keepdim=True)  # (M, 1, 1)
    return importance / largest.clamp(min=floor)


def unit_ranks(
    logits: Tensor,
    alive: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the ranks of heads and of channels, 0 = most important; dead ones come last.

    Args:
        logits: importance logits (M, H, D). alive: bool of the same shape.

    Returns:
        Ranks of the heads of a mask by the sum of their importance (M, H), and of the channels
        within each head (M, H, D).
    """
    logits = logits.detach()
    # A sum of importances, not of logits: a single channel with a huge logit makes no good head.
    head_importance = (logits.sigmoid() * alive).sum(2)  # (M, H)
    head_importance = head_importance.masked_fill(~alive.any(2), -math.inf)
    channel_logits = logits.masked_fill(~alive, -math.inf)  # (M, H, D)
    return _rank(head_importance), _rank(channel_logits)


def _rank(score: Tensor) -> Tensor:
    """Return the position of every entry of the last axis when sorted from largest to smallest."""
    # Stable, so that ties keep the order of the units on every device.
    order = score.argsort(dim=-1, descending=True, stable=True)
    # The inverse of a permutation is its argsort: from "which unit at rank r" to "rank of unit u".
    return order.argsort(dim=-1)


def sort_by_rank(
    values: Tensor,
    ranks: tuple[Tensor, Tensor],
) -> Tensor:
    """Return values of the units of a single mask (1, H, D), sorted by rank along both axes.

    Args:
        ranks: as from `unit_ranks`, (1, H) and (1, H, D).
    """
    head_ranks, channel_ranks = ranks
    by_channel = torch.zeros_like(values).scatter(2, channel_ranks, values)  # heads unsorted
    return torch.zeros_like(values).index_copy(1, head_ranks[0], by_channel)


def staircase(
    p: Tensor,
    sizes: tuple[Tensor, Tensor],
    ranks: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the sparsity of each unit: the probability that the chosen size exceeds its rank.

    On a grid, both sizes have to exceed both ranks.

    Args:
        p: probabilities of the candidates (M, K_heads, K_dims).
        sizes: sizes along each axis, (M, K_heads) and (M, K_dims).
        ranks: as from `unit_ranks`, (M, H) and (M, H, D).

    Returns:
        (M, H, D) in [0, 1].
    """
    head_ranks, channel_ranks = ranks
    num_heads, num_channels = channel_ranks.shape[1:]
    with torch.autocast(p.device.type, enabled=False):
        heads_kept = _keeps(sizes[0], num_heads, p.dtype)  # (M, K_heads, H)
        channels_kept = _keeps(sizes[1], num_channels, p.dtype)  # (M, K_dims, D)
        by_rank = heads_kept.mT @ p @ channels_kept  # (M, H, D), sorted by rank along both axes
        # A softmax may add up to 1 + 1e-7, a mask value may not.
        by_rank = by_rank.clamp(max=1)
    rows = head_ranks[..., None].expand_as(by_rank)  # (M, H, D)
    by_head = by_rank.gather(1, rows)  # (M, H, D), heads in their own order
    return by_head.gather(2, channel_ranks)  # (M, H, D), channels in their own order as well


def _keeps(
    sizes: Tensor,
    units: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return 1 where a size (M, K) keeps the unit of a rank, else 0: (M, K, units)."""
    ranks = torch.arange(units, device=sizes.device)
    return (ranks < sizes[..., None]).to(dtype)


def bi_mask_values(
    importance: Tensor,
    sparsity: Tensor,
    lam: float | Tensor,
    alive: Tensor,
) -> Tensor:
    """Return lam * S + (1 - lam) * V; all units (M, H, D), 0 for dead ones."""
    # In this form the value is exactly 1 where both scores are 1, whatever lam is.
    return (sparsity + lam * (importance - sparsity)) * alive


def expected_amounts(
    p: Tensor,
    sizes: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """Return the expected number of units and of heads, and the probability of keeping any.

    Args:
        p, sizes: as for `staircase`.

    Returns:
        Three tensors (M,).
    """
    heads, channels = sizes
    units = heads[:, :, None] * channels[:, None]  # (M, K_heads, K_dims)
    return [
        (p * units).sum((1, 2)),
        (p.sum(2) * heads).sum(1),
        (p * (units > 0)).sum((1, 2)),
    ]


def sums_of_first(
    values: Tensor,
    axis: int,
    counts: Tensor,
) -> Tensor:
    """Return the sums of the first `counts` (K,) entries along an axis, which becomes K long.

    A count of 0 gives 0.
    """
    nothing = torch.zeros_like(values.sum(axis, keepdim=True))
    sums = torch.cat([nothing, values.cumsum(axis)], axis)  # entry n is the sum of the first n
    return sums.index_select(axis, counts)
