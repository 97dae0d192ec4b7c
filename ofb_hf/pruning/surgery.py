"""Physical removal of units: the same plan applied to a model, its average and its optimizer.

A plan says which entries of each tensor stay: {tensor name: ((axis, indices), ...)}. Parameters are
replaced by new ones (the gradient machinery remembers the old shape), modules never are (hooks and
references stay valid); those of an attention or MLP of which nothing is left are taken out.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..cost.counting import meant_schedule
from ..families.description import Architecture, Submodule
from ..families.registry import describe, family_of
from ..families.subnet import SubnetSpec

Entries = tuple[tuple[int, Tensor], ...]
Plan = dict[str, Entries]


def slice_tensor(tensor: Tensor, entries: Entries) -> Tensor:
    """The part of a tensor that stays.

    Args:
        entries: (axis, indices) in order; 1-D indices select along the axis, 2-D ones select within
            every row.
    """
    for axis, indices in entries:
        indices = indices.to(tensor.device)
        tensor = (
            tensor.index_select(axis, indices)
            if indices.ndim == 1
            else tensor.take_along_dim(indices, dim=axis)
        )
    return tensor.contiguous()


def unit_group_plan(
    submodules: Iterable[Submodule], kept: dict[str, Tensor], names: set[str]
) -> Plan:
    """The plan that keeps some units of each submodule.

    Args:
        submodules: with their slots and present shapes.
        kept: submodule name -> flat indices of the units that stay; submodules not named keep all.
        names: tensors that exist (a slot of an absent tensor, such as a bias, is skipped).
    """
    plan: dict[str, list[tuple[int, Tensor]]] = {}
    for submodule in submodules:
        if submodule.name in kept:
            for slot in submodule.slots:
                if slot.parameter in names:
                    indices = slot.indices(kept[submodule.name], submodule.shape)
                    plan.setdefault(slot.parameter, []).append((slot.axis, indices))
    return {name: tuple(entries) for name, entries in plan.items()}


def slice_model(model: nn.Module, subnet: SubnetSpec) -> nn.Module:
    """A new, smaller classifier that holds only the units of `subnet`. `model` is left as it is.

    Args:
        model: a classifier, stock or ours; its units are what the indices of `subnet` count.

    Raises:
        ValueError: for submodules or indices that `model` does not have, and for a token schedule
            that it cannot have.
    """
    family = family_of(model.config)
    if not isinstance(model, family.model_class):
        model = family.from_dense(model)
    config = copy.deepcopy(model.config)
    architecture = describe(config)
    check_subnet(subnet, architecture)
    kept = {
        name: flat_indices(subnet, name, shape)
        for name, shape in architecture.sizes.items()
        if name in subnet.kept
    }
    state = model.state_dict()
    plan = unit_group_plan(architecture.submodules, kept, set(state))
    sizes = {
        name: size if isinstance(size, tuple) else (size,) for name, size in subnet.sizes.items()
    }
    family.pin(config)
    family.resize(config, architecture.sizes | sizes)
    if subnet.token_schedule is not None:
        schedule = meant_schedule(config, subnet.token_schedule)
        config.token_schedule = config.meant_schedule(schedule)
    smaller = family.model_class(config).to(device=model.device, dtype=model.dtype)
    smaller.load_state_dict(
        {name: slice_tensor(state[name], plan.get(name, ())) for name in smaller.state_dict()}
    )
    return smaller.train(model.training)


def check_subnet(subnet: SubnetSpec, architecture: Architecture) -> None:
    """Raises ValueError, naming submodule and value, unless `subnet` fits a network of this
    architecture."""
    sizes, kinds = (
        architecture.sizes,
        {submodule.name: submodule.kind for submodule in architecture.submodules},
    )
    for name, kept in subnet.kept.items():
        if name not in sizes:
            raise ValueError(
                f"the subnet has a submodule {name!r}, but the model has {sorted(sizes)}."
            )
        shape = sizes[name]
        if isinstance(kept, dict) != (len(shape) == 2):
            raise ValueError(
                f"kept[{name!r}] must be "
                f"{'{head: channels}' if len(shape) == 2 else 'a list of units'}."
            )
        if not kept and kinds[name] == "embedding":
            raise ValueError(
                f"kept[{name!r}] is empty; the residual stream needs a channel, keep at least one."
            )
        if not kept:
            continue
        largest = (
            [max(kept), max(max(c) for c in kept.values())]
            if isinstance(kept, dict)
            else [max(kept)]
        )
        if any(index >= size for index, size in zip(largest, shape, strict=True)):
            raise ValueError(
                f"kept[{name!r}] reaches index {largest}, but the model's sizes there are "
                f"{list(shape)}."
            )


def flat_indices(subnet: SubnetSpec, name: str, shape: tuple[int, ...]) -> Tensor:
    """Kept units of one submodule as ascending flat indices into its units."""
    kept = subnet.kept[name]
    if isinstance(kept, dict):
        kept = [head * shape[1] + channel for head in sorted(kept) for channel in kept[head]]
    return torch.tensor(kept, dtype=torch.long)


def resize_(model: PreTrainedModel, sizes: dict[str, tuple[int, ...]]) -> None:
    """Brings config and modules of a classifier to these sizes, but not their tensors.

    Attentions and MLPs of size 0 lose their layers and their norm. Hooks on the modules that remain
    stay.
    """
    family = family_of(model.config)
    family.resize(model.config, sizes)
    for path, values in family.attributes(model.config).items():
        for attribute, value in values.items():
            setattr(model.get_submodule(path), attribute, value)


def slice_tensors_(module: nn.Module, plan: Plan) -> dict[nn.Parameter, nn.Parameter]:
    """Replaces the named parameters and buffers of a module by their slices.

    Returns:
        Old parameter -> new one, for `slice_optimizer_`.
    """
    replaced = {}
    for name, entries in plan.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = slice_tensor(owner._buffers[leaf], entries)
            continue
        old = owner._parameters[leaf]
        new = nn.Parameter(slice_tensor(old.detach(), entries), requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
        replaced[old] = new
        _refresh_sizes(owner)
    return replaced


def _refresh_sizes(layer: nn.Module) -> None:
    """Brings the size attributes that torch layers keep beside their weight up to date."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)


