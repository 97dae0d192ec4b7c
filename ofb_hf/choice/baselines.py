"""Simple ways to choose a subnet, to hold a search against: uniform scaling, chance, magnitude,
first-order Taylor.

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
from ..families.description import Architecture, Submodule, Term, quantities
from ..families.registry import describe, require_classifier
from ..families.subnet import Kept, SubnetSpec
from ..space.configuration import BiMaskConfig
from ..space.search_space import SubmoduleSpace
from .knapsack import TIGHTNESS, Candidate, best_choice
from .scores import kept_scores

# Submodule name -> how much each unit matters, (U,) or (heads, channels per head); at least 0.
Scores = dict[str, Tensor]


def magnitude_scores(model: PreTrainedModel) -> Scores:
    """L1 norm of the weights that write each unit (arXiv:1608.08710), comparable between
    submodules.

    Relative to the mean of its submodule, times the share of the MACs that a unit of that submodule
    accounts for: norms of different layers say nothing about each other, and without that share
    whatever is expensive would go first.
    """
    architecture = describe(model.config)
    amounts = quantities(architecture.sizes)
    sums = _unit_sums(model, lambda parameter: parameter.detach().abs())
    scores = {}
    for name, score in sums.items():
        touched = tuple(term for term in architecture.macs if name in term.factors)
        share = (
            evaluate_terms(touched, amounts)
            / evaluate_terms(architecture.macs, amounts)
            / amounts[name]
        )
        scores[name] = share * score / score.mean()
    return scores


def taylor_scores(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Scores:
    """First-order estimate of the squared change of the loss when a unit is removed
    (arXiv:1906.10771, eq. 8).

    Args:
        model: on its device; a copy of it is worked on.
        batches: `pixel_values` (B, C, H, W) and `labels` (B,); cross-entropy, squared per batch,
            summed over them.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    total: Scores = {}
    for batch in batches:
        model.zero_grad()
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        F.cross_entropy(logits, batch["labels"].to(model.device)).backward()
        for name, change in _unit_sums(model, lambda p: p.detach() * p.grad).items():
            total[name] = total.get(name, 0) + change.square()
    return total


def random_scores(model: PreTrainedModel, seed: int) -> Scores:
    """Uniform noise in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: torch.rand(s.shape, generator=generator) for s in describe(model.config).submodules
    }


def pruned_subnet(model: PreTrainedModel, config: BiMaskConfig, scores: Scores) -> SubnetSpec:
    """The subnet that keeps the largest sum of scores within the budget: one-shot global pruning.

    Args:
        model: the dense classifier.
        config: space and budget.
        scores: of every searched submodule.

    Raises:
        UnreachableBudgetError: if no subnet fits the budget, naming the smallest possible value.
    """
    return _choose(
        model,
        config,
        scores,
        lambda space, size: float(kept_scores(scores[space.name], size).sum()),
    )


def uniform_subnet(model: PreTrainedModel, config: BiMaskConfig, scores: Scores) -> SubnetSpec:
    """The same share of every submodule, as nearly as its candidates and the budget allow.

    Args:
        model, config: as for `pruned_subnet`.
        scores: which units each submodule keeps, the best ones.
    """
    terms, target = _budget(model, config)
    sizes, searched = (
        describe(model.config).sizes,
        {space.name for space in config.search_space(model.config)},
    )

    def cost(share: float) -> float:
        scaled = {
            n: tuple(share ** (1 / len(s)) * u for u in s) if n in searched else s
            for n, s in sizes.items()
        }
        return evaluate_terms(terms, quantities(scaled))

    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        low, high = (low, share) if cost(share) > target else (share, high)
    # Of two grids with the same units the one that keeps whole heads is the usual one.
    return _choose(
        model,
        config,
        scores,
        lambda space, size: (
            -((math.prod(size) / space.num_units - low) ** 2) + 1e-6 * size[-1] / space.num_units
        ),
    )


def random_subnet(model: PreTrainedModel, config: BiMaskConfig, seed: int) -> SubnetSpec:
    """Random sizes and random units within the budget.

    Sizes are the best choice under independent Gumbel noise, a nearly uniform sample of all that
    fit (perturb-and-MAP, Papandreou and Yuille, ICCV 2011).
    """
    generator = torch.Generator().manual_seed(seed)

    def gumbel(space: SubmoduleSpace, size: tuple[int, ...]) -> float:
        return -math.log(-math.log(torch.rand(1, generator=generator, dtype=torch.float64).item()))

    return _choose(model, config, random_scores(model, seed), gumbel)


def _budget(model: PreTrainedModel, config: BiMaskConfig) -> tuple[tuple[Term, ...], int]:
    """The terms of the cost, and how much they may come to."""
    require_classifier(model)
    architecture: Architecture = describe(model.config)
    terms = config.terms(architecture)
    return terms, config.target(evaluate_terms(terms, quantities(architecture.sizes)))


def _choose(
    model: PreTrainedModel,
    config: BiMaskConfig,
    scores: Scores,
    worth: Callable[[SubmoduleSpace, tuple[int, ...]], float],
) -> SubnetSpec:
    """The sizes that are worth most within the budget, and the units with the best scores."""
    terms, target = _budget(model, config)
    space = config.search_space(model.config)
    if any(submodule.tied_to for submodule in space):
        raise ValueError(
            "uniform_across_layers is True; baselines choose every layer for itself, turn it off."
        )
    options = {s.name: [Candidate(size, worth(s, size)) for size in s.sizes] for s in space}
    architecture = describe(model.config)
    fixed = quantities(
        {name: size for name, size in architecture.sizes.items() if name not in options}
    )
    choice = best_choice(
        options, terms, fixed, target, TIGHTNESS, architecture.attentions, config.show
    ).candidates
    return SubnetSpec(
        {name: _best_units(scores[name], option.size) for name, option in choice.items()}
    )


def _best_units(score: Tensor, size: tuple[int, ...]) -> Kept:
    best = score.argsort(dim=-1, descending=True)[..., : size[-1]].sort(-1).values
    if len(size) == 1:
        return tuple(best.tolist())
    heads = score.gather(1, best).sum(1).argsort(descending=True)[: size[0]].sort().values
    return {head: tuple(best[head].tolist()) for head in heads.tolist()}


def _unit_sums(model: PreTrainedModel, value: Callable[[Tensor], Tensor]) -> Scores:
    """Sums of a value of every weight over the weights that write each unit."""
    require_classifier(model)
    parameters = dict(model.named_parameters())
    submodules = [
        submodule for submodule in describe(model.config).submodules if math.prod(submodule.shape)
    ]
    return {submodule.name: _sum_of(submodule, parameters, value) for submodule in submodules}


def _sum_of(
    submodule: Submodule, parameters: dict[str, Tensor], value: Callable[[Tensor], Tensor]
) -> Tensor:
    total = torch.zeros(math.prod(submodule.shape))
    for slot in submodule.slots:
        if slot.gated and slot.parameter in parameters:
            amounts = value(parameters[slot.parameter])
            other = [axis for axis in range(amounts.ndim) if axis != slot.axis]
            total += (amounts.sum(other) if other else amounts).float().cpu()
    return total.reshape(submodule.shape)
