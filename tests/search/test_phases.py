"""Schedules are pure functions of the step: they start, end and stay where they say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofb_hf.search.phases import (
    importance_weight,
    is_retirement_step,
    keep_ratio,
    one_hot_weight,
    ramp,
)

STEPS = st.floats(-10, 1000)
VALUES = st.floats(0, 1)


@given(STEPS, st.floats(0, 500), VALUES, VALUES)
def test_a_ramp_stays_between_its_ends(step, warmup, start, end):
    value = ramp(step, warmup, start, end)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12
    if step >= warmup:
        assert value == end


@given(st.floats(0.1, 500), VALUES, VALUES)
def test_a_ramp_is_linear(warmup, start, end):
    assert ramp(0, warmup, start, end) == start
    assert ramp(-5, warmup, start, end) == start
    assert ramp(warmup / 4, warmup, start, end) == pytest.approx(0.75 * start + 0.25 * end)
    assert ramp(warmup, warmup, start, end) == end
    assert ramp(1e9, warmup, start, end) == end


@pytest.mark.parametrize("warmup", [0, -1])
def test_without_warmup_the_end_holds_from_the_start(warmup):
    assert importance_weight(0, warmup) == pytest.approx(0.10)
    assert keep_ratio(0, warmup) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("step", "lam", "keep"),
    [(0, 0.99, 0.95), (1, 0.9455, 0.94), (10, 0.545, 0.85), (20, 0.1, 0.75), (21, 0.1, 0.75)],
)
def test_the_published_constants(step, lam, keep):
    assert importance_weight(step, 20) == pytest.approx(lam)
    assert keep_ratio(step, 20) == pytest.approx(keep)


@pytest.mark.parametrize(
    ("tokens", "start", "end"), [(100, 0.2, 0.05), (100, 1.0, 0.45), (225, 1.0, 0.44)]
)
def test_no_step_hides_more_patches_than_the_lower_ratio_says(tokens, start, end):
    """Whole numbers of patches: an error of rounding would be one of them, which nothing would
    repaint."""
    kept = [int(tokens * keep_ratio(step, 7, start, end)) for step in range(9)]
    assert min(kept) == int(tokens * end)


def test_one_hot_pressure_builds_up_late():
    assert [one_hot_weight(step, 4, 8, 0.2) for step in (0, 3, 4, 6, 8, 50)] == pytest.approx(
        [0, 0, 0, 0.1, 0.2, 0.2]
    )
    assert one_hot_weight(0, 0, 0, 0.5) == 0.5


@given(st.integers(1, 50), st.integers(0, 100))
def test_retirement_comes_every_few_steps_once_begun(every, begin):
    steps = [step for step in range(1, 301) if is_retirement_step(step, every, begin)]
    assert steps == [step for step in range(every, 301, every) if step > begin]
