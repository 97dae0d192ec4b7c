"""Shrinking a supernet during the search: dead units and chosen tokens leave the network.

Optimizer, weight average and DDP follow in `OFBTrainer.shrink` (`search/trainer.py`).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..families.description import Slot, Submodule
from ..masks.bi_mask import BiMask
from ..pruning.surgery import Entries, resize_, slice_tensors_, unit_group_plan
from .supernet import Supernet

# Old parameter -> the one in its place, None where there is nothing left to train.
Replaced = dict[nn.Parameter, nn.Parameter | None]


@torch.no_grad()
def shrink_(supernet: Supernet) -> tuple[Replaced, dict[str, Entries]]:
    """Remove all units that are not alive from classifier, masks and decoder, in place.

    Attentions and MLPs without units lose their layers and their norm. Once widths are settled, the
    token schedule that was decided on begins to act.

    Returns:
        Old parameter -> new parameter, or None where nothing is left to train; and the plan
        {parameter name: ((axis, indices), ...)} for those that stay. The optimizer and an average
        of the weights follow with these. Both are empty if there was nothing to remove.
    """
    shrunk = [mask for mask in supernet.bi_masks if not mask.alive.all()]
    replaced: Replaced = {}
    if _tokens_are_due(supernet):
        replaced |= reduce_tokens_(supernet)
    if not shrunk:
        return replaced, {}

    # What stays, in the terms of the network as it still is.
    submodules = _submodules_with_decoder(supernet)
    sizes = dict(supernet.architecture.sizes)
    kept = {}
    for mask in shrunk:
        alive = mask.alive.flatten()  # (U,), or (H, D) -> (H * D,)
        kept[mask.name] = alive.nonzero()[:, 0]  # (U',)
        units = mask.alive_units()  # ((U',),), or ((H',), (H', D'))
        sizes[mask.name] = tuple(indices.shape[-1] for indices in units)

    # Attentions and MLPs without units go as a whole, with layers and norm.
    before = set(supernet.parameters())
    resize_(supernet.model, sizes)
    removed = before - set(supernet.parameters())
    replaced |= dict.fromkeys(removed)

    # Everything else is sliced.
    tensors = set(supernet.state_dict())
    plan = unit_group_plan(submodules, kept, tensors)
    plan |= _plan_of_masks(supernet, shrunk)
    sliced = slice_tensors_(supernet, plan)
    idle = _idle_parameters(shrunk)
    for old, new in sliced.items():
        replaced[old] = None if new in idle else new
    supernet.follow_shapes_()
    return replaced, plan


def _tokens_are_due(supernet: Supernet) -> bool:
    """Return whether a token schedule waits only for the widths, and these are settled."""
    decisions = supernet.decisions
    if decisions.token_schedule is None or not decisions.is_settled:
        return False
    return not supernet.tokens.acts


@torch.no_grad()
def reduce_tokens_(supernet: Supernet) -> dict[nn.Parameter, None]:
    """Let the model reduce its tokens; the decoder, which paints from all of them, is removed.

    Returns:
        The parameters that are removed.
    """
    before = set(supernet.parameters())
    config = supernet.config
    supernet.tokens.acts.fill_(True)
    config.token_schedule = config.stored_schedule(supernet.decisions.token_schedule)
    supernet.remove_decoder_()
    # Sizes stay as they are: this makes the layers follow the config.
    resize_(supernet.model, supernet.architecture.sizes)
    removed = before - set(supernet.parameters())
    return dict.fromkeys(removed)


def _submodules_with_decoder(supernet: Supernet) -> list[Submodule]:
    """Return the model's submodules, slots named as in the supernet and the decoder's included."""
    architecture = supernet.architecture
    decoder = Slot("pmim_decoder.projection.weight", 1)
    submodules = []
    for submodule in architecture.submodules:
        slots = [replace(slot, parameter=f"model.{slot.parameter}") for slot in submodule.slots]
        if submodule.name == architecture.last_width:
            slots.append(decoder)
        submodules.append(replace(submodule, slots=tuple(slots)))
    return submodules


def _plan_of_masks(supernet: Supernet, shrunk: list[BiMask]) -> dict[str, Entries]:
    """Return how the tensors of these bi-masks are sliced, by their names in the supernet."""
    plan: dict[str, Entries] = {}
    for index, mask in enumerate(supernet.bi_masks):
        if mask in shrunk:
            for name, entries in mask.shrink_plan().items():
                plan[f"bi_masks.{index}.{name}"] = entries
    return plan


def _idle_parameters(shrunk: list[BiMask]) -> set[nn.Parameter]:
    """Freeze and return the parameters of masks that have no units left.

    Nothing in the forward pass reads them any more, so DDP must not wait for their gradients.
    """
    idle: set[nn.Parameter] = set()
    for mask in shrunk:
        if mask.alive.numel():
            continue
        for parameter in mask.parameters():
            parameter.requires_grad_(False)
            idle.add(parameter)
    return idle


@torch.no_grad()
def shrink_to_(supernet: Supernet, state: dict[str, Tensor]) -> None:
    """Shrink to the shapes of a saved supernet, so that its state can be loaded.

    Args:
        supernet: in place; not smaller than the saved one.
        state: the saved supernet's state dict (`unit_ids` say which units it still has).

    Raises:
        ValueError: if it was saved from another search space.
    """
    for index, mask in enumerate(supernet.bi_masks):
        saved = f"bi_masks.{index}."
        ids = state.get(f"{saved}unit_ids")
        known = mask.unit_ids.cpu()
        if ids is None or not torch.isin(ids, known).all():
            raise ValueError(
                f"the checkpoint's units of {mask.name!r} are not among this supernet's units; "
                "resume with the model and the settings of the search that saved it."
            )
        alive = torch.isin(known, ids)
        mask.alive.copy_(alive)
        present = []  # per axis (K,), which candidates the saved mask has
        for axis, sizes in enumerate(mask.candidate_axes):
            saved_sizes = state[f"{saved}candidate_sizes_{axis}"]
            present.append(torch.isin(sizes.cpu(), saved_sizes))
        active = present[0]
        if mask.is_grid:
            active = active[:, None] & present[1]  # (K_heads, 1) & (K_dims,)
        mask.active_candidates.copy_(active)
    shrink_(supernet)
    if supernet.tokens is not None:
        supernet.tokens.schedule.copy_(state["tokens.schedule"])
        supernet.decisions.expect_costs_()
        if state["tokens.acts"]:
            reduce_tokens_(supernet)
    if state["folded"]:
        supernet.rest_()
