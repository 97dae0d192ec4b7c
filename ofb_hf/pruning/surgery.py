"""Remove units physically: the same plan applied to a model, its average and its optimizer.

A plan says which entries of each tensor stay: {tensor name: ((axis, indices), ...)}. Parameters are
replaced by new ones (autograd remembers the old shape), modules never are, so that hooks and
references stay valid. The layers of an attention or MLP without units are taken out.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..families.description import Architecture, Submodule
from ..families.loading import rebuild_classifier
from ..families.registry import describe, family_of
from ..families.subnet import Kept, SubnetSpec
from ..families.token_reduction import followed_schedule

Entries = tuple[tuple[int, Tensor], ...]
Plan = dict[str, Entries]


# ------------------------------------------------------------------------------------------- plans


def slice_tensor(tensor: Tensor, entries: Entries) -> Tensor:
    """Return the part of a tensor that stays.

    Args:
        tensor: any tensor.
        entries: (axis, indices), applied in order; 1-D indices select along the axis, 2-D indices
            select within every row.
    """
    for axis, indices in entries:
        indices = indices.to(tensor.device)
        if indices.ndim == 1:
            tensor = tensor.index_select(axis, indices)
        else:
            tensor = tensor.take_along_dim(indices, dim=axis)
    return tensor.contiguous()


def unit_group_plan(
    submodules: Iterable[Submodule],
    kept: dict[str, Tensor],
    names: set[str],
) -> Plan:
    """Return the plan that keeps some units of each submodule.

    Args:
        submodules: with their slots and present shapes.
        kept: submodule name -> (K,) flat indices of the units to keep; submodules that are not
            named keep all.
        names: tensors that exist (a slot of an absent tensor, such as a bias, is skipped).
    """
    plan: dict[str, Entries] = {}
    for submodule in submodules:
        if submodule.name not in kept:
            continue
        for slot in submodule.slots:
            if slot.parameter in names:
                indices = slot.indices(kept[submodule.name], submodule.shape)
                entries = plan.get(slot.parameter, ())
                plan[slot.parameter] = (*entries, (slot.axis, indices))
    return plan


def flat_indices(
    subnet: SubnetSpec,
    name: str,
    shape: tuple[int, ...],
) -> Tensor:
    """Return the kept units of one submodule as ascending flat indices (K,) into its units.

    Args:
        subnet: which units are kept.
        name: of the submodule.
        shape: its units, (U,) or (heads, channels per head).
    """
    kept = subnet.kept[name]
    if not isinstance(kept, dict):
        return torch.tensor(kept, dtype=torch.long)
    _, channels_per_head = shape
    indices: list[int] = []
    for head in sorted(kept):
        first = head * channels_per_head
        indices += [first + channel for channel in kept[head]]
    return torch.tensor(indices, dtype=torch.long)


# ---------------------------------------------------------------------------------- new classifiers


def slice_model(model: nn.Module, subnet: SubnetSpec) -> nn.Module:
    """Return a new, smaller classifier that holds only the units of `subnet`.

    Args:
        model: a classifier, stock or ours; the indices of `subnet` count its units. It is left as
            it is.
        subnet: which units to keep.

    Raises:
        ValueError: for submodules or indices that `model` does not have, for a token schedule that
            it cannot follow, and for a subnet that counts in a basis that it is not in.
    """
    _require_basis(model, subnet)
    family = family_of(model.config)
    if not isinstance(model, family.model_class):
        model = family.from_dense(model)
    # The smaller model keeps this config and changes it.
    config = copy.deepcopy(model.config)
    architecture = describe(config)
    check_subnet(subnet, architecture)
    kept: dict[str, Tensor] = {}
    for name, shape in architecture.sizes.items():
        if name in subnet.kept:
            kept[name] = flat_indices(subnet, name, shape)
    state = model.state_dict()
    plan = unit_group_plan(architecture.submodules, kept, set(state))
    # First what the dense widths imply (the factor on attention logits), then the new widths.
    family.pin(config)
    family.resize(config, architecture.sizes | subnet.shapes)
    if subnet.token_schedule is not None:
        schedule = followed_schedule(config, subnet.token_schedule)
        config.token_schedule = config.stored_schedule(schedule)
    # A half without units has no layers in the smaller model: its tensors are sliced for nothing,
    # and not loaded.
    sliced: dict[str, Tensor] = {}
    for name, tensor in state.items():
        sliced[name] = slice_tensor(tensor, plan.get(name, ()))
    return rebuild_classifier(model, config, sliced)


def _require_basis(model: nn.Module, subnet: SubnetSpec) -> None:
    """Raise ValueError if a subnet counts units of a network in another basis than this one's."""
    basis = getattr(model.config, "basis", None)
    if subnet.basis not in ("given", basis):
        raise ValueError(
            f"the subnet counts units of a network in basis {subnet.basis!r}, but the config of "
            f"this model has basis {basis!r}; cut the rewritten network (the one that --keep_dense "
            "keeps, or the result of equivalent_basis)."
        )


