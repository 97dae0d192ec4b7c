"""All bi-masks of a kind side by side: what a step needs of them is one computation, not one for
each."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families.description import heads_of, presence_of
from .bi_mask import BiMask, bi_mask_values, importance_scores, probabilities, staircase, unit_ranks
from .one_hot import one_hot_losses

# L1 on importance in the published code: 0.5 * 4e-4 per attention unit, 0.5 * 1e-4 per unit
# elsewhere.
IMPORTANCE_PENALTY = {"attention": 2e-4, "mlp": 5e-5, "embedding": 5e-5}


class MaskStack(nn.Module):
    """M bi-masks of one kind, filled up to a common shape with units that are dead and candidates
    that are retired.

    Units are (M, H, D) and candidates (M, K_heads, K_dims); a plain axis is a grid of one head. A
    stack has no parameters of its own, nothing to save, and fits the shapes of the moment: after a
    shrink there has to be another.

    Args:
        masks: of one kind.
    """

    def __init__(self, masks: Sequence[BiMask]):
        super().__init__()
        self.masks = tuple(masks)  # in a tuple: they are no part of this module
        self.kind, self.may_vanish = masks[0].kind, masks[0].may_vanish
        self.normalize, self.floor = masks[0].normalize_importance, masks[0].importance_floor
        self.counts = [mask.alive.numel() for mask in masks]
        units, self.unit_shape = _slots([mask.alive.shape for mask in masks])
        candidates, self.candidate_shape = _slots([mask.alpha.shape for mask in masks])
        indices = {
            "units": units,
            "candidates": candidates,
            "positions": units.argsort()[: sum(self.counts)],
        }
        for axis, length in enumerate(self.candidate_shape[1:]):
            sizes = [mask.grid_axes[axis].cpu() for mask in masks]
            indices[f"sizes_{axis}"] = torch.stack(
                [F.pad(own, (0, length - len(own))) for own in sizes]
            )
        for name, values in indices.items():
            self.register_buffer(name, values, persistent=False)

    def _stacked_units(self, name: str) -> Tensor:
        return _side_by_side(
            [getattr(mask, name) for mask in self.masks], self.units, self.unit_shape
        )

    def _stacked_candidates(self, name: str) -> Tensor:
        return _side_by_side(
            [getattr(mask, name) for mask in self.masks], self.candidates, self.candidate_shape
        )

    def probabilities(self) -> Tensor:
        """As `BiMask.candidate_probs`: (M, K_heads, K_dims)."""
        return probabilities(
            self._stacked_candidates("alpha"), self._stacked_candidates("active_candidates")
        )

    def importance(self) -> Tensor:
        """As `BiMask.importance`: (M, H, D)."""
        logits, alive = self._stacked_units("importance_logits"), self._stacked_units("alive")
        return importance_scores(logits, alive, self.normalize, self.floor)

    def values(self, lam: Tensor) -> Tensor:
        """As `BiMask.prunability`: (M, H, D)."""
        logits, alive = self._stacked_units("importance_logits"), self._stacked_units("alive")
        importance = importance_scores(logits, alive, self.normalize, self.floor)
        sparsity = staircase(
            self.probabilities(), (self.sizes_0, self.sizes_1), unit_ranks(logits, alive)
        )
        return bi_mask_values(importance, sparsity, lam, alive)

    def apart(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values of the stacked units (M, H, D) -> (U,) for each mask."""
        return values.flatten().index_select(0, self.positions).split(self.counts)

    def together(self, values: list[Tensor]) -> Tensor:
        """The way back from `apart`; 0 where there is no unit."""
        return _side_by_side(values, self.units, self.unit_shape)

    def expected_amounts(self) -> list[Tensor]:
        """Units, heads and presence under `probabilities`, (M,) each."""
        p, sizes = self.probabilities(), self.sizes_0[:, :, None] * self.sizes_1[:, None]
        return [
            (p * sizes).sum((1, 2)),
            (p.sum(2) * self.sizes_0).sum(1),
            (p * (sizes > 0)).sum((1, 2)),
        ]

    def amounts_of(self, values: Tensor) -> list[Tensor]:
        """The same as sums of bi-mask values (M, H, D); a head is there as long as its best
        channel."""
        return [values.sum((1, 2)), values.amax(2).sum(1), values.amax((1, 2))]

    def one_hot_losses(self) -> Tensor:
        """(M,)"""
        alpha, active = (
            self._stacked_candidates("alpha"),
            self._stacked_candidates("active_candidates"),
        )
        return one_hot_losses(alpha.flatten(1), active.flatten(1))


