"""What a network costs: exact integers for a subnet, differentiable tensors for a supernet.

The unit is the multiply-accumulate (MAC) of what the model executes on one image, class token
included; biases, norms, softmax and activations are not counted. Literature on vision transformers
reports this number as "FLOPs":
DeiT-T/S/B 1.25 / 4.60 / 17.56 G. It equals `torch.utils.flop_counter` (eager attention) divided by
two.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig

from ..families.description import Architecture, Term, UnsupportedArchitectureError, quantities
from ..families.registry import describe, require_classifier
from ..families.subnet import SubnetSpec
from ..families.vit import scheduled
from ..models.configuration_ofb_vit import OFBViTConfig

# Fields of a stock config that one of ours is not made with.
NOT_GIVEN = ("model_type", "architectures", "transformers_version", "dtype")


def count_macs(model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None = None) -> int:
    """Exact MACs of one image at `config.image_size`.

    Args:
        model: an image classifier or its config, stock or ours.
        subnet: count what this subnet of `model` would cost instead.

    Raises:
        UnsupportedArchitectureError: for a model of another family, and for a token schedule where
            it is no ViT.
        ValueError: for a token schedule that the model cannot follow.
    """
    return count_cost(model, lambda architecture: architecture.macs, subnet)


def count_params(
    model: PreTrainedModel | PreTrainedConfig, subnet: SubnetSpec | None = None
) -> int:
    """Exact number of parameters of the classifier; arguments and errors as `count_macs`."""
    return count_cost(model, lambda architecture: architecture.params, subnet)


def count_cost(
    model: PreTrainedModel | PreTrainedConfig,
    terms_of: Callable[[Architecture], tuple[Term, ...]],
    subnet: SubnetSpec | None = None,
) -> int:
    """Exact value of any sum of terms: of what a budget counts, with `BiMaskConfig.terms`.

    Args:
        model, subnet: as for `count_macs`.
        terms_of: the cost terms of an architecture.
    """
    architecture = _architecture(model, None if subnet is None else subnet.token_schedule)
    sizes = dict(architecture.sizes)
    if subnet is not None:
        sizes |= {
            name: size if isinstance(size, tuple) else (size,)
            for name, size in subnet.sizes.items()
        }
    return evaluate_terms(terms_of(architecture), quantities(sizes))


def meant_schedule(config: PreTrainedConfig, schedule: Sequence[Sequence[int]]) -> list[list[int]]:
    """The counts that a ViT of this config, stock or ours, has under a token schedule; they do not
    rise.

    Raises:
        UnsupportedArchitectureError: for other families.
        ValueError: for a schedule that the model cannot follow; see `OFBViTConfig`.
    """
    if not isinstance(config, ViTConfig):
        raise UnsupportedArchitectureError(
            f"a token_schedule is given for a {config.model_type}, but tokens are ranked by a "
            f"class token, which among "
            "the supported families only ViT has; leave it out."
        )
    if not isinstance(config, OFBViTConfig):
        config = OFBViTConfig(
            **{name: value for name, value in config.to_dict().items() if name not in NOT_GIVEN}
        )
    return config.meant_schedule(schedule) or [
        [config.num_tokens] * 2 for _ in range(config.num_hidden_layers)
    ]


def evaluate_terms(terms: tuple[Term, ...], amounts: dict[str, int]) -> int:
    """Sum over the terms, given the value of every quantity."""
    return sum(
        term.coefficient * math.prod(amounts[name] for name in term.factors) for term in terms
    )


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
        factors = [
            [*(index[name] for name in term.factors), len(names), len(names)][:2] for term in terms
        ]
        self.register_buffer(
            "coefficients", torch.tensor([float(term.coefficient) for term in terms]), False
        )
        self.register_buffer("factors", torch.tensor(factors).T.contiguous(), False)

    def forward(self, amounts: Tensor) -> Tensor:
        """Values (Q,) of the quantities -> scalar cost."""
        first, second = torch.cat([amounts, amounts.new_ones(1)])[self.factors]
        return (self.coefficients * first * second).sum()


def _architecture(
    model: PreTrainedModel | PreTrainedConfig, token_schedule: list[list[int]] | None = None
) -> Architecture:
    if isinstance(model, nn.Module):
        require_classifier(model)
        model = model.config
    return (
        describe(model)
        if token_schedule is None
        else scheduled(model, meant_schedule(model, token_schedule))
    )
