"""Scores of a single bi-mask from their definitions, one unit and one candidate at a time.

Independent of `ofb_hf.masks`: it reads a mask's tensors and calls none of its methods.
Differentiable, as the definitions are.
"""

import itertools
import math

import torch
from torch import Tensor

from ofb_hf.masks.bi_mask import BiMask

EVEN = 0.5  # importance that a unit needs where the whole submodule may be left out
MARGIN = 1e-4  # distance of sigma from the poles of the cotangent


def candidates(mask: BiMask) -> dict[tuple[int, ...], Tensor]:
    """The logit of every active candidate by its size."""
    axes = [sizes.tolist() for sizes in mask.candidate_axes]
    found = {}
    for index in itertools.product(*(range(len(sizes)) for sizes in axes)):
        if mask.active_candidates[index]:
            size = tuple(sizes[at] for sizes, at in zip(axes, index, strict=True))
            found[size] = mask.alpha[index]
    return found


def probabilities(mask: BiMask) -> dict[tuple[int, ...], Tensor]:
    """The softmax over the active candidates."""
    logits = candidates(mask)
    total = sum(logit.exp() for logit in logits.values())
    return {size: logit.exp() / total for size, logit in logits.items()}


def units(mask: BiMask) -> list[tuple[int, ...]]:
    """The index of every unit, dead or alive: (u,) or (head, channel)."""
    return list(itertools.product(*map(range, mask.alive.shape)))


def importance(mask: BiMask) -> Tensor:
    """The sigmoid of every living unit, divided by the largest one if the mask normalises."""
    scores = {unit: mask.importance_logits[unit].sigmoid() for unit in units(mask)}
    scores = {unit: score * bool(mask.alive[unit]) for unit, score in scores.items()}
    divisor = 1.0
    if mask.normalize_importance:
        largest = max((score.item() for score in scores.values()), default=1.0)
        divisor = max(largest, EVEN) if mask.may_vanish else largest
    return stacked([score / divisor for score in scores.values()], mask)


def ranks(mask: BiMask) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The rank of every living unit: (rank,), or (rank of its head, rank within the head)."""
    logits, alive = mask.importance_logits.tolist(), mask.alive.tolist()
    if not mask.is_grid:
        return {(unit,): (rank,) for unit, rank in order(logits, alive).items()}
    heads, found = order(head_sums(mask), [any(row) for row in alive]), {}
    for head, head_rank in heads.items():
        for channel, rank in order(logits[head], alive[head]).items():
            found[head, channel] = (head_rank, rank)
    return found


def head_sums(mask: BiMask) -> list[float]:
    """The sum of the sigmoids of the living units of every head."""
    rows = zip(mask.importance_logits.tolist(), mask.alive.tolist(), strict=True)
    return [
        sum(1 / (1 + math.exp(-logit)) for logit, lives in zip(*row, strict=True) if lives)
        for row in rows
    ]


def heads_tie(mask: BiMask) -> bool:
    """Whether the sums of two living heads are equal up to rounding: either may come first."""
    if not mask.is_grid:
        return False
    sums = sorted(total for total in head_sums(mask) if total > 0)
    return any(high - low < 1e-9 for low, high in itertools.pairwise(sums))


def order(scores: list[float], alive: list[bool]) -> dict[int, int]:
    """Living index -> its rank from the largest score to the smallest; ties in index order."""
    living = [index for index, lives in enumerate(alive) if lives]
    ordered = sorted(living, key=lambda index: (-scores[index], index))
    return {index: rank for rank, index in enumerate(ordered)}


def sparsity(mask: BiMask) -> Tensor:
    """The probability, for every living unit, of the candidates that keep its rank."""
    p, found, rows = probabilities(mask), ranks(mask), []
    for unit in units(mask):
        value = 0 * mask.alpha.sum()
        for size, probability in p.items():
            if unit in found and all(r < s for r, s in zip(found[unit], size, strict=True)):
                value = value + probability
        rows.append(value)
    return stacked(rows, mask)


def prunability(mask: BiMask, lam: float) -> Tensor:
    """The mixture of both."""
    return lam * importance(mask) + (1 - lam) * sparsity(mask)


def expected_amounts(mask: BiMask) -> tuple[Tensor, Tensor, Tensor]:
    """Expected units and heads, and the probability that there is any unit; a plain axis has one
    head."""
    p = probabilities(mask)
    expected_units = sum(probability * math.prod(size) for size, probability in p.items())
    heads = {size: size[0] if mask.is_grid else 1 for size in p}
    expected_heads = sum(probability * heads[size] for size, probability in p.items())
    presence = sum(probability * (math.prod(size) > 0) for size, probability in p.items())
    return expected_units, expected_heads, presence


def one_hot_loss(mask: BiMask) -> Tensor:
    """Entropy + cot(pi * sigma) / n, sigma = variance / largest variance; 0 for one candidate."""
    p = torch.stack(list(probabilities(mask).values()))
    n = len(p)
    if n == 1:
        return 0 * p.sum()
    sigma = (((p - 1 / n) ** 2).sum() / (1 - 1 / n)).clamp(MARGIN, 1 - MARGIN)
    return torch.special.entr(p).sum() + 1 / torch.tan(math.pi * sigma) / n


def stacked(values: list[Tensor], mask: BiMask) -> Tensor:
    """One value for every unit, shaped like the units."""
    if not values:
        return mask.importance_logits * 0
    return torch.stack(values).view(mask.alive.shape)