def slice_optimizer_(
    optimizer: torch.optim.Optimizer,
    replaced: dict[nn.Parameter, nn.Parameter | None],
    entries: dict[nn.Parameter, Entries],
) -> None:
    """Hands an optimizer the new parameters and slices every state tensor that had the old
    parameter's shape.

    Args:
        replaced: old parameter -> new one, None if it is gone.
        entries: old parameter -> how it was sliced; one that is absent starts with fresh state.
    """
    for group in optimizer.param_groups:
        present = (replaced.get(parameter, parameter) for parameter in group["params"])
        group["params"] = [parameter for parameter in present if parameter is not None]
    for old, new in replaced.items():
        state = optimizer.state.pop(old, None)
        if state and new is not None and old in entries:
            optimizer.state[new] = {
                key: slice_tensor(value, entries[old])
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for key, value in state.items()
            }


def rebuild_ddp_(wrapped: DistributedDataParallel) -> None:
    """Makes DDP watch the parameters its module has now; without this, replaced ones silently stop
    being averaged.

    Rebuilt in place, so that every reference to the wrapper stays valid; shapes are checked across
    ranks and rank 0's values are broadcast.
    """
    keys = "device_ids output_device dim process_group find_unused_parameters gradient_as_bucket_view static_graph"
    kwargs = {key: getattr(wrapped, key) for key in keys.split()}
    if not wrapped.bucket_bytes_cap_default:
        kwargs["bucket_cap_mb"] = wrapped.bucket_bytes_cap / 2**20
    # the default, True, is not passed: newer torch warns about the name
    if not wrapped.broadcast_buffers:
        kwargs["broadcast_buffers"] = False
    wrapped.__init__(wrapped.module, **kwargs)
