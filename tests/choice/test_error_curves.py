"""Error curves against plain least squares, over many shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofb_hf.choice.error_curves import (
    RIDGE,
    ErrorCurve,
    eliminate,
    first_channels_errors,
    half_direction_metric,
    held,
    means_of,
    moments_of,
    unit_scores,
)


def rows_of(seed, units, outputs, rows=200):
    """Correlated units (N, U) and what a layer with noise makes of them (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(units, units, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, units, generator=generator, dtype=torch.float64) @ mixing + 0.7
    layer = torch.randn(units, outputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    return values, values @ layer + 0.1 * noise - 0.3


def products_of(values, written, weights=None):
    rows = torch.cat([values, written, torch.ones(len(values), 1, dtype=torch.float64)], 1)
    weighted = rows if weights is None else rows * weights[:, None]
    return weighted.mT @ rows


shapes = st.tuples(st.integers(0, 1000), st.integers(2, 13), st.integers(1, 7))


@settings(deadline=None, max_examples=25)
@given(shapes, st.data())
def test_the_remaining_layer_is_that_of_least_squares(shape, data):
    seed, units, outputs = shape
    values, written = rows_of(seed, units, outputs)
    moments = moments_of(products_of(values, written), units)
    sizes = data.draw(st.lists(st.integers(1, units), min_size=1, unique=True))
    seen = []
    for removed, remaining, layer in eliminate(moments, 1, sizes):
        seen.append(len(remaining))
        assert sorted([*removed, *remaining.tolist()]) == list(range(units))
        # The ridge is that of all units, as no layer is solved anew.
        gram = held(moments.units)[remaining][:, remaining]
        wanted = torch.linalg.solve(gram, moments.cross[remaining]).mT
        torch.testing.assert_close(layer, wanted, atol=1e-7, rtol=1e-7)
        means = values.mean(0), written.mean(0)
        residual = written - means[1] - (values - means[0])[:, remaining] @ layer.mT
        error = residual.square().sum(-1).mean()
        assert moments.error(layer, remaining) == pytest.approx(float(error), rel=1e-6)
    assert seen == sorted(sizes, reverse=True)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(2, 5), st.integers(1, 4))
def test_heads_go_as_a_whole(seed, heads, channels):
    values, written = rows_of(seed, heads * channels, 4)
    moments = moments_of(products_of(values, written), heads * channels)
    steps = list(eliminate(moments, channels, list(range(heads + 1))))
    assert [len(remaining) for _, remaining, _ in steps] == [
        count * channels for count in reversed(range(heads + 1))
    ]
    for removed, remaining, _ in steps:
        of_heads = {unit // channels for unit in remaining.tolist()}
        assert of_heads == set(range(heads)) - set(removed)
    # One head less: the one that least squares misses least is the one that went first.
    errors = []
    for head in range(heads):
        rest = torch.tensor([u for u in range(heads * channels) if u // channels != head])
        gram = held(moments.units)[rest][:, rest]
        errors.append(
            -float((moments.cross[rest] * torch.linalg.solve(gram, moments.cross[rest])).sum())
        )
    assert errors[steps[1][0][0]] == pytest.approx(min(errors), rel=1e-9)


def test_a_copy_of_a_unit_costs_nothing_and_goes_first():
    values, _ = rows_of(3, 6, 4)
    values[:, 2] = values[:, 5]
    layer = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = moments_of(products_of(values, values @ layer), 6)
    full = moments.outputs.trace()
    # No more than the ridge, which holds back a hundredth.
    errors = {len(u): moments.error(w, u) for _, u, w in eliminate(moments, 1, [6, 5, 4])}
    assert errors[5] < 5 * RIDGE**2 * full + errors[6]
    assert errors[4] > errors[5]


def test_errors_are_measured_where_the_loss_minds_them():
    values, written = rows_of(1, 5, 3)
    weights = torch.rand(
        len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    everywhere = products_of(values, written)
    means = means_of(everywhere)
    minded = moments_of(products_of(values, written, weights), 5, means)
    _, remaining, layer = next(eliminate(moments_of(everywhere, 5), 1, [3]))
    centred = torch.cat([values, written], 1) - means
    residual = centred[:, 5:] - centred[:, :5][:, remaining] @ layer.mT
    wanted = (weights * residual.square().sum(-1)).sum() / weights.sum()
    assert minded.error(layer, remaining) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("size", [2, 5, 9])
def test_errors_of_first_channels_are_those_of_the_best_readers(size):
    values, gradients = rows_of(size, size, size)
    covariance = values.mT @ values / len(values)
    minded = gradients.mT @ gradients
    errors = first_channels_errors(covariance, minded)
    matrix = held(covariance)
    for kept in range(size + 1):
        first, rest = slice(kept), slice(kept, None)
        known = torch.linalg.solve(matrix[first, first], matrix[first, rest])
        left = matrix[rest, rest] - matrix[rest, first] @ known
        wanted = (minded[rest, rest] * left).sum()
        assert float(errors[kept]) == pytest.approx(float(wanted), rel=1e-8, abs=1e-8)


def test_the_metric_minds_all_directions_and_some_more():
    _, gradients = rows_of(0, 4, 6)
    metric = half_direction_metric(gradients.mT @ gradients)
    full = metric @ metric.mT
    values = torch.linalg.eigvalsh(full)
    assert values.min() >= 0.5 - 1e-9
    assert float(full.trace()) == pytest.approx(6.0)


@given(
    st.lists(st.floats(0.0, 10.0), min_size=2, max_size=12),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=50)
def test_scores_of_units_add_up_to_a_convex_curve(steps, step, random):
    """The rises grow along the curve: then an error is the sum over the units that are left out."""
    steps = sorted(steps)
    count = step * len(steps)
    order = list(range(count))
    random.shuffle(order)
    errors = {(count - step * number,): sum(steps[:number]) for number in range(len(steps) + 1)}
    curve = ErrorCurve(errors, {0: tuple(order)})
    scores = unit_scores(curve, (count,))
    for (size,), error in errors.items():
        kept = curve.remaining(size)
        removed = [unit for unit in range(count) if unit not in kept]
        assert float(scores[removed].sum()) == pytest.approx(error, abs=1e-9)


def test_scores_of_a_curve_that_is_not_convex_never_fall_along_the_order():
    curve = ErrorCurve({(4,): 0.0, (3,): 2.0, (2,): 2.5, (1,): 5.0}, {0: (1, 3, 0, 2)})
    assert unit_scores(curve, (4,)).tolist() == [2.5, 2.0, 2.5, 2.0]


def test_scores_of_a_grid_follow_its_heads_and_its_channels():
    errors = {(2, 4): 0.0, (1, 4): 1.0, (0, 0): 4.0, (2, 2): 0.5, (1, 2): 1.5}
    curve = ErrorCurve(errors, {4: (1, 0), 2: (1, 0)})
    scores = unit_scores(curve, (2, 4))
    assert scores.sum(1).tolist() == pytest.approx([3.0, 1.0])
    assert float(scores[:, 2:].sum()) == pytest.approx(0.5)
    assert float(scores.sum()) == pytest.approx(4.0)
