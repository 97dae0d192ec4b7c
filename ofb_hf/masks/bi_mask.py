"""Bi-mask of one submodule: its scores, its candidate sizes, and the units that are alive.

`masks/arithmetic.py` has the formulas, which `masks/stack.py` applies to all bi-masks at once in
every step. The methods here that return scores apply the same functions to a single mask.
"""

import torch
from torch import Tensor, nn

from ..families.subnet import Kept
from ..space.search_space import SubmoduleSpace
from .arithmetic import (
    bi_mask_values,
    expected_amounts,
    importance_scores,
    probabilities,
    sort_by_rank,
    staircase,
    sums_of_first,
    unit_ranks,
)

# How tensors are sliced: {name: ((axis, indices), ...)}.
Slices = dict[str, tuple[tuple[int, Tensor], ...]]

# Importance above which a unit is worth its place (`BiMask.estimate_importance_`).
EVEN_IMPORTANCE = 0.5
# Importance is estimated between sigmoid(-4) = 0.02 and sigmoid(4) = 0.98, so that training can
# still bring every unit back or send it away.
IMPORTANCE_LIMIT = 4.0
# How steeply importance rises around the last unit that is kept, in logits per unit of
# log(first-order score); found by experiment (docs/LOG.md).
SHARPNESS = 4.0
# Scores below this fraction of the largest one count as this fraction: the logarithm of 0 is not
# finite.
SMALLEST_SCORE = 1e-12


