"""The bi-mask: how important every unit is, how many units there is room for, and the one value
made of both.

A submodule has U units (residual channels, MLP channels, or heads x channels per head) and K
candidate sizes.

    importance  S_u = sigmoid(importance_logits_u)                     (U,)  which units
    sparsity    V_u = P(chosen size > rank of u), p = softmax(alpha)   (U,)  how many units
    bi-mask     m_u = lam * S_u + (1 - lam) * V_u                      (U,)  arXiv:2403.15835

Both scores are learned by gradient descent; the rank of a unit is its position when units are
sorted by importance. Where 0 is among the candidate sizes, V may be below 1 for every unit: then
the submodule is on its way out as a whole.
"""

import math

import torch
from torch import Tensor, nn

from ..families.subnet import Kept
from ..space.search_space import SubmoduleSpace

# Above it a unit is worth its place (`estimate_importance_`).
EVEN_IMPORTANCE = 0.5
# Importance is estimated between sigmoid(-4) = 0.02 and sigmoid(4) = 0.98: nothing is out of the
# race for good. It rises that steeply around the last unit that is kept (docs/LOG.md).
IMPORTANCE_LIMIT, SHARPNESS = 4.0, 4.0


def sums_of_first(values: Tensor, axis: int, counts: Tensor) -> Tensor:
    """Sums of the first `counts` (K,) entries along an axis, 0 entries included: the axis becomes K
    long."""
    sums = values.cumsum(axis)
    return torch.cat([torch.zeros_like(values.sum(axis, keepdim=True)), sums], axis).index_select(
        axis, counts
    )


def _rank(score: Tensor) -> Tensor:
    """Position of every entry of the last axis when sorted from largest to smallest; ties keep
    their order."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


# The arithmetic, for M bi-masks at once: units (M, H, D), candidates (M, K_heads, K_dims); a plain
# axis has one head.


def probabilities(alpha: Tensor, active: Tensor) -> Tensor:
    """Softmax over the active candidates of each mask together; 0 for retired ones."""
    return alpha.masked_fill(~active, -math.inf).flatten(1).softmax(1).view_as(alpha)


def importance_scores(logits: Tensor, alive: Tensor, normalize: bool, floor: float) -> Tensor:
    """How much each unit matters, in (0, 1]; 0 for dead ones. Normalised by the maximum of each
    mask, or `floor`."""
    importance = logits.sigmoid() * alive
    if not normalize:
        return importance
    # Detached: otherwise the strongest unit, useful or not, would be rewarded for making all others
    # look weaker.
    return importance / importance.detach().amax((1, 2), keepdim=True).clamp(min=floor)


def unit_ranks(logits: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of heads by the sum of their importance (M, H), and of channels within each head (M, H,
    D); dead last."""
    logits = logits.detach()
    heads = (logits.sigmoid() * alive).sum(2).masked_fill(~alive.any(2), -math.inf)
    return _rank(heads), _rank(logits.masked_fill(~alive, -math.inf))


def staircase(p: Tensor, sizes: tuple[Tensor, Tensor], ranks: tuple[Tensor, Tensor]) -> Tensor:
    """The probability that the chosen size exceeds the rank of a unit along each axis: (M, H, D).

    Args:
        p: of the candidates. sizes: (M, K_heads) and (M, K_dims). ranks: (M, H) and (M, H, D).
    """
    heads, channels = ranks
    with torch.autocast(p.device.type, enabled=False):
        of_heads, of_channels = (  # (M, K, U) of each axis
            (torch.arange(units, device=p.device) < size[..., None]).to(p.dtype)
            for size, units in zip(sizes, channels.shape[1:], strict=True)
        )
        by_rank = (of_heads.mT @ p @ of_channels).clamp(max=1)
    return by_rank.gather(1, heads[..., None].expand_as(by_rank)).gather(2, channels)


def bi_mask_values(
    importance: Tensor, sparsity: Tensor, lam: float | Tensor, alive: Tensor
) -> Tensor:
    """lam * S + (1 - lam) * V, in the form that is exactly 1 where both scores are 1."""
    return (sparsity + lam * (importance - sparsity)) * alive