def check_subnet(subnet: SubnetSpec, architecture: Architecture) -> None:
    """Raise ValueError, naming submodule and value, unless `subnet` fits a network.

    Args:
        subnet: which units to keep.
        architecture: of the network.
    """
    submodules = {submodule.name: submodule for submodule in architecture.submodules}
    for name, kept in subnet.kept.items():
        if name not in submodules:
            raise ValueError(
                f"the subnet has a submodule {name!r}, but the model has {sorted(submodules)}."
            )
        _check_kept(submodules[name], kept)


def _check_kept(submodule: Submodule, kept: Kept) -> None:
    """Raise ValueError unless a submodule has these units and may be left with them."""
    name, shape = submodule.name, submodule.shape
    is_grid = len(shape) == 2
    if isinstance(kept, dict) != is_grid:
        expected = "{head: channels}" if is_grid else "a list of units"
        raise ValueError(f"kept[{name!r}] must be {expected}.")
    if not kept and submodule.kind == "embedding":
        raise ValueError(
            f"kept[{name!r}] is empty; the residual stream needs a channel, keep at least one."
        )
    if not kept:
        return
    largest = [max(kept)]
    if isinstance(kept, dict):
        channels = max(max(row) for row in kept.values())
        largest.append(channels)
    axes = zip(largest, shape, strict=True)
    if any(index >= size for index, size in axes):
        raise ValueError(
            f"kept[{name!r}] reaches index {largest}, but the model's sizes there are "
            f"{list(shape)}."
        )


# ----------------------------------------------------------------------------------------- in place


def resize_(model: PreTrainedModel, sizes: dict[str, tuple[int, ...]]) -> None:
    """Bring config and modules of a classifier to some sizes, but not its tensors.

    Attentions and MLPs of size 0 lose their layers and their norm. Hooks on the remaining modules
    stay.

    Args:
        model: a classifier of this package.
        sizes: submodule name -> (U,) or (heads, channels per head), of all submodules.
    """
    family = family_of(model.config)
    family.resize(model.config, sizes)
    for path, values in family.attributes(model.config).items():
        for attribute, value in values.items():
            setattr(model.get_submodule(path), attribute, value)


def slice_tensors_(module: nn.Module, plan: Plan) -> dict[nn.Parameter, nn.Parameter]:
    """Replace the parameters and buffers of a module that a plan names by their slices.

    Returns:
        Old parameter -> new one, for `slice_optimizer_`.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, entries in plan.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = slice_tensor(owner._buffers[leaf], entries)
            continue
        old = owner._parameters[leaf]
        sliced = slice_tensor(old.detach(), entries)
        new = nn.Parameter(sliced, requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
        replaced[old] = new
        _refresh_sizes(owner)
    return replaced


def _refresh_sizes(layer: nn.Module) -> None:
    """Update the size attributes that torch layers store next to their weight."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels = weight.shape[0]
        layer.in_channels = weight.shape[1] * layer.groups
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)


def slice_optimizer_(
    optimizer: torch.optim.Optimizer,
    replaced: dict[nn.Parameter, nn.Parameter | None],
    entries: dict[nn.Parameter, Entries],
) -> None:
    """Hand an optimizer the new parameters, and slice its state as they were sliced.

    Args:
        optimizer: it holds the old parameters.
        replaced: old parameter -> new one, None if it was removed.
        entries: old parameter -> how it was sliced; a parameter without entries starts with fresh
            state.
    """
    for group in optimizer.param_groups:
        present = [replaced.get(parameter, parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in present if parameter is not None]
    for old, new in replaced.items():
        state = optimizer.state.pop(old, None)
        if not state or new is None or old not in entries:
            continue
        sliced = {}
        for key, value in state.items():
            # Moments have the shape of the parameter, step counts do not.
            if isinstance(value, Tensor) and value.shape == old.shape:
                value = slice_tensor(value, entries[old])
            sliced[key] = value
        optimizer.state[new] = sliced


# What DDP is made with and keeps under the same name.
DDP_ARGUMENTS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)


def rebuild_ddp_(wrapped: DistributedDataParallel) -> None:
    """Make DDP average the parameters that its module has now.

    Without this, replaced parameters silently stop being averaged. DDP is rebuilt in place, so that
    every reference to the wrapper stays valid; it checks shapes across ranks and broadcasts the
    values of rank 0.
    """
    arguments = {name: getattr(wrapped, name) for name in DDP_ARGUMENTS}
    if not wrapped.bucket_bytes_cap_default:
        arguments["bucket_cap_mb"] = wrapped.bucket_bytes_cap / 2**20
    # The default, True, is not passed: newer torch warns about the name.
    if not wrapped.broadcast_buffers:
        arguments["broadcast_buffers"] = False
    wrapped.__init__(wrapped.module, **arguments)
