"""What each candidate would be worth: the scores that the final choice adds up."""

import torch
from torch import Tensor

from .bi_mask import BiMask
from .flops import evaluate_terms
from .settlement import Option
from .unit_groups import Term, heads_of, quantities

# Kept importance, weighted by its share of the dense cost, counts this many times a nat of candidate probability
# (found by experiment: docs/ARCHITECTURE.md).
IMPORTANCE_SCORE = 400.0
# A softmax that has made up its mind must not outvote the budget: log-probabilities below this count as this.
LOWEST_LOG_PROBABILITY = -5.0


@torch.no_grad()
def candidate_options(
    groups: list[list[BiMask]], terms: tuple[Term, ...], dense_sizes: dict[str, tuple[int, ...]]
) -> dict[str, list[Option]]:
    """Every active candidate of every group of bi-masks that choose together, with its score.

    Args:
        groups: the one that owns the choice comes first, and gives its name; the scores of all of them add up.
        terms: the cost, in the budget's unit.
        dense_sizes: submodule name -> units before the search.
    """
    options = {}
    for leader, *tied in groups:
        score = torch.stack([_scores(mask, terms, quantities(dense_sizes)) for mask in (leader, *tied)]).sum(0)
        axes = [sizes.tolist() for sizes in leader.candidate_axes]
        chosen, scores = leader.active_candidates.nonzero().tolist(), score[leader.active_candidates].tolist()
        options[leader.name] = [
            Option(tuple(axis[i] for axis, i in zip(axes, index, strict=True)), value)
            for index, value in zip(chosen, scores, strict=True)
        ]
    return options


def _scores(mask: BiMask, terms: tuple[Term, ...], dense: dict[str, int]) -> Tensor:
    """Kept importance in proportion to cost, plus log-probability, of every candidate; shaped like alpha."""
    touched = tuple(term for term in terms if {mask.name, heads_of(mask.name)} & set(term.factors))
    unit_share = evaluate_terms(touched, dense) / dense[mask.name] / evaluate_terms(terms, dense)
    log_probability = mask.candidate_probs().log().clamp(min=LOWEST_LOG_PROBABILITY)
    return IMPORTANCE_SCORE * unit_share * _kept_importance(mask) + log_probability


def _kept_importance(mask: BiMask) -> Tensor:
    """Importance that each candidate would keep, shaped like alpha."""
    total = mask.importance_by_rank()
    for axis, sizes in enumerate(mask.candidate_axes):
        total = total.cumsum(axis).index_select(axis, sizes - 1)
    return total
