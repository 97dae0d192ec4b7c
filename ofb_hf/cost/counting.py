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
from ..families.registry import describe, require_classifier, unwrapped
from ..families.subnet import SubnetSpec
from ..families.token_reduction import at_image_size, followed_schedule, scheduled


def count_macs(
    model: PreTrainedModel | PreTrainedConfig,
    subnet: SubnetSpec | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> int:
    """Count the exact MACs of one image.

    Args:
        model: an image classifier or its config, stock or ours. Of a `PeftModel` its base model is
            counted, which is what remains when adapters are merged.
        subnet: count what this subnet of `model` would cost instead.
        image_size: pixels of a side or (height, width), by default those of the config. Others are
            what a model costs that is called with `interpolate_pos_encoding=True`.

    Raises:
        UnsupportedArchitectureError: for a model of no family, and for a token schedule that the
            family does not support.
        ValueError: for a token schedule that the model cannot follow, and for images without a
            whole patch.
    """
    return count_cost(model, lambda architecture: architecture.macs, subnet, image_size)


def count_params(
    model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None = None
) -> int:
    """Count the parameters of a classifier exactly; arguments and errors as `count_macs`."""
    return count_cost(model, lambda architecture: architecture.params, subnet)


def count_cost(
    model: PreTrainedModel | PreTrainedConfig,
    terms_of: Callable[[Architecture], tuple[Term, ...]],
    subnet: SubnetSpec | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> int:
    """Count any sum of terms exactly: what a budget counts, with `BiMaskConfig.terms`.

    Args:
        model: as for `count_macs`.
        terms_of: architecture -> its cost terms.
        subnet: as for `count_macs`.
        image_size: as for `count_macs`.
    """
    config = model
    if isinstance(model, nn.Module):
        classifier = unwrapped(model)
        require_classifier(classifier)
        config = classifier.config
    schedule = getattr(config, "token_schedule", None)
    if subnet is not None and subnet.token_schedule is not None:
        schedule = subnet.token_schedule
    if schedule is not None:
        schedule = followed_schedule(config, schedule)
    if image_size is not None:
        architecture = at_image_size(config, image_size, schedule)
    else:
        architecture = describe(config) if schedule is None else scheduled(config, schedule)
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
