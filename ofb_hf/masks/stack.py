"""All bi-masks of a kind in one stack, so that a step computes them together and not one by one."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families.description import heads_of, presence_of
from .arithmetic import (
    bi_mask_values,
    expected_amounts,
    importance_scores,
    probabilities,
    staircase,
    unit_ranks,
)
from .bi_mask import BiMask
from .one_hot import one_hot_losses

# L1 on importance in the published code: 0.5 * 4e-4 per attention unit, 0.5 * 1e-4 per unit
# elsewhere.
IMPORTANCE_PENALTY = {"attention": 2e-4, "mlp": 5e-5, "embedding": 5e-5}


# The shape of a stack of grids: masks, rows (heads), columns (channels).
StackShape = tuple[int, int, int]


class MaskStack(nn.Module):
    """M bi-masks of one kind, filled up to a common shape with dead units and retired candidates.

    Units are (M, H, D) and candidates (M, K_heads, K_dims); a plain axis is a grid of one head. A
    stack has no parameters of its own and nothing to save. It fits the current shapes of its masks:
    after a shrink a new one has to be made.

    Args:
        masks: of one kind.
    """

    def __init__(self, masks: Sequence[BiMask]):
        super().__init__()
        # In a tuple: they are parts of the supernet, and must not be registered here as well.
        self.masks = tuple(masks)
        first = masks[0]
        self.kind = first.kind
        self.may_vanish = first.may_vanish
        self.normalize = first.normalize_importance
        self.floor = first.importance_floor
        self.counts = [mask.alive.numel() for mask in masks]

        unit_layout, self.unit_shape = _layout([mask.alive.shape for mask in masks])
        candidate_layout, self.candidate_shape = _layout([mask.alpha.shape for mask in masks])
        # Where the units of all masks, one after the other, stand in the flat grid: (units,). Cells
        # without a unit have the largest entry of the layout, so that they sort behind all others.
        positions = unit_layout.argsort()[: sum(self.counts)]
        _, num_heads, num_channels = self.candidate_shape
        buffers = {
            "unit_layout": unit_layout,  # (M * H * D,)
            "candidate_layout": candidate_layout,  # (M * K_heads * K_dims,)
            "positions": positions,
            "head_sizes": self._sizes(0, num_heads),  # (M, K_heads)
            "channel_sizes": self._sizes(1, num_channels),  # (M, K_dims)
        }
        # Buffers move with the model. Not persistent: they follow from the masks.
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def _sizes(
        self,
        axis: int,
        length: int,
    ) -> Tensor:
        """Return the candidate sizes along an axis, filled up with 0: (M, length)."""
        rows = []
        for mask in self.masks:
            sizes = mask.grid_axes[axis].cpu()
            missing = length - len(sizes)
            rows.append(F.pad(sizes, (0, missing)))
        return torch.stack(rows)

    @property
    def _grid_sizes(self) -> tuple[Tensor, Tensor]:
        return self.head_sizes, self.channel_sizes

    def _units(self) -> tuple[Tensor, Tensor]:
        """Return the importance logits of the masks and which units are alive: (M, H, D) each."""
        logits = [mask.importance_logits for mask in self.masks]
        alive = [mask.alive for mask in self.masks]
        return self.together(logits), self.together(alive)

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """Return the alphas of the masks and which are active: (M, K_heads, K_dims) each."""
        alpha = [mask.alpha for mask in self.masks]
        active = [mask.active_candidates for mask in self.masks]
        return (
            _arrange(alpha, self.candidate_layout, self.candidate_shape),
            _arrange(active, self.candidate_layout, self.candidate_shape),
        )

    def probabilities(self) -> Tensor:
        """Return what `BiMask.candidate_probs` returns for each mask: (M, K_heads, K_dims)."""
        alpha, active = self._candidates()
        return probabilities(alpha, active)

    def importance(self) -> Tensor:
        """Return what `BiMask.importance` returns for each mask: (M, H, D)."""
        logits, alive = self._units()
        return importance_scores(
            logits,
            alive,
            normalize=self.normalize,
            floor=self.floor,
        )

    def values(self, lam: Tensor) -> Tensor:
        """Return what `BiMask.prunability` returns for each mask: (M, H, D)."""
        logits, alive = self._units()
        importance = importance_scores(
            logits,
            alive,
            normalize=self.normalize,
            floor=self.floor,
        )
        sparsity = staircase(
            self.probabilities(),
            self._grid_sizes,
            unit_ranks(logits, alive),
        )
        return bi_mask_values(importance, sparsity, lam, alive)

    def apart(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split values of the stacked units (M, H, D) into those of each mask, (U,)."""
        return values.flatten().index_select(0, self.positions).split(self.counts)

    def together(self, values: list[Tensor]) -> Tensor:
        """Stack values of the units of each mask: (M, H, D), 0 where there is no unit."""
        return _arrange(values, self.unit_layout, self.unit_shape)

    def expected_amounts(self) -> list[Tensor]:
        """Return the expected units, heads and presence under `probabilities`, (M,) each."""
        return expected_amounts(self.probabilities(), self._grid_sizes)

    def amounts_of(self, values: Tensor) -> list[Tensor]:
        """Return units, heads and presence as sums of bi-mask values (M, H, D): (M,) each.

        A head is as present as its best channel, a submodule as its best unit.
        """
        units = values.sum((1, 2))
        heads = values.amax(2).sum(1)
        presence = values.amax((1, 2))
        return [units, heads, presence]

    def one_hot_losses(self) -> Tensor:
        """Return the adaptive one-hot loss of each mask: (M,)."""
        alpha, active = self._candidates()
        return one_hot_losses(alpha.flatten(1), active.flatten(1))


