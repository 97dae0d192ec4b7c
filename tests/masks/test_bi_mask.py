"""The bi-mask's promises, over many random spaces: plain axes and grids, with ties and retired
candidates."""

import itertools
import random

import pytest
import reference
import torch
from factories import grid_spaces, masks, plain_spaces, random_candidate, spaces
from hypothesis import assume, given
from hypothesis import strategies as st
from invariants import assert_close

from ofb_hf.masks.bi_mask import BiMask
from ofb_hf.pruning.surgery import slice_tensors_
from ofb_hf.space.search_space import SubmoduleSpace

PLAIN = SubmoduleSpace("layers.0.mlp", "mlp", 9, (2, 5, 9))
GRID = SubmoduleSpace(
    "layers.0.attention",
    "attention",
    num_heads=4,
    head_dim=5,
    head_candidates=(1, 2, 4),
    dim_candidates=(2, 3, 5),
)


def by_rank(mask: BiMask, values: torch.Tensor) -> torch.Tensor:
    """Values of units, sorted from the most to the least important; for a grid along both axes."""
    rank = mask.unit_rank()
    ordered = torch.empty_like(values)
    if mask.is_grid:
        ordered[rank[0][:, None], rank[1]] = values
    else:
        ordered[rank[0]] = values
    return ordered


def keeps(mask: BiMask, size: tuple[int, ...]) -> torch.Tensor:
    """1 for the units that a candidate of this size keeps, in rank order."""
    kept = torch.zeros(mask.alive.shape, dtype=mask.alpha.dtype)
    kept[tuple(slice(0, units) for units in size)] = 1
    return kept


def shrink_(mask: BiMask) -> None:
    """Removes dead units from the mask itself."""
    slice_tensors_(mask, mask.shrink_plan())


@given(masks(), st.floats(0, 1))
def test_scores_are_those_of_their_definitions(mask, lam):
    assume(not reference.heads_tie(mask))
    for size, p in reference.probabilities(mask).items():
        assert_close(mask.candidate_probs()[mask.index_of(size)], p)
    assert_close(mask.importance(), reference.importance(mask))
    assert_close(mask.sparsity(), reference.sparsity(mask))
    assert_close(mask.prunability(lam), reference.prunability(mask, lam))
    assert_close(mask.expected_size(), reference.expected_amounts(mask)[0])
    ranks = reference.ranks(mask)
    for unit, rank in ranks.items():
        assert mask.importance_by_rank()[rank] == mask.importance()[unit]


# ------------------------------------------------------------------------------------ probabilities


@given(masks())
def test_probabilities_cover_the_active_candidates_only(mask):
    p = mask.candidate_probs()
    assert p.shape == mask.alpha.shape
    assert p.sum().item() == pytest.approx(1)
    assert (p[~mask.active_candidates] == 0).all()
    assert (p[mask.active_candidates] > 0).all()
    logits = mask.alpha[mask.active_candidates]
    torch.testing.assert_close(p[mask.active_candidates], (logits - logits.logsumexp(0)).exp())


def test_grid_probabilities_are_one_softmax_over_heads_and_channels():
    mask = BiMask(GRID)
    torch.nn.init.normal_(mask.alpha)
    torch.testing.assert_close(mask.candidate_probs(), mask.alpha.exp() / mask.alpha.exp().sum())
    assert mask.candidate_sizes.tolist() == [[2, 3, 5], [4, 6, 10], [8, 12, 20]]


# ----------------------------------------------------------------------------------------- sparsity


@given(masks())
def test_sparsity_is_a_staircase(mask):
    stairs = by_rank(mask, mask.sparsity())
    _, _, presence = reference.expected_amounts(mask)
    assert stairs.flatten()[0].item() == pytest.approx(presence.item())
    assert mask.may_vanish or stairs.flatten()[0].item() == pytest.approx(1)
    for axis in range(stairs.ndim):
        assert (stairs.diff(dim=axis) <= 1e-15).all()
    assert stairs.min() >= 0
    assert stairs.max() <= 1


