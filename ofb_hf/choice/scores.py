"""What each candidate would be worth: the scores that a choice under the budget adds up."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ..cost.counting import evaluate_terms
from ..families.description import Term, heads_of, quantities
from ..masks.bi_mask import BiMask, sums_of_first
from .knapsack import Candidate

# Kept importance, weighted by its share of the dense cost, counts this many times a nat of
# candidate probability (found by experiment: docs/ARCHITECTURE.md).
IMPORTANCE_SCORE = 400.0
# A softmax that has made up its mind must not outvote the budget: log-probabilities below this
# count as this.
LOWEST_LOG_PROBABILITY = -5.0


def scored_candidates(
    groups: list[list[BiMask]], scores: Callable[[BiMask], Tensor]
) -> dict[str, list[Candidate]]:
    """Every active candidate of every group of bi-masks that choose together, with its score.

    Args:
        groups: the one that owns the choice comes first, and gives its name; the scores of all of
            them add up.
        scores: of a bi-mask's candidates, shaped like alpha.
    """
    options = {}
    for leader, *tied in groups:
        score = torch.stack([scores(mask) for mask in (leader, *tied)]).sum(0)
        axes = [sizes.tolist() for sizes in leader.candidate_axes]
        chosen, values = (
            leader.active_candidates.nonzero().tolist(),
            score[leader.active_candidates].tolist(),
        )
        options[leader.name] = [
            Candidate(tuple(axis[i] for axis, i in zip(axes, index, strict=True)), value)
            for index, value in zip(chosen, values, strict=True)
        ]
    return options


@torch.no_grad()
def search_scores(
    mask: BiMask, terms: tuple[Term, ...], dense_sizes: dict[str, tuple[int, ...]]
) -> Tensor:
    """Kept importance in proportion to cost, plus log-probability, of every candidate; shaped like
    alpha.

    Args:
        terms: the cost, in the budget's unit.
        dense_sizes: submodule name -> units before the search.
    """
    dense = quantities(dense_sizes)
    touched = tuple(term for term in terms if {mask.name, heads_of(mask.name)} & set(term.factors))
    unit_share = evaluate_terms(touched, dense) / dense[mask.name] / evaluate_terms(terms, dense)
    kept = mask.importance_by_rank()
    for axis, sizes in enumerate(mask.candidate_axes):
        kept = sums_of_first(kept, axis, sizes)
    log_probability = mask.candidate_probs().log().clamp(min=LOWEST_LOG_PROBABILITY)
    return IMPORTANCE_SCORE * unit_share * kept + log_probability


def kept_scores(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """The scores of the units that a candidate keeps: the best ones, on a grid the best channels of
    the best heads.

    Args:
        scores: (U,) or (H, D). size: (U',) or (heads, channels per head).
    """
    best = scores.sort(dim=-1, descending=True).values[..., : size[-1]]
    return best if len(size) == 1 else best[best.sum(1).argsort(descending=True)[: size[0]]]


@torch.no_grad()
def first_order_candidates(groups: list[list[BiMask]]) -> dict[str, list[Candidate]]:
    """Every active candidate, scored by what was observed of the units it keeps; empty if nothing
    was observed.

    Args:
        groups: as for `scored_candidates`.
    """
    total = sum(float(mask.first_order.double().sum()) for group in groups for mask in group)

    def scores(mask: BiMask) -> Tensor:
        axes = [sizes.tolist() for sizes in mask.candidate_axes]
        # As large in all as the scores of the search, for the same rounding.
        sums = [
            IMPORTANCE_SCORE / total * kept_scores(mask.first_order.double(), size).sum()
            for size in product(*axes)
        ]
        return torch.stack(sums).reshape(mask.alpha.shape)

    return scored_candidates(groups, scores) if total > 0 else {}
