"""Count what a network costs: exact integers for a subnet, differentiable tensors for a supernet.

The unit is the multiply-accumulate (MAC) of what the model executes on one image, class token
included; biases, norms, softmax and activations are not counted. Literature on vision transformers
reports this number as "FLOPs": DeiT-T/S/B 1.25 / 4.60 / 17.56 G. It equals
`torch.utils.flop_counter` (eager attention) divided by two.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.description import Architecture, Term, quantities
from ..families.registry import describe, require_classifier
from ..families.subnet import SubnetSpec
from ..families.token_reduction import followed_schedule, scheduled


def count_macs(model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None = None) -> int:
    """Count the exact MACs of one image at `config.image_size`.

    Args:
        model: an image classifier or its config, stock or ours.
        subnet: count what this subnet of `model` would cost instead.

    Raises:
        UnsupportedArchitectureError: for a model of no family, and for a token schedule that the
            family does not support.
        ValueError: for a token schedule that the model cannot follow.
    """
    return count_cost(model, lambda architecture: architecture.macs, subnet)


def count_params(
    model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None = None
) -> int:
    """Count the parameters of a classifier exactly; arguments and errors as `count_macs`."""
    return count_cost(model, lambda architecture: architecture.params, subnet)


def count_cost(
    model: PreTrainedModel | PreTrainedConfig,
    terms_of: Callable[[Architecture], tuple[Term, ...]],
    subnet: SubnetSpec | None = None,
) -> int:
    """Count any sum of terms exactly: what a budget counts, with `BiMaskConfig.terms`.

    Args:
        model: as for `count_macs`.
        terms_of: architecture -> its cost terms.
        subnet: as for `count_macs`.
    """
    if isinstance(model, nn.Module):
        require_classifier(model)
        model = model.config
    schedule = None if subnet is None else subnet.token_schedule
    if schedule is None:
        architecture = describe(model)
    else:
        architecture = scheduled(model, followed_schedule(model, schedule))
    sizes = architecture.sizes
    if subnet is not None:
        sizes = sizes | subnet.shapes
    return evaluate_terms(terms_of(architecture), quantities(sizes))


def evaluate_terms(terms: tuple[Term, ...], amounts: dict[str, int]) -> int:
    """Return the sum over terms, given the value of every quantity.

    Coefficients may be tensors or arrays; the sum is of the same type.
    """
    total = 0
    for term in terms:
        product = math.prod(amounts[name] for name in term.factors)
        total = total + term.coefficient * product
    return total


class ExpectedCost(nn.Module):
    """A sum of terms as one batched, differentiable computation.

    Args:
        terms: T cost terms of an architecture.
        names: Q quantities in the order in which `forward` receives their values.
    """

    def __init__(self, terms: tuple[Term, ...], names: list[str]):
        super().__init__()
        index = {name: position for position, name in enumerate(names)}
        # Position Q stands for the constant 1, so that every term has exactly two factors.
        one = len(names)
        factors = []
        for term in terms:
            positions = [index[name] for name in term.factors]
            factors.append([*positions, one, one][:2])
        coefficients = [float(term.coefficient) for term in terms]
        pairs = torch.tensor(factors).T.contiguous()  # (T, 2) -> (2, T)
        self.register_buffer("coefficients", torch.tensor(coefficients), persistent=False)
        self.register_buffer("factors", pairs, persistent=False)

    def forward(self, amounts: Tensor) -> Tensor:
        """Return the scalar cost for values (Q,) of the quantities."""
        values = torch.cat([amounts, amounts.new_ones(1)])  # (Q + 1,)
        first, second = values[self.factors]  # (T,) each
        return (self.coefficients * first * second).sum()