class BiMask(nn.Module):
    """Importance and sparsity scores of one submodule.

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
            change the loss, squared and summed over what was observed (`Observation`).
    """

    def __init__(self, space: SubmoduleSpace, normalize_importance: bool = False):
        super().__init__()
        self.name, self.kind, self.is_grid = space.name, space.kind, space.is_grid
        self.normalize_importance, self.may_vanish = normalize_importance, space.may_vanish
        self.importance_logits = nn.Parameter(torch.zeros(space.unit_shape))
        self._add_choice(space)
        self.register_buffer("alive", torch.ones(space.unit_shape, dtype=torch.bool))
        self.register_buffer("first_order", torch.zeros(space.unit_shape))
        self.dense_head_dim = space.head_dim
        self.register_buffer("unit_ids", torch.arange(space.num_units).reshape(space.unit_shape))
        axes = (
            (space.head_candidates, space.dim_candidates)
            if self.is_grid
            else (space.candidate_sizes,)
        )
        self._candidate_axes = len(axes)
        for axis, sizes in enumerate(axes):
            self.register_buffer(f"candidate_sizes_{axis}", torch.tensor(sizes))

    def _add_choice(self, space: SubmoduleSpace) -> None:
        self.alpha = nn.Parameter(torch.zeros(space.candidate_shape))
        active = torch.ones(space.candidate_shape, dtype=torch.bool)
        if space.is_grid and space.may_vanish:
            # no heads of some width, heads of no width: (0, 0) stands for them
            active[0, 1:] = active[1:, 0] = False
        self.register_buffer("active_candidates", active)

    def extra_repr(self) -> str:
        return f"{self.name}, units={tuple(self.alive.shape)}, candidates={tuple(self.alpha.shape)}"

    @torch.no_grad()
    def initialize_(self, mean: float, std: float, alpha: str) -> None:
        """Draws importance logits, and alpha where it is to be "uniform" instead of zeros."""
        # Noise breaks the ties between units; with std 0 the order of the channels would decide.
        nn.init.trunc_normal_(
            self.importance_logits, mean, max(std, 1e-8), mean - 2 * std, mean + 2 * std
        )
        if alpha == "uniform":
            nn.init.uniform_(self.alpha)

    @property
    def candidate_axes(self) -> tuple[Tensor, ...]:
        """The candidate sizes along each axis: ((K,),) or ((K_heads,), (K_dims,)), ascending
        integers."""
        return tuple(
            getattr(self, f"candidate_sizes_{axis}") for axis in range(self._candidate_axes)
        )

    @property
    def candidate_sizes(self) -> Tensor:
        """Units kept by each candidate, shaped like alpha."""
        axes = self.candidate_axes
        return axes[0][:, None] * axes[1][None, :] if self.is_grid else axes[0]

    @property
    def grid_axes(self) -> tuple[Tensor, Tensor]:
        """`candidate_axes` of heads and channels, a plain axis taken for a grid of one head:
        (K_heads,), (K_dims,)."""
        return (self.unit_ids.new_ones(1), *self.candidate_axes)[-2:]

    def _as_grid(self, tensor: Tensor) -> Tensor:
        return tensor[None] if self.is_grid else tensor[None, None]

    def candidate_probs(self) -> Tensor:
        """Softmax of alpha over the active candidates together; 0 for retired ones. Shaped like
        alpha."""
        return probabilities(
            self._as_grid(self.alpha), self._as_grid(self.active_candidates)
        ).view_as(self.alpha)

    def expected_size(self) -> Tensor:
        """Expected number of kept units under `candidate_probs`: scalar in units (heads x channels
        for a grid)."""
        return (self.candidate_probs() * self.candidate_sizes).sum()

    def expected_heads(self) -> Tensor:
        """Expected number of kept heads of a grid under `candidate_probs`: scalar."""
        return (self.candidate_probs().sum(1) * self.candidate_axes[0]).sum()

    def expected_presence(self) -> Tensor:
        """Probability that any unit is kept, under `candidate_probs`: scalar."""
        return (self.candidate_probs() * (self.candidate_sizes > 0)).sum()

    @property
    def importance_floor(self) -> float:
        """What importance is divided by at least, if it is normalised."""
        return EVEN_IMPORTANCE if self.may_vanish else 0.0

    def importance(self) -> Tensor:
        """How much each unit matters, in (0, 1]; 0 for units that are no longer alive. Shaped like
        the units."""
        logits, alive = self._as_grid(self.importance_logits), self._as_grid(self.alive)
        normalize = self.normalize_importance and bool(alive.numel())  # nothing has no maximum
        return importance_scores(logits, alive, normalize, self.importance_floor).view_as(
            self.alive
        )

    def unit_rank(self) -> tuple[Tensor, ...]:
        """Importance rank of every unit, 0 = most important; units that are no longer alive come
        last.

        Plain axis: ((U,),). Grid: heads by the sum of their importance (H,), and channels within
        each head (H, D).
        """
        heads, channels = unit_ranks(
            self._as_grid(self.importance_logits), self._as_grid(self.alive)
        )
        return (heads[0], channels[0]) if self.is_grid else (channels[0, 0],)

    def sparsity(self) -> Tensor:
        """How many units there is room for, dealt out by importance rank. Shaped like the units, in
        [0, 1].

        The unit of rank r receives the probability that the chosen size exceeds r, so values fall
        with the rank, start at the probability of keeping any (1 unless 0 is a candidate) and add
        up to `expected_size`. Ranks are not
        differentiated: alpha learns through the values.
        """
        heads, channels = self.grid_axes
        ranks = unit_ranks(self._as_grid(self.importance_logits), self._as_grid(self.alive))
        p = self._as_grid(self.candidate_probs())
        return staircase(p, (heads[None], channels[None]), ranks).view_as(self.alive)

    def prunability(self, lam: float | Tensor) -> Tensor:
        """The bi-mask value m_u of every unit, in [0, 1]: high = kept, exactly 0 = no longer alive.

        Args:
            lam: weight of the importance score, 1 = importance only, 0 = sparsity only.
        """
        return bi_mask_values(self.importance(), self.sparsity(), lam, self.alive)

    def importance_by_rank(self) -> Tensor:
        """The importance scores sorted as the sparsity staircase expects them. Shaped like the
        units."""
        importance, rank = self.importance(), self.unit_rank()
        if not self.is_grid:
            return torch.zeros_like(importance).scatter(0, rank[0], importance)
        within = torch.zeros_like(importance).scatter(1, rank[1], importance)
        return torch.zeros_like(within).index_copy(0, rank[0], within)

    @torch.no_grad()
    def estimate_importance_(self, num_kept: int) -> None:
        """Sets importance from `first_order`: above 1/2 for as many units as are to be kept, below
        for the others.

        The logit of a unit is the logarithm of how much its first-order score exceeds that of the
        last unit that is kept, times 4 and cut off at +-4: importance says by how much a unit is
        worth its place, and most units that are kept have a value close to 1, so that the function
        is not scaled first and mended afterwards.

        Args:
            num_kept: units to keep, from none to all of them.
        """
        if not self.first_order.numel():
            return
        scores = self.first_order.double()
        scores = scores.clamp(
            min=max(scores.max().item() * 1e-12, torch.finfo(scores.dtype).tiny)
        ).log()
        ordered = scores.flatten().sort(descending=True).values
        below = ordered[num_kept] if num_kept < len(ordered) else ordered[-1] - 2 * IMPORTANCE_LIMIT
        above = ordered[num_kept - 1] if num_kept else ordered[0] + 2 * IMPORTANCE_LIMIT
        edge = (above + below) / 2
        self.importance_logits.copy_(
            (SHARPNESS * (scores - edge)).clamp(-IMPORTANCE_LIMIT, IMPORTANCE_LIMIT)
        )

    @torch.no_grad()
    def fit_alpha_(self, floor: float = 0.05, curve: Tensor | None = None) -> None:
        """Sets alpha so that the sparsity staircase follows the importance curve as closely as the
        candidates allow.

        A stair's height is the mean importance of the ranks it spans (1 for those that every
        candidate keeps), and a candidate's probability is the drop behind its stair; that of
        keeping nothing, the drop before the first one.

        Args:
            floor: probability shared evenly by all active candidates, so that none starts without a
                chance.
            curve: importance by rank, shaped like the units; `importance_by_rank` if not given.
        """
        stairs = self.importance_by_rank() if curve is None else curve
        for axis, sizes in enumerate(self.candidate_axes):
            sums = sums_of_first(stairs, axis, sizes)
            stairs = sums.diff(dim=axis, prepend=torch.zeros_like(sums.narrow(axis, 0, 1)))
            spans = sizes.diff(prepend=sizes.new_zeros(1)).clamp(min=1)
            stairs = stairs / (spans if axis == stairs.ndim - 1 else spans[:, None])
            if self.may_vanish and len(sizes) > 1:
                # The stair of no units spans none: it is as high as the next one, but for the
                # corner.
                stairs.narrow(axis, 0, 1).copy_(stairs.narrow(axis, 1, 1))
        stairs.view(-1)[0] = 1
        p = stairs
        for axis in range(stairs.ndim):
            p = p.cummin(axis).values
        for axis in range(p.ndim):
            p = -p.diff(dim=axis, append=torch.zeros_like(p.narrow(axis, 0, 1)))
        p = p.clamp(min=0) * self.active_candidates
        p = (1 - floor) * p / p.sum() + floor / self.active_candidates.sum()
        self.alpha.copy_(p.log())

    @torch.no_grad()
    def weak_candidates(self, threshold: float) -> Tensor:
        """Which active candidates have fallen to `threshold / number of active ones` or below.
        Shaped like alpha.

        The most probable candidate is never weak (published rule, threshold 0.2).
        """
        p = self.candidate_probs()
        weak = self.active_candidates & (p <= threshold / self.active_candidates.sum())
        weak.view(-1)[p.argmax()] = False
        return weak

    @torch.no_grad()
    def retire_candidates(self, threshold: float = 0.2) -> int:
        """Retires weak candidates for good, and with them the units that no remaining candidate can
        reach.

        Returns:
            How many candidates retired.
        """
        weak = self.weak_candidates(threshold)
        self.retire_(weak)
        return int(weak.sum())

    @torch.no_grad()
    def retire_(self, candidates: Tensor) -> None:
        """Retires the given candidates (bool, shaped like alpha). At least one active candidate has
        to remain."""
        remaining = self.active_candidates & ~candidates
        if not remaining.any():
            raise ValueError(
                f"retiring {int(candidates.sum())} candidates would leave {self.name!r} without "
                f"any."
            )
        self.active_candidates.copy_(remaining)
        self._update_alive()

    @torch.no_grad()
    def settle_(self, *choice: int) -> None:
        """Keeps one candidate, given by its kept units: `size`, or `heads, channels per head` for a
        grid."""
        wanted = torch.zeros_like(self.active_candidates)
        wanted[self.index_of(choice)] = True
        if not (wanted & self.active_candidates).any():
            raise ValueError(
                f"candidate {choice} of {self.name!r} is retired; choose one that is still active."
            )
        self.active_candidates.copy_(wanted)
        self._update_alive()

    def index_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Position in alpha of the candidate of this size, (U',) or (heads, channels per head)."""
        axes = [axis.tolist() for axis in self.candidate_axes]
        if len(size) != len(axes) or any(
            units not in axis for units, axis in zip(size, axes, strict=True)
        ):
            raise ValueError(f"{size} is no candidate of {self.name!r}; its candidates are {axes}.")
        return tuple(axis.index(units) for units, axis in zip(size, axes, strict=True))

    def largest_size(self) -> tuple[int, ...]:
        """The largest active size along each axis: (U',) or (H', D')."""
        if not self.is_grid:
            return (int(self.candidate_axes[0][self.active_candidates].max()),)
        heads, dims = self.candidate_axes
        return int(heads[self.active_candidates.any(1)].max()), int(
            dims[self.active_candidates.any(0)].max()
        )

    def _update_alive(self) -> None:
        largest, rank = self.largest_size(), self.unit_rank()
        reachable = rank[-1] < largest[-1]
        if self.is_grid:
            reachable &= (rank[0] < largest[0])[:, None]
        self.alive &= reachable

    def alive_units(self) -> tuple[Tensor, ...]:
        """Indices of the living units: ((U',),), or for a grid heads (H',) and their channels (H',
        D'), ascending."""
        if not self.is_grid:
            return (self.alive.nonzero()[:, 0],)
        heads = self.alive.any(1).nonzero()[:, 0]
        channels = self.alive[heads].nonzero()[:, 1]
        return heads, channels.reshape(len(heads), len(channels) // max(len(heads), 1))

    def kept(self) -> Kept:
        """The living units as indices of the dense parent: a tuple, or `{head: channels}` for a
        grid."""
        if not self.is_grid:
            return tuple(self.unit_ids[self.alive].tolist())
        heads, channels = self.alive_units()
        ids = self.unit_ids[heads].gather(1, channels)
        return {
            row[0] // self.dense_head_dim: tuple(unit % self.dense_head_dim for unit in row)
            for row in ids.tolist()
        }

    def kept_now(self) -> Kept:
        """As `kept`, but as indices into the network as it is now."""
        units = [indices.tolist() for indices in self.alive_units()]
        return (
            dict(zip(units[0], map(tuple, units[1]), strict=True))
            if self.is_grid
            else tuple(units[0])
        )

    def shrink_plan(self) -> dict[str, tuple[tuple[int, Tensor], ...]]:
        """How each tensor of this mask is sliced when the units that are not alive go: {name:
        ((axis, indices), ...)}.

        Candidates beyond the largest active one go with their units; retired ones in between stay,
        inactive.
        """
        units = tuple(enumerate(self.alive_units()))
        candidates = tuple(
            (axis, torch.arange(sizes.tolist().index(largest) + 1, device=sizes.device))
            for axis, (sizes, largest) in enumerate(
                zip(self.candidate_axes, self.largest_size(), strict=True)
            )
        )
        plan = dict.fromkeys(("importance_logits", "alive", "unit_ids", "first_order"), units)
        plan |= dict.fromkeys(("alpha", "active_candidates"), candidates)
        plan |= {f"candidate_sizes_{axis}": ((0, indices),) for axis, indices in candidates}
        return plan


class TiedBiMask(BiMask):
    """A bi-mask that keeps as many units as another one does: importance of its own, candidates and
    alpha of a leader.

    Args:
        space: as of the leader, but for the name.
        leader: the bi-mask that owns `alpha` and `active_candidates`.
        normalize_importance: as in `BiMask`.
    """

    def __init__(self, space: SubmoduleSpace, leader: BiMask, normalize_importance: bool = False):
        super().__init__(space, normalize_importance)
        self._leader = (leader,)  # in a tuple: it is no part of this module

    def _add_choice(self, space: SubmoduleSpace) -> None:
        pass

    @property
    def alpha(self) -> nn.Parameter:
        """The leader's, (K,) or (K_heads, K_dims)."""
        return self._leader[0].alpha

    @property
    def active_candidates(self) -> Tensor:
        """The leader's, bool, shaped like alpha."""
        return self._leader[0].active_candidates

    def shrink_plan(self) -> dict[str, tuple[tuple[int, Tensor], ...]]:
        """As of any bi-mask, without the tensors that the leader owns."""
        plan = super().shrink_plan()
        return {
            name: entries
            for name, entries in plan.items()
            if name not in ("alpha", "active_candidates")
        }