@given(masks())
def test_sparsity_sums_to_the_expected_size(mask):
    p, sizes = mask.candidate_probs(), mask.candidate_sizes
    expected = sum(p[tuple(i)] * sizes[tuple(i)] for i in mask.active_candidates.nonzero().tolist())
    assert mask.expected_size().item() == pytest.approx(expected.item())
    assert mask.sparsity().sum().item() == pytest.approx(expected.item())


@given(masks())
def test_sparsity_is_the_mixture_of_what_the_candidates_keep(mask):
    p, mixture = mask.candidate_probs(), torch.zeros(mask.alive.shape, dtype=torch.float64)
    for index in mask.active_candidates.nonzero().tolist():
        size = tuple(int(axis[i]) for axis, i in zip(mask.candidate_axes, index, strict=True))
        mixture += p[tuple(index)] * keeps(mask, size)
    torch.testing.assert_close(by_rank(mask, mask.sparsity()), mixture, atol=1e-12, rtol=1e-12)


@given(masks())
def test_units_are_ranked_by_importance(mask):
    logits = mask.importance_logits.detach().masked_fill(~mask.alive, -torch.inf)
    if not mask.is_grid:
        (rank,) = mask.unit_rank()
        assert sorted(rank.tolist()) == list(range(len(rank)))
        assert (by_rank(mask, logits).diff().nan_to_num(0) <= 0).all()
        return
    head_rank, channel_rank = mask.unit_rank()
    assert sorted(head_rank.tolist()) == list(range(len(head_rank)))
    sums = (logits.sigmoid()).sum(1).masked_fill(~mask.alive.any(1), -torch.inf)
    assert (sums[head_rank.argsort()].diff().nan_to_num(0) <= 1e-12).all()
    for head, rank in enumerate(channel_rank):
        assert sorted(rank.tolist()) == list(range(len(rank)))
        assert (logits[head][rank.argsort()].diff().nan_to_num(0) <= 0).all()


@given(masks())
def test_importance_by_rank_is_the_importance_in_the_order_of_the_staircase(mask):
    curve = mask.importance_by_rank()
    torch.testing.assert_close(curve, by_rank(mask, mask.importance()), atol=0, rtol=0)
    within = curve.masked_fill(curve == 0, -torch.inf)  # of units that are no longer alive
    assert (within.diff(dim=-1).nan_to_num(0) <= 0).all()