class MaskStacks(nn.Module):
    """What a step needs of all bi-masks of a supernet.

    Args:
        masks: in any order; they stay where they are.
        dense: every quantity that cost terms multiply, and what it is in the dense network.
    """

    def __init__(self, masks: Iterable[BiMask], dense: dict[str, int]):
        super().__init__()
        kinds: dict[tuple[str, bool], list[BiMask]] = {}
        for mask in masks:
            kinds.setdefault((mask.kind, mask.may_vanish), []).append(mask)
        self.stacks = nn.ModuleList(MaskStack(of_kind) for of_kind in kinds.values())
        self.register_buffer("dense", torch.tensor(list(dense.values())), persistent=False)
        # Amounts of each stack come as units, heads and presence, one after the other, and after
        # them the dense ones.
        names = [
            name(mask.name)
            for stack in self.stacks
            for name in (str, heads_of, presence_of)
            for mask in stack.masks
        ]
        searched = {name: place for place, name in enumerate(names) if name in dense}
        places = [searched.get(name, len(names) + place) for place, name in enumerate(dense)]
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def gates(self, lam: Tensor) -> dict[str, Tensor]:
        """The bi-mask values of every submodule (U,) by name, and where it may vanish those of its
        presence (1,)."""
        gates: dict[str, Tensor] = {}
        for stack in self.stacks:
            values, names = stack.values(lam), [mask.name for mask in stack.masks]
            gates |= zip(names, stack.apart(values), strict=True)
            if stack.may_vanish:
                gates |= zip(map(presence_of, names), values.amax((1, 2)).split(1), strict=True)
        return gates

    def sizes(self, gates: dict[str, Tensor] | None = None) -> Tensor:
        """Differentiable amounts of all quantities, in the order of `dense`: (Q,).

        Args:
            gates: sums of these; otherwise expected ones under the candidates' probabilities.
        """
        amounts = []
        for stack in self.stacks:
            if gates is None:
                amounts += stack.expected_amounts()
            else:
                amounts += stack.amounts_of(
                    stack.together([gates[mask.name] for mask in stack.masks])
                )
        amounts.append(self.dense)
        return torch.cat([amount.float() for amount in amounts]).index_select(0, self.places)

    def one_hot_loss(self) -> Tensor:
        """Sum of the adaptive one-hot losses of all submodules."""
        return torch.cat([stack.one_hot_losses() for stack in self.stacks]).sum()

    def importance_penalty(self) -> Tensor:
        """The published L1 penalty on importance scores (arXiv:2403.15835, its code)."""
        return torch.stack(
            [IMPORTANCE_PENALTY[stack.kind] * stack.importance().sum() for stack in self.stacks]
        ).sum()


def _slots(shapes: list[tuple[int, ...]]) -> tuple[Tensor, tuple[int, int, int]]:
    """The common shape of some grids, and for each of its places the entry that stands there if all
    entries are lined up; the one behind them where there is none."""
    grids = [(1, *shape)[-2:] for shape in shapes]
    height, width = (max(1, *sides) for sides in zip(*grids, strict=True))
    total = sum(map(math.prod, grids))
    slots, begin = torch.full((len(grids), height, width), total), 0
    for slot, (rows, columns) in zip(slots, grids, strict=True):
        slot[:rows, :columns] = torch.arange(begin, begin + rows * columns).view(rows, columns)
        begin += rows * columns
    return slots.flatten(), (len(grids), height, width)


def _side_by_side(tensors: list[Tensor], slots: Tensor, shape: tuple[int, int, int]) -> Tensor:
    lined_up = torch.cat([tensor.flatten() for tensor in tensors])
    return F.pad(lined_up, (0, 1)).index_select(0, slots).view(shape)
