"""Simple ways to choose a subnet, to compare a search with.

Uniform scaling, chance, magnitude, first-order Taylor.

A baseline decides twice, as a search does: how many units each submodule keeps, and which. All of
them end exactly under the same budget, over the same candidate sizes;
`ofb_hf.pruning.surgery.slice_model` cuts the network accordingly.

    scores = taylor_scores(model, batches)
    small = slice_model(model, pruned_subnet(model, config, scores))
"""

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..cost.counting import evaluate_terms
from ..families.description import Submodule, Term, quantities
from ..families.registry import describe, require_classifier
from ..families.subnet import Kept, SubnetSpec
from ..space.configuration import BiMaskConfig
from ..space.search_space import SubmoduleSpace
from .knapsack import best_choice
from .problem import Candidate
from .scores import kept_scores

# Submodule name -> how much each unit matters, (U,) or (heads, channels per head); at least 0.
Scores = dict[str, Tensor]
# Bisection steps for the fraction of `uniform_subnet`: 2**-50 is below the precision of a float.
BISECTIONS = 50


def magnitude_scores(model: PreTrainedModel) -> Scores:
    """Return the L1 norm of the weights that write each unit (arXiv:1608.08710).

    To be comparable between submodules, it is relative to the mean of its submodule, times the
    fraction of the MACs that a unit of that submodule accounts for: norms of different layers say
    nothing about each other, and without that fraction whatever is expensive would be pruned first.
    """
    architecture = describe(model.config)
    amounts = quantities(architecture.sizes)
    dense_macs = evaluate_terms(architecture.macs, amounts)
    sums = _unit_sums(model, lambda parameter: parameter.detach().abs())
    scores = {}
    for name, score in sums.items():
        own_terms = tuple(term for term in architecture.macs if name in term.factors)
        fraction = evaluate_terms(own_terms, amounts) / dense_macs / amounts[name]
        scores[name] = fraction * score / score.mean()
    return scores


def taylor_scores(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
) -> Scores:
    """Return first-order estimates of the squared change of the loss when a unit is removed.

    arXiv:1906.10771, eq. 8: the square of the sum of gradient times weight over the weights of the
    unit.

    Args:
        model: on its device; only a copy of it is changed.
        batches: `pixel_values` (B, C, H, W) and `labels` (B,). The loss is the cross-entropy of a
            batch; squares are summed over the batches.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    total: Scores = {}
    for batch in batches:
        model.zero_grad()
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        F.cross_entropy(logits, batch["labels"].to(model.device)).backward()
        changes = _unit_sums(model, lambda parameter: parameter.detach() * parameter.grad)
        # Squared per batch: gradients of different batches must not cancel out.
        for name, change in changes.items():
            total[name] = total.get(name, 0) + change.square()
    return total


def random_scores(
    model: PreTrainedModel,
    seed: int,
) -> Scores:
    """Return uniform noise in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for submodule in describe(model.config).submodules:
        scores[submodule.name] = torch.rand(submodule.shape, generator=generator)
    return scores


def pruned_subnet(
    model: PreTrainedModel,
    config: BiMaskConfig,
    scores: Scores,
) -> SubnetSpec:
    """Return the subnet that keeps the largest sum of scores within the budget.

    This is one-shot global pruning.

    Args:
        model: the dense classifier.
        config: space and budget.
        scores: of every searched submodule.

    Raises:
        UnreachableBudgetError: if no subnet fits the budget, naming the smallest possible value.
    """

    def kept(
        space: SubmoduleSpace,
        size: tuple[int, ...],
    ) -> float:
        return float(kept_scores(scores[space.name], size).sum())

    return _choose(model, config, scores, kept)


def uniform_subnet(
    model: PreTrainedModel,
    config: BiMaskConfig,
    scores: Scores,
) -> SubnetSpec:
    """Return the subnet with the same fraction of every submodule.

    It is as nearly the same as the candidates and the budget allow.

    Args:
        model, config: as for `pruned_subnet`.
        scores: which units each submodule keeps, the best ones.
    """
    terms, target = _budget(model, config)
    sizes = describe(model.config).sizes
    searched = {space.name for space in config.search_space(model.config)}

    def cost(fraction: float) -> float:
        scaled = {}
        for name, size in sizes.items():
            # Along each axis of a grid the square root, so that its units are this fraction.
            factor = fraction ** (1 / len(size)) if name in searched else 1
            scaled[name] = tuple(factor * units for units in size)
        return evaluate_terms(terms, quantities(scaled))

    low = 0.0
    high = 1.0
    for _ in range(BISECTIONS):
        fraction = (low + high) / 2
        if cost(fraction) > target:
            high = fraction
        else:
            low = fraction

    def nearness(
        space: SubmoduleSpace,
        size: tuple[int, ...],
    ) -> float:
        distance = math.prod(size) / space.num_units - low
        # Of two grids with the same units, the one with whole heads is the usual one.
        return -(distance**2) + 1e-6 * size[-1] / space.num_units

    return _choose(model, config, scores, nearness)


