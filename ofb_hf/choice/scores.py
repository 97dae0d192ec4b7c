"""Scores of candidates: what a choice under the budget adds up."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ..cost.counting import evaluate_terms
from ..families.description import Term, heads_of, quantities
from ..masks.arithmetic import sums_of_first
from ..masks.bi_mask import BiMask
from .problem import Candidate, Candidates

# Kept importance, weighted by its fraction of the dense cost, counts this many times a nat of
# candidate probability (found by experiment, docs/LOG.md).
IMPORTANCE_SCORE = 400.0
# A softmax that has made up its mind must not outvote the budget: log-probabilities below this
# count as this.
LOWEST_LOG_PROBABILITY = -5.0


def scored_candidates(
    groups: list[list[BiMask]],
    scores: Callable[[BiMask], Tensor],
) -> Candidates:
    """Return every active candidate of every group of bi-masks that choose together.

    Args:
        groups: the mask that owns the choice comes first in its group and gives its name; the
            scores of all masks of a group add up.
        scores: returns the scores of a bi-mask's candidates, shaped like alpha.
    """
    candidates = {}
    for group in groups:
        leader = group[0]
        score = torch.stack([scores(mask) for mask in group]).sum(0)  # like alpha
        indices = leader.active_candidates.nonzero().tolist()
        values = score[leader.active_candidates].tolist()  # in the same order
        axes = [sizes.tolist() for sizes in leader.candidate_axes]
        row = []
        for index, value in zip(indices, values, strict=True):
            size = tuple(axis[at] for axis, at in zip(axes, index, strict=True))
            row.append(Candidate(size, value))
        candidates[leader.name] = row
    return candidates


@torch.no_grad()
def search_scores(
    mask: BiMask,
    terms: tuple[Term, ...],
    dense_sizes: dict[str, tuple[int, ...]],
) -> Tensor:
    """Return kept importance in proportion to cost, plus log-probability, of every candidate.

    Args:
        mask: the bi-mask of a submodule.
        terms: the cost, in the budget's unit.
        dense_sizes: submodule name -> units before the search.

    Returns:
        Shaped like alpha.
    """
    dense = quantities(dense_sizes)
    own = {mask.name, heads_of(mask.name)}
    own_terms = tuple(term for term in terms if own & set(term.factors))
    own_cost = evaluate_terms(own_terms, dense)
    # The fraction of the dense cost that one unit of this submodule accounts for.
    fraction = own_cost / dense[mask.name] / evaluate_terms(terms, dense)
    # A candidate keeps the first ranks along each axis: (U,) -> (K,), (H, D) -> (K_heads, K_dims).
    kept = mask.importance_by_rank()
    for axis, sizes in enumerate(mask.candidate_axes):
        kept = sums_of_first(kept, axis, sizes)
    log_probability = mask.candidate_probs().log().clamp(min=LOWEST_LOG_PROBABILITY)
    return IMPORTANCE_SCORE * fraction * kept + log_probability


def kept_scores(
    scores: Tensor,
    size: tuple[int, ...],
) -> Tensor:
    """Return the scores of the units that a candidate keeps: the best ones.

    On a grid, these are the best channels of the heads whose best channels sum up to most.

    Args:
        scores: (U,) or (H, D). size: (U',) or (heads, channels per head).

    Returns:
        (U',) or (heads, channels per head).
    """
    ordered = scores.sort(dim=-1, descending=True).values
    best = ordered[..., : size[-1]]  # (U',) or (H, D')
    if len(size) == 1:
        return best
    heads = best.sum(1).argsort(descending=True)[: size[0]]
    return best[heads]


@torch.no_grad()
def first_order_candidates(groups: list[list[BiMask]]) -> Candidates:
    """Return every active candidate, scored by the first-order scores of the units it keeps.

    Args:
        groups: as for `scored_candidates`.

    Returns:
        As `scored_candidates`; empty if no image was observed.
    """
    total = 0.0
    for group in groups:
        for mask in group:
            total += float(mask.first_order.double().sum())

    def scores(mask: BiMask) -> Tensor:
        axes = [sizes.tolist() for sizes in mask.candidate_axes]
        sums = []
        for size in product(*axes):
            kept = kept_scores(mask.first_order.double(), size).sum()
            # They add up to the same as the scores of the search, so that a nat and the rounding
            # of the knapsack weigh the same.
            sums.append(IMPORTANCE_SCORE / total * kept)
        return torch.stack(sums).reshape(mask.alpha.shape)  # (K,) or (K_heads, K_dims)

    return scored_candidates(groups, scores) if total > 0 else {}