class BiMask(nn.Module):
    """Importance and sparsity scores of one submodule.

    Where 0 is among the candidate sizes, the sparsity may be below 1 for every unit: then the
    submodule as a whole is about to be left out.

    Args:
        space: the units and their candidate sizes.
        normalize_importance: divide the importance by its maximum. A LayerNorm does not see a
            factor common to all residual channels, so without this a budget could push all of them
            down together and remove none. Where removing all is a candidate, they may sink together
            once the best is not worth its place.

    Attributes:
        importance_logits: parameter (U,), or (H, D) for a grid.
        alpha: parameter (K,), or (K_heads, K_dims): one logit per candidate.
        active_candidates: bool buffer shaped like alpha; False = retired, for good.
        alive: bool buffer shaped like the units; False = beyond the largest active size along an
            axis, for good.
        unit_ids: int buffer shaped like the units: flat index of each unit in the dense parent.
        first_order: float buffer shaped like the units: by how much closing their gates would
            change the loss, squared and summed over the observed images (`Observation`).
    """

    def __init__(
        self,
        space: SubmoduleSpace,
        normalize_importance: bool = False,
    ):
        super().__init__()
        self.name = space.name
        self.kind = space.kind
        self.is_grid = space.is_grid
        self.may_vanish = space.may_vanish
        self.normalize_importance = normalize_importance
        self.dense_head_dim = space.head_dim
        self.importance_logits = nn.Parameter(torch.zeros(space.unit_shape))
        self._add_choice(space)
        self.register_buffer("alive", torch.ones(space.unit_shape, dtype=torch.bool))
        self.register_buffer("first_order", torch.zeros(space.unit_shape))
        unit_ids = torch.arange(space.num_units)
        self.register_buffer("unit_ids", unit_ids.reshape(space.unit_shape))
        axes = [space.candidate_sizes]
        if self.is_grid:
            axes = [space.head_candidates, space.dim_candidates]
        self._candidate_axes = len(axes)
        for axis, sizes in enumerate(axes):
            self.register_buffer(f"candidate_sizes_{axis}", torch.tensor(sizes))

    def _add_choice(self, space: SubmoduleSpace) -> None:
        """Register alpha and which of its candidates are active."""
        self.alpha = nn.Parameter(torch.zeros(space.candidate_shape))
        active = torch.ones(space.candidate_shape, dtype=torch.bool)
        if space.is_grid and space.may_vanish:
            # No heads of some width and heads of no width are the same as (0, 0), which stands for
            # all of them.
            active[0, 1:] = False
            active[1:, 0] = False
        self.register_buffer("active_candidates", active)

    def extra_repr(self) -> str:
        return f"{self.name}, units={tuple(self.alive.shape)}, candidates={tuple(self.alpha.shape)}"

    @torch.no_grad()
    def initialize_(
        self,
        mean: float,
        std: float,
        alpha: str,
    ) -> None:
        """Draw the importance logits, and alpha if it is to be "uniform" instead of zeros."""
        # Noise breaks the ties between units; with std 0 the order of the channels would decide.
        nn.init.trunc_normal_(
            self.importance_logits,
            mean=mean,
            std=max(std, 1e-8),
            a=mean - 2 * std,
            b=mean + 2 * std,
        )
        if alpha == "uniform":
            nn.init.uniform_(self.alpha)

    # -------------------------------------------------------------------------------------- shapes

    @property
    def candidate_axes(self) -> tuple[Tensor, ...]:
        """The candidate sizes along each axis, ascending: ((K,),) or ((K_heads,), (K_dims,))."""
        axes = range(self._candidate_axes)
        return tuple(getattr(self, f"candidate_sizes_{axis}") for axis in axes)

    @property
    def candidate_sizes(self) -> Tensor:
        """Units kept by each candidate, shaped like alpha."""
        if not self.is_grid:
            return self.candidate_axes[0]
        heads, channels = self.candidate_axes
        return heads[:, None] * channels  # (K_heads, K_dims)

    @property
    def grid_axes(self) -> tuple[Tensor, Tensor]:
        """The candidate sizes of heads and channels, (K_heads,) and (K_dims,); (1,) and (K,) for a
        plain axis."""
        if self.is_grid:
            return self.candidate_axes
        return self.unit_ids.new_ones(1), self.candidate_axes[0]

    def _as_grid(self, tensor: Tensor) -> Tensor:
        """Return units or candidates in the shape that `arithmetic` takes: a stack of one grid."""
        return tensor[None] if self.is_grid else tensor[None, None]

    def _units(self) -> tuple[Tensor, Tensor]:
        """Return the importance logits and which units are alive, (1, H, D) each."""
        return self._as_grid(self.importance_logits), self._as_grid(self.alive)

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """Return alpha and which candidates are active, (1, K_heads, K_dims) each."""
        return self._as_grid(self.alpha), self._as_grid(self.active_candidates)

    def _grid_sizes(self) -> tuple[Tensor, Tensor]:
        """Return `grid_axes` in the shape that `arithmetic` takes, (1, K_heads) and (1, K_dims)."""
        heads, channels = self.grid_axes
        return heads[None], channels[None]

    def _grid_ranks(self) -> tuple[Tensor, Tensor]:
        """Return the ranks of heads (1, H) and of channels (1, H, D)."""
        logits, alive = self._units()
        return unit_ranks(logits, alive)

    # -------------------------------------------------------------------------------------- scores

    def candidate_probs(self) -> Tensor:
        """Return the softmax over all active candidates, 0 for retired ones; shaped like alpha."""
        alpha, active = self._candidates()
        return probabilities(alpha, active).view_as(self.alpha)

    def expected_size(self) -> Tensor:
        """Return the expected number of kept units under `candidate_probs`: scalar."""
        p = self._as_grid(self.candidate_probs())
        units, _, _ = expected_amounts(p, self._grid_sizes())
        return units[0]

    @property
    def importance_floor(self) -> float:
        """The smallest number that importance is divided by, if it is normalised."""
        return EVEN_IMPORTANCE if self.may_vanish else 0.0

    def importance(self) -> Tensor:
        """Return how much each unit matters, in (0, 1], 0 for dead units; shaped like the units."""
        logits, alive = self._units()
        normalize = self.normalize_importance and alive.numel() > 0  # no units have no maximum
        importance = importance_scores(
            logits,
            alive,
            normalize=normalize,
            floor=self.importance_floor,
        )
        return importance.view_as(self.alive)

    def unit_rank(self) -> tuple[Tensor, ...]:
        """Return the importance rank of every unit, 0 = most important; dead units come last.

        Returns:
            Plain axis: ((U,),). Grid: heads by the sum of their importance (H,), and channels
            within each head (H, D).
        """
        heads, channels = self._grid_ranks()
        if self.is_grid:
            return heads[0], channels[0]
        return (channels[0, 0],)

    def sparsity(self) -> Tensor:
        """Return how many units there is room for, as a value for each unit by its importance rank.

        The unit of rank r gets the probability that the chosen size exceeds r, so values fall with
        the rank, start at the probability of keeping any unit (1 unless 0 is a candidate) and add
        up to `expected_size`. Ranks are not differentiated: alpha learns through the values.

        Returns:
            In [0, 1], shaped like the units.
        """
        p = self._as_grid(self.candidate_probs())
        sparsity = staircase(p, self._grid_sizes(), self._grid_ranks())
        return sparsity.view_as(self.alive)

    def prunability(self, lam: float | Tensor) -> Tensor:
        """Return the bi-mask value of every unit, in [0, 1]: high = kept, exactly 0 = dead.

        Args:
            lam: weight of the importance score, 1 = importance only, 0 = sparsity only.
        """
        return bi_mask_values(
            self.importance(),
            self.sparsity(),
            lam,
            self.alive,
        )

    def importance_by_rank(self) -> Tensor:
        """Return the importance sorted by rank along each axis, shaped like the units."""
        importance = self._as_grid(self.importance())
        return sort_by_rank(importance, self._grid_ranks()).view_as(self.alive)

    # ------------------------------------------------------------- importance and alpha, estimated

    @torch.no_grad()
    def estimate_importance_(self, num_kept: int) -> None:
        """Set importance from `first_order`: above 1/2 for the `num_kept` best units only.

        The logit of a unit is the logarithm of how much its first-order score exceeds that of the
        last unit that is kept, times `SHARPNESS` and limited to +-`IMPORTANCE_LIMIT`. Importance
        then says by how much a unit is worth its place, and most units that are kept have a value
        close to 1: the network hardly changes, so there is little to repair afterwards.

        Args:
            num_kept: units to keep, from none to all of them.
        """
        if not self.first_order.numel():
            return
        scores = self.first_order.double()
        smallest = scores.max().item() * SMALLEST_SCORE
        tiny = torch.finfo(scores.dtype).tiny
        scores = scores.clamp(min=max(smallest, tiny)).log()
        ordered = scores.flatten().sort(descending=True).values
        # Half way between the last kept unit and the first removed one. Where there is none of
        # them, far enough away that every unit reaches the limit on its side.
        first_removed = ordered[-1] - 2 * IMPORTANCE_LIMIT
        if num_kept < len(ordered):
            first_removed = ordered[num_kept]
        last_kept = ordered[0] + 2 * IMPORTANCE_LIMIT
        if num_kept:
            last_kept = ordered[num_kept - 1]
        edge = (last_kept + first_removed) / 2
        logits = SHARPNESS * (scores - edge)
        self.importance_logits.copy_(logits.clamp(-IMPORTANCE_LIMIT, IMPORTANCE_LIMIT))

    @torch.no_grad()
    def fit_alpha_(
        self,
        floor: float = 0.05,
        curve: Tensor | None = None,
    ) -> None:
        """Set alpha so that the sparsity staircase follows the importance curve as it can.

        Under probabilities p of the candidate sizes c_1 < ... < c_K, the sparsity is a staircase
        over the ranks: V(r) = P(size > r) is constant between two neighbouring candidates, and

            v_k = V(c_k - 1) = p_k + p_(k+1) + ... + p_K,    so    p_k = v_k - v_(k+1), v_(K+1) = 0.

        The closest staircase in the least-squares sense has the mean of the curve over each stair
        as its height v_k. Probabilities are not negative, so heights must not rise, and they add
        up to 1, so v_1 = 1: every candidate keeps the first ranks. On a grid the same holds along
        both axes, with rectangles of (head rank, channel rank) for stairs and the second difference
        for p; where that is negative, it counts as 0 and the others are rescaled.

        Args:
            floor: probability shared evenly by all active candidates, so that none starts without a
                chance.
            curve: importance by rank, shaped like the units; `importance_by_rank` by default.
        """
        if curve is None:
            curve = self.importance_by_rank()
        heights = self._stair_heights(curve)
        for axis in range(heights.ndim):
            heights = heights.cummin(axis).values
        p = heights
        for axis in range(p.ndim):
            beyond_last = torch.zeros_like(p.narrow(axis, 0, 1))
            p = -p.diff(dim=axis, append=beyond_last)
        p = p.clamp(min=0) * self.active_candidates
        even = floor / self.active_candidates.sum()
        p = (1 - floor) * p / p.sum() + even
        self.alpha.copy_(p.log())

    def _stair_heights(self, curve: Tensor) -> Tensor:
        """Return the mean over each stair, shaped like alpha, of a curve shaped like the units."""
        heights = curve
        for axis, sizes in enumerate(self.candidate_axes):
            sums = sums_of_first(heights, axis, sizes)  # K along this axis
            before_first = torch.zeros_like(sums.narrow(axis, 0, 1))
            heights = sums.diff(dim=axis, prepend=before_first)
            # Ranks of each stair, (K,); that of candidate 0 spans none, and its sum is 0.
            spans = sizes.diff(prepend=sizes.new_zeros(1)).clamp(min=1)
            is_last_axis = axis == heights.ndim - 1
            heights = heights / (spans if is_last_axis else spans[:, None])
            if self.may_vanish and len(sizes) > 1:
                # The stair of candidate 0 is as high as the next one, so that "no heads of some
                # width", which is no candidate, gets no probability.
                following = heights.narrow(axis, 1, 1)
                heights.narrow(axis, 0, 1).copy_(following)
        # The first candidate's height is 1. Where that is candidate 0, the drop behind it is the
        # probability of keeping nothing.
        heights.view(-1)[0] = 1
        return heights

    # ------------------------------------------------------------------------ retiring and settling

    @torch.no_grad()
    def weak_candidates(self, threshold: float) -> Tensor:
        """Return which active candidates have a probability of `threshold / active` or below.

        The most probable candidate is never weak. The published threshold is 0.2.

        Returns:
            bool, shaped like alpha.
        """
        p = self.candidate_probs()
        limit = threshold / self.active_candidates.sum()
        weak = self.active_candidates & (p <= limit)
        weak.view(-1)[p.argmax()] = False
        return weak

    @torch.no_grad()
    def retire_candidates(self, threshold: float = 0.2) -> int:
        """Retire weak candidates, and with them the units that no other candidate can reach.

        Returns:
            The number of candidates that retired.
        """
        weak = self.weak_candidates(threshold)
        self.retire_(weak)
        return int(weak.sum())

    @torch.no_grad()
    def retire_(self, candidates: Tensor) -> None:
        """Retire the given candidates (bool, shaped like alpha).

        Raises:
            ValueError: if no active candidate would remain.
        """
        remaining = self.active_candidates & ~candidates
        if not remaining.any():
            raise ValueError(
                f"retiring {int(candidates.sum())} candidates would leave {self.name!r} without "
                "any; at least one active candidate has to remain."
            )
        self.active_candidates.copy_(remaining)
        self._update_alive()

    @torch.no_grad()
    def settle_(self, *size: int) -> None:
        """Keep one candidate, given by its units: `size`, or `heads, channels per head` for a grid.

        Raises:
            ValueError: if there is no such candidate, or if it is retired.
        """
        wanted = torch.zeros_like(self.active_candidates)
        wanted[self.index_of(size)] = True
        if not (wanted & self.active_candidates).any():
            raise ValueError(
                f"candidate {size} of {self.name!r} is retired; choose one that is still active."
            )
        self.active_candidates.copy_(wanted)
        self._update_alive()

    @torch.no_grad()
    def settle_to_(self, kept: Kept) -> None:
        """Keep certain units, as many as a candidate has, while all are there.

        Args:
            kept: as `SubnetSpec.kept` has them.
        """
        chosen = torch.zeros_like(self.alive)
        if self.is_grid:
            for head, channels in kept.items():
                chosen[head, list(channels)] = True
            size = (len(kept), len(next(iter(kept.values()), ())))
        else:
            chosen[list(kept)] = True
            size = (len(kept),)
        worth = torch.where(chosen, IMPORTANCE_LIMIT, -IMPORTANCE_LIMIT)
        self.importance_logits.copy_(worth)
        self.settle_(*size)

    def index_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the position in alpha of the candidate (U',) or (heads, channels per head)."""
        axes = [axis.tolist() for axis in self.candidate_axes]
        if len(size) == len(axes):
            pairs = list(zip(size, axes, strict=True))
            if all(units in axis for units, axis in pairs):
                return tuple(axis.index(units) for units, axis in pairs)
        raise ValueError(f"{size} is no candidate of {self.name!r}; its candidates are {axes}.")

    def largest_size(self) -> tuple[int, ...]:
        """Return the largest active size along each axis: (U',) or (H', D')."""
        if not self.is_grid:
            return (int(self.candidate_axes[0][self.active_candidates].max()),)
        heads, channels = self.candidate_axes
        largest_heads = heads[self.active_candidates.any(1)].max()
        largest_channels = channels[self.active_candidates.any(0)].max()
        return int(largest_heads), int(largest_channels)

    def _update_alive(self) -> None:
        """Mark the units that no active candidate can reach as dead."""
        largest, rank = self.largest_size(), self.unit_rank()
        reachable = rank[-1] < largest[-1]  # (U,) or (H, D)
        if self.is_grid:
            reachable &= (rank[0] < largest[0])[:, None]
        self.alive &= reachable

    # ---------------------------------------------------------------------------------- kept units

    def alive_units(self) -> tuple[Tensor, ...]:
        """Return the indices of the living units along each axis, ascending.

        Returns:
            Plain axis: ((U',),). Grid: heads (H',) and the channels of each (H', D').
        """
        if not self.is_grid:
            return (self.alive.nonzero()[:, 0],)
        heads = self.alive.any(1).nonzero()[:, 0]  # (H',)
        channels = self.alive[heads].nonzero()[:, 1]  # (H' * D',), head by head
        per_head = len(channels) // max(len(heads), 1)
        return heads, channels.reshape(len(heads), per_head)

    def kept(self) -> Kept:
        """Return the living units as indices of the dense parent, by head for a grid."""
        if not self.is_grid:
            return tuple(self.unit_ids[self.alive].tolist())
        heads, channels = self.alive_units()
        ids = self.unit_ids[heads].gather(1, channels)  # (H', D'), flat indices
        kept = {}
        for row in ids.tolist():
            head = row[0] // self.dense_head_dim
            kept[head] = tuple(unit % self.dense_head_dim for unit in row)
        return kept

    def kept_now(self) -> Kept:
        """Return the same as `kept`, but as indices into the network as it is now."""
        units = [indices.tolist() for indices in self.alive_units()]
        if not self.is_grid:
            return tuple(units[0])
        heads, channels = units
        return {head: tuple(row) for head, row in zip(heads, channels, strict=True)}

    def shrink_plan(self) -> Slices:
        """Return how each parameter and buffer is sliced when the dead units are removed.

        Candidates beyond the largest active one are removed with their units; retired ones in
        between stay, inactive.
        """
        units = tuple(enumerate(self.alive_units()))
        candidates = []
        axes = zip(self.candidate_axes, self.largest_size(), strict=True)
        for axis, (sizes, largest) in enumerate(axes):
            count = sizes.tolist().index(largest) + 1
            candidates.append((axis, torch.arange(count, device=sizes.device)))
        plan = {
            "importance_logits": units,
            "alive": units,
            "unit_ids": units,
            "first_order": units,
            "alpha": tuple(candidates),
            "active_candidates": tuple(candidates),
        }
        for axis, indices in candidates:
            plan[f"candidate_sizes_{axis}"] = ((0, indices),)
        return plan


class TiedBiMask(BiMask):
    """Bi-mask that keeps the same number of units as another one, its leader.

    It has an importance of its own; candidates and alpha are the leader's.

    Args:
        space: the same as the leader's, except for the name.
        leader: the bi-mask that owns `alpha` and `active_candidates`.
        normalize_importance: as in `BiMask`.
    """

    def __init__(
        self,
        space: SubmoduleSpace,
        leader: BiMask,
        normalize_importance: bool = False,
    ):
        super().__init__(space, normalize_importance)
        # In a tuple: a module in an attribute would be registered as a part of this one.
        self._leader = (leader,)

    def _add_choice(self, space: SubmoduleSpace) -> None:
        """Register nothing: the leader has it."""

    @property
    def alpha(self) -> nn.Parameter:
        """The leader's, (K,) or (K_heads, K_dims)."""
        return self._leader[0].alpha

    @property
    def active_candidates(self) -> Tensor:
        """The leader's, bool, shaped like alpha."""
        return self._leader[0].active_candidates

    def shrink_plan(self) -> Slices:
        """Return the same as for any bi-mask, without the tensors that the leader owns."""
        plan = super().shrink_plan()
        del plan["alpha"]
        del plan["active_candidates"]
        return plan
