"""What a network costs: exact integers for a subnet, differentiable tensors for a supernet.

The unit is the multiply-accumulate (MAC) of what the model executes on one image, class token included; biases,
norms, softmax and activations are not counted. Literature on vision transformers reports this number as "FLOPs":
DeiT-T/S/B 1.25 / 4.60 / 17.56 G. It equals `torch.utils.flop_counter` (eager attention) divided by two.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import describe, require_classifier, vit_schedule_terms
from .bi_mask import BiMask
from .search_space import SubnetSpec
from .unit_groups import Architecture, Term, heads_of, presence_of, quantities


def count_macs(model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None = None) -> int:
    """Exact MACs of one image at `config.image_size`.

    Args:
        model: an image classifier or its config, stock or ours.
        subnet: count what this subnet of `model` would cost instead.

    Raises:
        UnsupportedArchitectureError: for a model of another family.
    """
    terms = _architecture(model).macs
    if subnet is not None and subnet.token_schedule is not None:
        terms = vit_schedule_terms(model.config if isinstance(model, nn.Module) else model, subnet.token_schedule)
    return evaluate_terms(terms, _amounts(model, subnet))


def count_params(model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None = None) -> int:
    """Exact number of parameters of the classifier; arguments and errors as `count_macs`."""
    return evaluate_terms(_architecture(model).params, _amounts(model, subnet))


# What a budget counts, by the name of its field.
COUNTS = {"target_macs": count_macs, "target_params": count_params}


def evaluate_terms(terms: tuple[Term, ...], amounts: dict[str, int]) -> int:
    """Sum over the terms, given the value of every quantity."""
    return sum(term.coefficient * math.prod(amounts[name] for name in term.factors) for term in terms)


def best_of(gates: Tensor) -> Tensor:
    """The largest along the last axis, 0 where there is none: what holds several units stays as long as the best."""
    return F.pad(gates, (0, 1)).amax(-1)


def expected_quantities(mask: BiMask, gates: Tensor | None = None) -> dict[str, Tensor]:
    """What cost terms multiply, of one submodule: differentiable scalars by the names of `quantities`.

    Args:
        mask: expected values under its `candidate_probs`, unless gates are given.
        gates: sums of these bi-mask values (U,) instead.
    """
    if gates is None:
        units, heads, presence = mask.expected_size(), mask.expected_heads, mask.expected_presence
    else:
        gates = gates.float().reshape(mask.alive.shape)
        units, heads, presence = gates.sum(), lambda: best_of(gates).sum(), lambda: best_of(gates.flatten())
    amounts = {mask.name: units}
    if mask.is_grid:
        amounts[heads_of(mask.name)] = heads()
    if mask.may_vanish:
        amounts[presence_of(mask.name)] = presence()
    return {name: amount.float() for name, amount in amounts.items()}


class ExpectedCost(nn.Module):
    """A sum of terms as one batched, differentiable computation.

    Args:
        terms: cost terms of an architecture.
        names: quantities in the order in which `forward` receives their values.
    """

    def __init__(self, terms: tuple[Term, ...], names: list[str]):
        super().__init__()
        # Index len(names) stands for the constant 1, so that every term has exactly two factors.
        index = {name: position for position, name in enumerate(names)}
        factors = [[*(index[name] for name in term.factors), len(names), len(names)][:2] for term in terms]
        self.register_buffer("coefficients", torch.tensor([float(term.coefficient) for term in terms]), False)
        self.register_buffer("factors", torch.tensor(factors).T.contiguous(), False)

    def forward(self, amounts: Tensor) -> Tensor:
        """Values (Q,) of the quantities -> scalar cost."""
        first, second = torch.cat([amounts, amounts.new_ones(1)])[self.factors]
        return (self.coefficients * first * second).sum()


def _architecture(model: PreTrainedModel | PreTrainedConfig) -> Architecture:
    if isinstance(model, nn.Module):
        require_classifier(model)
        return describe(model.config)
    return describe(model)


def _amounts(model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None) -> dict[str, int]:
    sizes = dict(_architecture(model).sizes)
    if subnet is not None:
        sizes |= {name: size if isinstance(size, tuple) else (size,) for name, size in subnet.sizes.items()}
    return quantities(sizes)