def test_heads_are_ranked_by_the_sum_of_importance_not_of_logits():
    """One channel with a huge logit does not make a head: importance saturates at 1."""
    mask = BiMask(SubmoduleSpace("a", "attention", None, (), 3, 3, (1, 3), (3,)))
    with torch.no_grad():
        mask.importance_logits.copy_(
            torch.tensor([[40.0, -1.0, -1.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
        )
    assert mask.unit_rank()[0].tolist() == [1, 2, 0]
    mask.settle_(1, 3)
    assert mask.kept() == {2: (0, 1, 2)}


def test_ties_keep_the_order_of_the_units():
    plain, grid = BiMask(PLAIN), BiMask(GRID)
    assert plain.unit_rank()[0].tolist() == list(range(9))
    head_rank, channel_rank = grid.unit_rank()
    assert head_rank.tolist() == [0, 1, 2, 3]
    assert channel_rank.tolist() == [[0, 1, 2, 3, 4]] * 4
    plain.settle_(5)
    grid.settle_(2, 3)
    assert plain.kept() == (0, 1, 2, 3, 4)
    assert grid.kept() == {0: (0, 1, 2), 1: (0, 1, 2)}


# -------------------------------------------------------------------------------------- prunability


@given(masks(), st.floats(0, 1))
def test_prunability_mixes_both_scores_and_stays_in_range(mask, lam):
    value = mask.prunability(lam)
    assert value.min() >= 0
    assert value.max() <= 1
    assert (value[~mask.alive] == 0).all()
    mixture = lam * mask.importance() + (1 - lam) * mask.sparsity()
    torch.testing.assert_close(value[mask.alive], mixture[mask.alive], atol=1e-12, rtol=1e-12)


@given(masks())
def test_the_ends_of_the_mixture_are_the_two_scores(mask):
    torch.testing.assert_close(mask.prunability(1.0), mask.importance())
    torch.testing.assert_close(mask.prunability(0.0), mask.sparsity(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("space", [PLAIN, GRID], ids=["plain", "grid"])
@pytest.mark.parametrize("lam", [0.0, 0.1, 1 / 3, 0.4, 0.7, 0.99, 1.0])
def test_prunability_is_exactly_one_where_both_scores_are(space, dtype, lam):
    mask = BiMask(space).to(dtype)
    torch.nn.init.constant_(mask.importance_logits, 100.0)
    mask.settle_(*mask.largest_size())
    assert torch.equal(mask.prunability(lam), torch.ones(space.unit_shape, dtype=dtype))
    assert torch.equal(
        mask.prunability(torch.tensor(lam)), torch.ones(space.unit_shape, dtype=dtype)
    )


@pytest.mark.parametrize("space", [PLAIN, GRID], ids=["plain", "grid"])
@pytest.mark.parametrize("count", range(8))
def test_what_every_candidate_keeps_is_exactly_one_in_float32(space, count):
    """A softmax may add up to 1 + 1e-7; a mask value may not."""
    mask = BiMask(space)
    torch.manual_seed(count)
    torch.nn.init.normal_(mask.alpha, std=3.0)
    assert mask.sparsity().max() <= 1
    assert mask.prunability(0.1).max() <= 1


@given(masks(), st.floats(0.05, 0.95))
def test_gradients_reach_both_scores(mask, lam):
    weights = torch.linspace(1, 2, mask.alive.numel(), dtype=torch.float64).reshape(
        mask.alive.shape
    )
    (mask.prunability(lam) * weights).sum().backward()
    assert mask.importance_logits.grad.isfinite().all()
    assert mask.alpha.grad.isfinite().all()
    slope = lam * mask.importance_logits.sigmoid() * (1 - mask.importance_logits.sigmoid())
    assert (mask.importance_logits.grad[mask.alive] >= (0.999 * slope * weights)[mask.alive]).all()
    assert (mask.importance_logits.grad[~mask.alive] == 0).all()
    assert (mask.alpha.grad[~mask.active_candidates] == 0).all()
    if (
        int(mask.active_candidates.sum()) > 1
        and len(set(mask.candidate_sizes[mask.active_candidates].tolist())) > 1
    ):
        assert (mask.alpha.grad != 0).any()


@pytest.mark.parametrize("space", [PLAIN, GRID], ids=["plain", "grid"])
def test_normalized_importance_has_a_maximum_of_one(space):
    mask = BiMask(space, normalize_importance=True).double()
    torch.nn.init.normal_(mask.importance_logits, mean=-4.0)
    importance, plain = mask.importance(), mask.importance_logits.sigmoid()
    assert importance.max().item() == 1
    torch.testing.assert_close(importance, plain / plain.max())
    importance.sum().backward()
    assert (mask.importance_logits.grad > 0).all()


def test_units_that_may_all_go_sink_together_once_the_best_is_not_worth_its_place():
    mask = BiMask(SubmoduleSpace("a", "mlp", 3, (0, 1, 3)), normalize_importance=True)
    for best, largest in (
        (2.0, 1.0),
        (0.0, 1.0),
        (-1.0, 2 * torch.sigmoid(torch.tensor(-1.0)).item()),
    ):
        with torch.no_grad():
            mask.importance_logits.copy_(torch.tensor([best - 2, best, best - 1]))
        assert mask.importance().max().item() == pytest.approx(largest)
    mask.settle_(0)
    assert (mask.importance() == 0).all()
    assert (mask.prunability(0.5) == 0).all()
    shrink_(mask)
    assert mask.importance().shape == mask.prunability(0.5).shape == (0,)
    assert mask.kept() == ()


@pytest.mark.parametrize("kept", [0, 1, 5, 11, 12])
@pytest.mark.parametrize(
    "space",
    [
        SubmoduleSpace("a", "mlp", 12, (0, 12)),
        SubmoduleSpace("a", "attention", None, (), 3, 4, (0, 3), (0, 4)),
    ],
)
def test_estimated_importance_is_above_one_half_for_as_many_units_as_are_kept(space, kept):
    mask = BiMask(space)
    mask.first_order.copy_(torch.rand(space.unit_shape) + 0.01)
    mask.estimate_importance_(kept)
    assert int((mask.importance() > 0.5).sum()) == kept
    order = mask.first_order.flatten().argsort()
    assert (mask.importance_logits.flatten()[order].diff() >= 0).all()


def test_normalization_looks_at_living_units_only():
    mask = BiMask(PLAIN, normalize_importance=True).double()
    with torch.no_grad():
        mask.importance_logits.copy_(torch.arange(9.0))
    mask.settle_(5)
    with torch.no_grad():
        mask.importance_logits[0] = 50.0
    assert mask.importance()[4:].max().item() == 1
    assert mask.importance()[0].item() == 0


# -------------------------------------------------------------------- retiring, settling, shrinking


def test_the_most_probable_candidate_never_retires():
    for threshold in (0.2, 1.0, 50.0):
        mask = BiMask(GRID)
        torch.nn.init.normal_(mask.alpha)
        best = int(mask.alpha.argmax())
        mask.retire_candidates(threshold)
        assert mask.active_candidates.flatten()[best]
        assert int(mask.active_candidates.sum()) >= 1
    assert int(mask.active_candidates.sum()) == 1


def test_uniform_candidates_all_stay():
    mask = BiMask(PLAIN)
    assert mask.retire_candidates(0.2) == 0
    assert mask.active_candidates.all()


@given(spaces(), st.integers(0, 2**31))
def test_weak_candidates_are_those_below_the_threshold(space, seed):
    mask = BiMask(space).double()
    torch.nn.init.normal_(mask.alpha, std=2.0, generator=torch.Generator().manual_seed(seed))
    p = mask.candidate_probs().detach()
    assert int((p > 0).sum()) == len(space.sizes)
    expected = p > 0.2 / len(space.sizes)
    expected.view(-1)[p.argmax()] = True
    assert mask.retire_candidates(0.2) == len(space.sizes) - int(expected.sum())
    assert torch.equal(mask.active_candidates, expected)


def test_the_threshold_is_a_share_of_the_active_candidates():
    """p = 0.06: weak among three candidates (0.2 / 3), not among four (0.2 / 4 would be 0.05)."""
    mask = BiMask(SubmoduleSpace("a", "mlp", 9, (2, 4, 6, 9))).double()
    with torch.no_grad():
        mask.alpha.copy_(torch.tensor([0.06, 0.50, 0.43, 0.01]).double().log())
    assert mask.retire_candidates(0.2) == 1
    assert mask.active_candidates.tolist() == [True, True, True, False]
    assert mask.retire_candidates(0.2) == 1
    assert mask.active_candidates.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("mask", "retired"), [(BiMask(PLAIN), (9,)), (BiMask(GRID), (4, 5))], ids=["plain", "grid"]
)
def test_settling_on_a_retired_candidate_is_refused(mask, retired):
    weak = torch.zeros_like(mask.active_candidates)
    weak[mask.index_of(retired)] = True
    mask.retire_(weak)
    with pytest.raises(ValueError, match="retired"):
        mask.settle_(*retired)
    assert not mask.active_candidates[mask.index_of(retired)]


def test_retiring_everything_is_refused():
    mask = BiMask(PLAIN)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp"):
        mask.retire_(torch.ones(3, dtype=torch.bool))
    assert mask.active_candidates.all()


def test_settling_on_a_size_that_is_no_candidate_is_refused():
    with pytest.raises(ValueError, match="4"):
        BiMask(PLAIN).settle_(4)


@given(plain_spaces(), st.integers(0, 2**31))
def test_settling_keeps_the_most_important_units(space, seed):
    mask = BiMask(space)
    torch.nn.init.normal_(mask.importance_logits, generator=torch.Generator().manual_seed(seed))
    (size,) = random_candidate(mask, random.Random(seed))
    mask.settle_(size)
    best = mask.importance_logits.detach().argsort(descending=True)[:size]
    assert mask.kept() == tuple(sorted(best.tolist()))
    assert torch.equal(mask.sparsity(), mask.alive.float())


@given(grid_spaces(), st.integers(0, 2**31))
def test_settling_keeps_the_best_channels_of_the_best_heads(space, seed):
    mask = BiMask(space)
    torch.nn.init.normal_(mask.importance_logits, generator=torch.Generator().manual_seed(seed))
    heads, dims = random_candidate(mask, random.Random(seed))
    mask.settle_(heads, dims)
    logits = mask.importance_logits.detach()
    best = logits.sigmoid().sum(1).argsort(descending=True)[:heads].tolist()
    expected = {
        head: tuple(sorted(logits[head].argsort(descending=True)[:dims].tolist()))
        for head in sorted(best)
    }
    assert mask.kept() == expected
    assert list(mask.kept()) == sorted(best)
    assert torch.equal(mask.sparsity(), mask.alive.float())


def kept_units(mask: BiMask) -> set[int]:
    """The living units as flat indices of the dense parent."""
    kept = mask.kept()
    if not mask.is_grid:
        return set(kept)
    return {
        head * mask.dense_head_dim + channel
        for head, channels in kept.items()
        for channel in channels
    }


@given(spaces(), st.integers(0, 2**31))
def test_nothing_ever_returns(space, seed):
    """Any sequence of steps that move scores, retire, settle and shrink: candidates and units only
    ever go."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    mask = BiMask(space, normalize_importance=rng.random() < 0.5)
    units, sizes = set(range(space.num_units)), None
    for _ in range(10):
        with torch.no_grad():  # an optimizer step; the logits of dead units move as well
            for parameter in mask.parameters():
                parameter.add_(2 * torch.randn(parameter.shape, generator=generator))
        action = rng.choice(
            ["retire", "retire", "shrink", "settle" if rng.random() < 0.2 else "retire_random"]
        )
        if action == "retire":
            mask.retire_candidates(rng.choice([0.2, 0.6]))
        elif action == "retire_random":
            weak = torch.rand(mask.alpha.shape, generator=generator) < 0.4
            if (mask.active_candidates & ~weak).any():
                mask.retire_(weak)
        elif action == "settle":
            mask.settle_(*random_candidate(mask, rng))
        else:
            shrink_(mask)
        now = kept_units(mask)
        active = {
            tuple(int(axis[i]) for axis, i in zip(mask.candidate_axes, index, strict=True))
            for index in mask.active_candidates.nonzero().tolist()
        }
        assert now <= units
        assert sizes is None or active <= sizes
        assert active
        units, sizes = now, active
        value = mask.prunability(rng.random())
        assert (value[~mask.alive] == 0).all()
        assert (value >= 0).all()
        assert (value <= 1).all()
        largest = mask.largest_size()
        assert mask.alive.sum() == torch.tensor(largest).prod()
        torch.testing.assert_close(
            mask.sparsity().sum(), mask.expected_size(), rtol=1e-5, atol=1e-5
        )


@given(spaces(), st.integers(0, 2**31))
def test_shrinking_changes_no_value(space, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = BiMask(space).double()
    with torch.no_grad():
        for parameter in mask.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    weak = torch.rand(mask.alpha.shape, generator=generator) < 0.6
    if (mask.active_candidates & ~weak).any():
        mask.retire_(weak)
    before, alive, kept = mask.prunability(0.3), mask.alive.clone(), mask.kept()
    size, active = mask.expected_size(), int(mask.active_candidates.sum())
    shrink_(mask)
    assert mask.alive.all()
    assert mask.importance_logits.shape == mask.alive.shape == mask.unit_ids.shape
    torch.testing.assert_close(
        mask.prunability(0.3).flatten(), before[alive], rtol=1e-14, atol=1e-14
    )
    assert mask.kept() == kept
    assert int(mask.active_candidates.sum()) == active
    torch.testing.assert_close(mask.expected_size(), size, rtol=1e-14, atol=1e-14)


def test_kept_units_are_those_of_the_dense_parent_after_several_shrinks():
    """Every unit carries a mark of its own: what is kept must be what carries the mark."""
    mask = BiMask(GRID)
    with torch.no_grad():
        mask.importance_logits.copy_(torch.randperm(20).reshape(4, 5).float())
    marks = mask.importance_logits.detach().clone()
    for size in ((4, 3), (2, 3), (1, 2)):
        mask.settle_(*size) if size == (1, 2) else mask.retire_(
            ~torch.tensor([[h <= size[0] and d <= size[1] for d in (2, 3, 5)] for h in (1, 2, 4)])[
                : mask.alpha.shape[0], : mask.alpha.shape[1]
            ]
        )
        shrink_(mask)
        assert tuple(mask.alive.shape) == size
        kept = mask.kept()
        for row, (head, channels) in enumerate(kept.items()):
            assert torch.equal(marks[head, list(channels)], mask.importance_logits[row])
    assert len(kept) == 1


def test_candidates_between_living_ones_stay_as_inactive():
    mask = BiMask(SubmoduleSpace("a", "mlp", 9, (2, 4, 6, 9)))
    mask.retire_(torch.tensor([False, True, False, True]))
    shrink_(mask)
    assert mask.candidate_sizes.tolist() == [2, 4, 6]
    assert mask.active_candidates.tolist() == [True, False, True]
    assert mask.index_of((6,)) == (2,)


# --------------------------------------------------------------------------------------- fit_alpha_


@pytest.mark.parametrize("nothing", [(), (0,)], ids=["", "or nothing"])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_fitted_alpha_follows_a_reachable_importance_curve(shape, nothing):
    """Where the importance itself is a staircase over the candidates, the fit reproduces it."""
    if len(shape) == 1:
        space = SubmoduleSpace("a", "mlp", 12, (*nothing, 3, 7, 9, 12))
    else:
        space = SubmoduleSpace(
            "a", "attention", None, (), 3, 4, (*nothing, 1, 3), (*nothing, 2, 3, 4)
        )
    source = BiMask(space).double()
    torch.nn.init.normal_(source.alpha)
    curve = source.sparsity().detach()
    mask = BiMask(space).double()
    with torch.no_grad():
        mask.importance_logits.copy_(curve.clamp(1e-9, 1 - 1e-9).logit())
    mask.fit_alpha_(floor=0.0)
    torch.testing.assert_close(mask.sparsity(), curve, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(
        mask.candidate_probs(), source.candidate_probs(), atol=1e-7, rtol=1e-7
    )


@given(plain_spaces(), st.integers(0, 2**31))
def test_fitted_stairs_are_the_mean_importance_of_the_ranks_they_span(space, seed):
    mask = BiMask(space).double()
    with torch.no_grad():
        mask.importance_logits.copy_(
            3
            * torch.randn(
                space.num_units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
        )
    mask.fit_alpha_(floor=0.0)
    curve = by_rank(mask, mask.importance_logits.detach().sigmoid())
    stairs = by_rank(mask, mask.sparsity().detach())
    for low, high in itertools.pairwise(space.candidate_sizes):
        torch.testing.assert_close(
            stairs[low:high], curve[low:high].mean().expand(high - low), atol=1e-9, rtol=1e-9
        )
    torch.testing.assert_close(
        stairs[: space.candidate_sizes[0]], torch.ones(space.candidate_sizes[0]).double()
    )


@given(masks(), st.sampled_from([0.0, 0.05, 0.5]))
def test_fitted_alpha_gives_every_active_candidate_its_floor(mask, floor):
    mask.fit_alpha_(floor)
    p = mask.candidate_probs()
    assert not p.isnan().any()
    assert p.sum().item() == pytest.approx(1)
    active = int(mask.active_candidates.sum())
    assert (p[mask.active_candidates] >= floor / active * (1 - 1e-6)).all()
    assert (p[~mask.active_candidates] == 0).all()


@given(plain_spaces(), st.integers(0, 2**31))
def test_more_important_units_make_a_larger_expected_size(space, seed):
    torch.manual_seed(seed)
    small, large = BiMask(space).double(), BiMask(space).double()
    with torch.no_grad():
        small.importance_logits.normal_()
        large.importance_logits.copy_(small.importance_logits + 1)
    small.fit_alpha_()
    large.fit_alpha_()
    assert large.expected_size() >= small.expected_size() - 1e-12
