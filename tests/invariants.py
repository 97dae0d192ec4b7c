"""What the tests of a supernet share: masks exactly open or closed, subnets at random, a loss that
needs everything.

Submodules are named by asking the architecture, so that the same words serve every family.
"""

import random
from typing import Any

import torch
from factories import OURS, TOLERANCE, non_uniform_swin, non_uniform_vit, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ofb_hf import SubnetSpec
from ofb_hf.families.registry import describe
from ofb_hf.search.pmim import mask_patches
from ofb_hf.search.supernet import Supernet

DTYPES = [torch.float32, torch.float64]
KINDS = ["embedding", "attention", "mlp"]
LABELS = torch.tensor([0, 2])
NON_UNIFORM = {"vit": non_uniform_vit, "swin": non_uniform_swin}


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def ours(family: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """A tiny dense classifier of our own class; arguments as for `tiny_model`."""
    return OURS[family].from_dense(tiny_model(family, *args, **kwargs))


def names_of(config: PreTrainedConfig, kind: str) -> list[str]:
    """The submodules of one kind, in the order of the model."""
    return [submodule.name for submodule in describe(config).submodules if submodule.kind == kind]


def images_for(model: nn.Module, count: int = 2) -> Tensor:
    """Normalised images (B, C, H, W) of the size and precision of a model."""
    config, dtype = model.config, next(model.parameters()).dtype
    size = (
        config.image_size
        if isinstance(config.image_size, list | tuple)
        else [config.image_size] * 2
    )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, config.num_channels, *size, generator=generator).to(dtype)


def masked_patches(model: nn.Module, count: int = 2) -> Tensor:
    """A quarter of the patches of every image: (B, patches)."""
    rows, columns = describe(model.config).patch_grid
    return mask_patches(count, rows * columns, 0.75, torch.Generator().manual_seed(0))


def assert_close(actual: Tensor, expected: Tensor, **kwargs) -> None:
    """Equal up to the tolerance of their precision."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, **kwargs)


def copy_of_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is now."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """A module's state, bit for bit."""
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def seeded(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A forward pass that draws the same random numbers every time (drop path)."""
    torch.manual_seed(0)
    return model(*args, **kwargs)


@torch.no_grad()
def open_masks_(supernet: Supernet, importance: float | None = None) -> None:
    """All mask values exactly 1: by sparsity alone, or with importance scores that round to 1 as
    well."""
    for mask in supernet.bi_masks:
        mask.settle_(*mask.largest_size())
        if importance is not None:
            mask.importance_logits.fill_(importance)
    supernet.lam.fill_(0.0 if importance is None else 0.4)


@torch.no_grad()
def close_masks_(supernet: Supernet, subnet: SubnetSpec) -> None:
    """Mask values exactly 1 for the units of a subnet and exactly 0 for all others."""
    open_masks_(supernet, 100.0)
    supernet.lam.fill_(1.0)
    for mask in supernet.bi_masks:
        kept = subnet.kept[mask.name]
        mask.alive.zero_()
        if isinstance(kept, dict):
            for head, channels in kept.items():
                mask.alive[head, list(channels)] = True
        else:
            mask.alive[list(kept)] = True


def units_to_keep(
    config: PreTrainedConfig, what: str, rng: random.Random, smallest: int = 0
) -> SubnetSpec:
    """Random units of some submodules, and all units of the others.

    Args:
        what: a kind or the name of one submodule; `heads` takes whole heads, `channels` some within
            every head, and `one width` one residual width of those that the network has.
        smallest: heads of an attention, or units of an MLP, that stay at least.
    """
    submodules = describe(config).submodules
    one_width = rng.choice(names_of(config, "embedding"))
    kept = {}
    for submodule in submodules:
        name, shape = submodule.name, submodule.shape
        chosen = what in (name, submodule.kind) or (what == "one width" and name == one_width)
        if len(shape) == 1:
            size = (
                rng.randint(max(submodule.kind == "embedding", smallest), shape[0])
                if chosen
                else shape[0]
            )
            kept[name] = tuple(sorted(rng.sample(range(shape[0]), size)))
            continue
        heads = rng.randint(smallest, shape[0]) if chosen or what == "heads" else shape[0]
        channels = rng.randint(1, shape[1]) if chosen or what == "channels" else shape[1]
        kept[name] = {
            head: tuple(sorted(rng.sample(range(shape[1]), channels)))
            for head in sorted(rng.sample(range(shape[0]), heads))
        }
    return SubnetSpec(kept)


def living_subnet(supernet: Supernet) -> SubnetSpec:
    """The units of the dense parent that are alive now."""
    return SubnetSpec({mask.name: mask.kept() for mask in supernet.bi_masks})


def sizes_of(subnet: SubnetSpec) -> dict[str, tuple[int, ...]]:
    """The sizes of a subnet in the form of `Architecture.sizes`."""
    return {
        name: size if isinstance(size, tuple) else (size,) for name, size in subnet.sizes.items()
    }


def attention_scales(model: nn.Module) -> list[float]:
    """The factors on the attention logits, block by block."""
    return [module.scaling for module in model.modules() if hasattr(module, "scaling")]


def search_loss(supernet: Supernet, images: Tensor) -> Tensor:
    """A loss that needs logits, picture, costs and one-hot terms."""
    output = supernet(images, bool_masked_pos=masked_patches(supernet, len(images)))
    loss = output.logits.square().sum() + output.reconstruction.square().mean()
    loss = loss + supernet.one_hot_loss() + supernet.importance_penalty()
    loss = loss + supernet.decisions.expected_cost(supernet.sizes("bi_mask")) / supernet.dense_cost
    return loss + supernet.decisions.expected_cost(supernet.sizes("sparsity")) / supernet.dense_cost


def gradients_of(supernet: Supernet, images: Tensor) -> dict[str, Tensor]:
    """Gradients of `search_loss` with the same random numbers every time."""
    supernet.zero_grad()
    torch.manual_seed(0)
    search_loss(supernet, images).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in supernet.named_parameters()
        if parameter.requires_grad
    }