def random_subnet(
    model: PreTrainedModel,
    config: BiMaskConfig,
    seed: int,
) -> SubnetSpec:
    """Return random sizes and random units within the budget.

    Sizes are the best choice under independent Gumbel noise, a nearly uniform sample of all that
    fit (perturb-and-MAP, Papandreou and Yuille, ICCV 2011).
    """
    generator = torch.Generator().manual_seed(seed)

    # -log(-log(u)) of a uniform u has a Gumbel distribution.
    def gumbel(
        space: SubmoduleSpace,
        size: tuple[int, ...],
    ) -> float:
        uniform = torch.rand(1, generator=generator, dtype=torch.float64).item()
        return -math.log(-math.log(uniform))

    return _choose(model, config, random_scores(model, seed), gumbel)


def _budget(
    model: PreTrainedModel,
    config: BiMaskConfig,
) -> tuple[tuple[Term, ...], int]:
    """Return the terms of the cost and the budget in their unit."""
    require_classifier(model)
    architecture = describe(model.config)
    terms = config.terms(architecture)
    dense = evaluate_terms(terms, quantities(architecture.sizes))
    return terms, config.target(dense)


def _choose(
    model: PreTrainedModel,
    config: BiMaskConfig,
    scores: Scores,
    worth: Callable[[SubmoduleSpace, tuple[int, ...]], float],
) -> SubnetSpec:
    """Return the sizes that are worth most within the budget, with the units of the best scores."""
    terms, target = _budget(model, config)
    spaces = config.search_space(model.config)
    if any(space.tied_to for space in spaces):
        raise ValueError(
            "uniform_across_layers is True, but baselines choose every layer for itself; set it to "
            "False."
        )
    candidates = {}
    for space in spaces:
        candidates[space.name] = [Candidate(size, worth(space, size)) for size in space.sizes]
    architecture = describe(model.config)
    fixed_sizes = {
        name: size for name, size in architecture.sizes.items() if name not in candidates
    }
    choice = best_choice(
        candidates,
        terms,
        quantities(fixed_sizes),
        target,
        needed=architecture.attentions,
        show=config.show,
    )
    kept = {}
    for name, candidate in choice.candidates.items():
        kept[name] = _best_units(scores[name], candidate.size)
    return SubnetSpec(kept)


def _best_units(
    score: Tensor,
    size: tuple[int, ...],
) -> Kept:
    """Return the units of the best scores, ascending; by head for a grid.

    Args:
        score: (U,) or (H, D). size: (U',) or (H', D').
    """
    order = score.argsort(dim=-1, descending=True)
    best = order[..., : size[-1]].sort(-1).values  # (U',) or (H, D')
    if len(size) == 1:
        return tuple(best.tolist())
    sums = score.gather(1, best).sum(1)  # (H,)
    heads = sums.argsort(descending=True)[: size[0]].sort().values
    return {head: tuple(best[head].tolist()) for head in heads.tolist()}


def _unit_sums(
    model: PreTrainedModel,
    value: Callable[[Tensor], Tensor],
) -> Scores:
    """Return the sums of a value of every weight over the weights that write each unit."""
    require_classifier(model)
    parameters = dict(model.named_parameters())
    sums = {}
    for submodule in describe(model.config).submodules:
        if math.prod(submodule.shape):
            sums[submodule.name] = _sum_of(submodule, parameters, value)
    return sums


def _sum_of(
    submodule: Submodule,
    parameters: dict[str, Tensor],
    value: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the sums of a value over the gated slots of a submodule, shaped like its units."""
    total = torch.zeros(math.prod(submodule.shape))
    for slot in submodule.slots:
        if slot.gated and slot.parameter in parameters:
            amounts = value(parameters[slot.parameter])
            others = [axis for axis in range(amounts.ndim) if axis != slot.axis]
            # Without axes, `sum` would sum over all of them.
            sums = amounts.sum(others) if others else amounts  # (U,)
            total += sums.float().cpu()
    return total.reshape(submodule.shape)