class MaskStacks(nn.Module):
    """What a step needs of all bi-masks of a supernet.

    Args:
        masks: in any order; they remain parts of the supernet.
        dense: every quantity that cost terms multiply, and its value in the dense network.
    """

    def __init__(
        self,
        masks: Iterable[BiMask],
        dense: dict[str, int],
    ):
        super().__init__()
        kinds: dict[tuple[str, bool], list[BiMask]] = {}
        for mask in masks:
            kind = (mask.kind, mask.may_vanish)
            kinds.setdefault(kind, []).append(mask)
        self.stacks = nn.ModuleList(map(MaskStack, kinds.values()))
        dense_values = torch.tensor(list(dense.values()))
        self.register_buffer("dense", dense_values, persistent=False)
        places = torch.tensor(self._places(list(dense)))
        self.register_buffer("places", places, persistent=False)

    def _places(self, quantities: list[str]) -> list[int]:
        """Return where `sizes` finds each quantity among the amounts that it lines up.

        These are the units, the heads and the presence of all masks of a stack, stack by stack, and
        behind them the dense values of all quantities, which serve what is not searched.
        """
        place_of: dict[str, int] = {}
        length = 0
        for stack in self.stacks:
            for quantity_of in (str, heads_of, presence_of):
                for mask in stack.masks:
                    place_of[quantity_of(mask.name)] = length
                    length += 1
        places = []
        for index, quantity in enumerate(quantities):
            dense_place = length + index
            places.append(place_of.get(quantity, dense_place))
        return places

    def gates(self, lam: Tensor) -> dict[str, Tensor]:
        """Return the bi-mask values of every submodule (U,) by name.

        A submodule that may vanish has a gate of its presence (1,) as well.
        """
        gates: dict[str, Tensor] = {}
        for stack in self.stacks:
            values = stack.values(lam)  # (M, H, D)
            names = [mask.name for mask in stack.masks]
            gates |= zip(names, stack.apart(values), strict=True)
            if stack.may_vanish:
                presence = values.amax((1, 2)).split(1)  # M times (1,)
                gates |= zip(map(presence_of, names), presence, strict=True)
        return gates

    def sizes(self, gates: dict[str, Tensor] | None = None) -> Tensor:
        """Return the differentiable amounts of all quantities, in the order of `dense`: (Q,).

        Args:
            gates: bi-mask values to sum up; by default, amounts are the expected ones under the
                probabilities of the candidates.
        """
        amounts = []
        for stack in self.stacks:
            if gates is None:
                amounts += stack.expected_amounts()
            else:
                of_masks = [gates[mask.name] for mask in stack.masks]
                values = stack.together(of_masks)  # (M, H, D)
                amounts += stack.amounts_of(values)
        amounts.append(self.dense)
        # As `_places` expects them: all (M,), and last (Q,).
        lined_up = torch.cat([amount.float() for amount in amounts])
        return lined_up.index_select(0, self.places)

    def one_hot_loss(self) -> Tensor:
        """Return the sum of the adaptive one-hot losses of all submodules."""
        return torch.cat([stack.one_hot_losses() for stack in self.stacks]).sum()

    def importance_penalty(self) -> Tensor:
        """Return the published L1 penalty on importance scores (arXiv:2403.15835, its code)."""
        penalties = []
        for stack in self.stacks:
            weight = IMPORTANCE_PENALTY[stack.kind]
            penalties.append(weight * stack.importance().sum())
        return torch.stack(penalties).sum()


def _layout(shapes: list[torch.Size]) -> tuple[Tensor, StackShape]:
    """Return where the entries of some grids stand in one stack of a common shape.

    Args:
        shapes: (D,) or (H, D) of each grid.

    Returns:
        For each cell of the stack, flattened, the index of its entry if the entries of all grids
        are lined up one after the other; the number of entries for cells without one. And the shape
        of the stack, (M, H, D), of at least one cell per grid.
    """
    grids = [shape if len(shape) == 2 else (1, *shape) for shape in shapes]
    height = max(1, *(rows for rows, _ in grids))
    width = max(1, *(columns for _, columns in grids))
    counts = [rows * columns for rows, columns in grids]
    shape = (len(grids), height, width)
    layout = torch.full(shape, sum(counts))
    begin = 0
    for cells, (rows, columns), count in zip(layout, grids, counts, strict=True):
        indices = torch.arange(begin, begin + count)
        cells[:rows, :columns] = indices.view(rows, columns)
        begin += count
    return layout.flatten(), shape


def _arrange(
    tensors: list[Tensor],
    layout: Tensor,
    shape: StackShape,
) -> Tensor:
    """Return a stack of grids as `_layout` describes it; 0 or False in cells without an entry."""
    lined_up = torch.cat([tensor.flatten() for tensor in tensors])
    padded = F.pad(lined_up, (0, 1))  # the entry of all cells without one
    return padded.index_select(0, layout).view(shape)
