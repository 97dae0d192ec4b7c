"""The phases of a search: where a step lies, what holds there, what happens after it.

All of it follows from the number of the step, and is tested without any trainer.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofb_hf import SwinBiMaskConfig, ViTBiMaskConfig
from ofb_hf.search.phases import (
    OBSERVED_IMAGES,
    Phase,
    Phases,
    importance_weight,
    is_retirement_step,
    keep_ratio,
    one_hot_weight,
    ramp,
    settling_step,
)

STEPS = st.floats(-10, 1000)
VALUES = st.floats(0, 1)
OBSERVE, DECIDE, RECOVER = Phase.OBSERVE, Phase.DECIDE, Phase.RECOVER


def phases(total, images_per_step=1, preset="bi_mask", **fields):
    """The phases of a preset's search, with other values for some fields."""
    config = ViTBiMaskConfig(**{"preset": preset} | fields)
    return Phases.of(config, total, images_per_step)


def steps_with(laid_out, event):
    """After how many complete steps something happens."""
    every = range(laid_out.total_steps)
    return [step + 1 for step in every if getattr(laid_out.at(step), event)]


# ---------------------------------------------------------------------------------- pure functions


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
    weights = [one_hot_weight(step, 4, 8, 0.2) for step in (0, 3, 4, 6, 8, 50)]
    assert weights == pytest.approx([0, 0, 0, 0.1, 0.2, 0.2])
    assert one_hot_weight(0, 0, 0, 0.5) == 0.5


@given(st.integers(1, 50), st.integers(0, 100))
def test_retirement_comes_every_few_steps_once_begun(every, begin):
    steps = [step for step in range(1, 301) if is_retirement_step(step, every, begin)]
    assert steps == [step for step in range(every, 301, every) if step > begin]


@given(VALUES, st.integers(1, 1000))
def test_the_choice_falls_into_the_search(fraction, total):
    assert (fraction > 0) <= settling_step(fraction, total) <= total
    assert settling_step(1.0, total) == total
    assert settling_step(0.0, total) == 0


# ------------------------------------------------------------------------------------ both presets


def test_the_phases_of_the_bi_mask_preset():
    """In 1,000 steps: observed until 5 %, decided until 15 %."""
    laid_out = phases(1000)
    assert (laid_out.observed_steps, laid_out.settled_after) == (50, 150)
    assert laid_out.learning_steps == 950
    found = [laid_out.at(step).phase for step in range(1000)]
    assert found == [OBSERVE] * 50 + [DECIDE] * 100 + [RECOVER] * 850
    assert steps_with(laid_out, "hands_over") == [50]
    assert steps_with(laid_out, "retires") == [75, 100, 125]
    assert steps_with(laid_out, "settles") == [150]
    assert steps_with(laid_out, "shrinks") == [75, 100, 125, 150, 1000]
    assert steps_with(laid_out, "folds") == [150, 1000]
    hiding = [step for step in range(1000) if laid_out.at(step).hides_patches]
    assert hiding == [*range(50, 150)]


def test_the_values_of_the_bi_mask_preset():
    laid_out = phases(1000)
    lam = {0: 0.99, 49: 0.99, 50: 0.99, 80: 0.545, 110: 0.1, 999: 0.1}
    assert {step: laid_out.at(step).lam for step in lam} == pytest.approx(lam)
    # It follows the number of the step from the start, and is 1 where nothing is hidden.
    keep = {0: 1.0, 49: 1.0, 50: 0.95 - 0.2 * 50 / 60, 60: 0.75, 149: 0.75, 150: 1.0, 999: 1.0}
    assert {step: laid_out.at(step).keep_ratio for step in keep} == pytest.approx(keep)
    weights = {0: 0.0, 79: 0.0, 80: 0.0, 100: 0.1, 120: 0.2, 999: 0.2}
    assert {step: laid_out.at(step).one_hot_weight for step in weights} == pytest.approx(weights)


def test_every_step_of_the_default_preset_trains_what_was_chosen():
    for total in (1, 3, 1000):
        laid_out = phases(total, preset="default")
        assert (laid_out.observed_steps, laid_out.settled_after) == (0, 0)
        assert laid_out.learning_steps == total
        steps = [laid_out.at(step) for step in range(total)]
        assert {step.phase for step in steps} == {RECOVER}
        assert not any(step.hands_over or step.retires or step.settles for step in steps)
        assert not any(step.hides_patches for step in steps)


def test_the_phases_of_the_published_preset():
    """Nothing is observed, and the choice falls after the last step."""
    laid_out = phases(1000, preset="paper")
    assert (laid_out.observed_steps, laid_out.settled_after) == (0, 1000)
    assert laid_out.learning_steps == 1000
    assert {laid_out.at(step).phase for step in range(1000)} == {DECIDE}
    assert steps_with(laid_out, "hands_over") == []
    assert steps_with(laid_out, "retires") == [*range(25, 1000, 25)]
    assert steps_with(laid_out, "settles") == steps_with(laid_out, "folds") == [1000]
    assert steps_with(laid_out, "shrinks") == [*range(25, 1001, 25)]
    assert all(laid_out.at(step).hides_patches for step in range(1000))
    assert [laid_out.at(step).lam for step in (0, 100, 200, 999)] == pytest.approx(
        [0.99, 0.545, 0.1, 0.1]
    )
    assert [laid_out.at(step).keep_ratio for step in (0, 100, 200, 999)] == pytest.approx(
        [0.95, 0.85, 0.75, 0.75]
    )
    assert {laid_out.at(step).one_hot_weight for step in range(1000)} == {0.5}


def test_the_published_preset_with_an_observation():
    laid_out = phases(100, preset="paper", importance_hold=0.1)
    found = [laid_out.at(step).phase for step in range(100)]
    assert found == [OBSERVE] * 10 + [DECIDE] * 90
    assert not any(laid_out.at(step).hides_patches for step in range(10))
    assert all(laid_out.at(step).hides_patches for step in range(10, 100))
    assert laid_out.at(10).lam == 0.99
    assert steps_with(laid_out, "hands_over") == [10]


# ---------------------------------------------------------------------------------- short searches

# (preset, steps) -> for each step its phase and what happens after it.
SHORT = {
    ("bi_mask", 1): [(OBSERVE, "hands_over settles shrinks folds")],
    ("bi_mask", 2): [
        (OBSERVE, "hands_over settles shrinks folds"),
        (RECOVER, "shrinks folds"),
    ],
    ("bi_mask", 3): [
        (OBSERVE, "hands_over settles shrinks folds"),
        (RECOVER, ""),
        (RECOVER, "shrinks folds"),
    ],
    ("paper", 1): [(DECIDE, "settles shrinks folds")],
    ("paper", 2): [(DECIDE, "retires shrinks"), (DECIDE, "settles shrinks folds")],
    ("paper", 3): [
        (DECIDE, "retires shrinks"),
        (DECIDE, "retires shrinks"),
        (DECIDE, "settles shrinks folds"),
    ],
}
EVENTS = ("hands_over", "retires", "settles", "shrinks", "folds")


@pytest.mark.parametrize(("preset", "total"), SHORT)
def test_a_search_of_few_steps_has_all_events(preset, total):
    laid_out = phases(total, preset=preset)
    found = []
    for step in range(total):
        at = laid_out.at(step)
        found.append((at.phase, " ".join(event for event in EVENTS if getattr(at, event))))
    assert found == SHORT[preset, total]


def test_a_search_of_few_steps_that_gives_each_phase_one():
    laid_out = phases(3, importance_hold=0.34, settle_at=0.67, retire_begin=0.0)
    assert [laid_out.at(step).phase for step in range(3)] == [OBSERVE, DECIDE, RECOVER]
    assert steps_with(laid_out, "hands_over") == steps_with(laid_out, "retires") == [1]
    assert steps_with(laid_out, "settles") == [2]


# -------------------------------------------------------------------------------- what bounds what


@pytest.mark.parametrize(
    ("images_per_step", "observed"), [(1, 500), (4, 500), (8, 256), (1024, 2), (4096, 1)]
)
def test_no_more_images_are_observed_than_help(images_per_step, observed):
    laid_out = phases(10_000, images_per_step)
    assert laid_out.observed_steps == observed
    assert observed == 500 or (observed - 1) * images_per_step < OBSERVED_IMAGES


def test_an_observation_takes_at_least_a_step_and_ends_before_the_choice():
    assert phases(1000, importance_hold=1e-6).observed_steps == 1
    # 0.15 of 3 steps is rounded to none, and the choice falls after the first all the same.
    assert phases(3, importance_hold=0.15, settle_at=0.15).observed_steps == 1
    assert phases(100, importance_hold=0.15, settle_at=0.15).observed_steps == 15


def test_without_decoder_nothing_is_hidden():
    laid_out = phases(100, pmim=False)
    assert not any(laid_out.at(step).hides_patches for step in range(100))
    assert {laid_out.at(step).keep_ratio for step in range(100)} == {1.0}


def test_patches_may_be_hidden_until_the_end():
    laid_out = phases(100, pmim_until_settled=False)
    hiding = [step for step in range(100) if laid_out.at(step).hides_patches]
    assert hiding == [*range(5, 100)]


def test_a_network_that_is_cut_at_the_end_shrinks_and_folds_there_only():
    laid_out = phases(1000, prune_during_search=False)
    assert steps_with(laid_out, "retires") == [75, 100, 125]
    assert steps_with(laid_out, "settles") == [150]
    assert steps_with(laid_out, "shrinks") == steps_with(laid_out, "folds") == [1000]


CONFIGS = st.builds(
    lambda preset, fields, swin: (SwinBiMaskConfig if swin else ViTBiMaskConfig)(
        **{"preset": "paper" if preset else "bi_mask"} | fields
    ),
    st.booleans(),
    st.fixed_dictionaries(
        {},
        optional={
            "importance_hold": st.sampled_from([0.01, 0.1, 0.15]),
            "warmup": VALUES,
            "retire_begin": st.sampled_from([0.0, 0.05, 0.1]),
            "settle_at": st.sampled_from([0.15, 0.2, 0.9, 1.0]),
            "prune_during_search": st.booleans(),
            "pmim_until_settled": st.booleans(),
        },
    ),
    st.booleans(),
)


@given(CONFIGS, st.integers(1, 60), st.integers(1, 3000))
def test_every_search_hands_over_settles_and_folds_in_this_order(config, total, images_per_step):
    laid_out = Phases.of(config, total, images_per_step)
    assert 0 <= laid_out.observed_steps <= laid_out.settled_after <= total
    every = [laid_out.at(step) for step in range(total)]
    order = [OBSERVE, DECIDE, RECOVER]
    ranks = [order.index(step.phase) for step in every]
    assert ranks == sorted(ranks)
    observes = config.importance_hold > 0
    assert steps_with(laid_out, "hands_over") == ([laid_out.observed_steps] if observes else [])
    assert steps_with(laid_out, "settles") == [laid_out.settled_after]
    assert steps_with(laid_out, "folds")[-1:] == steps_with(laid_out, "shrinks")[-1:] == [total]
    for number, step in enumerate(every):
        assert step.observes == (number < laid_out.observed_steps)
        assert not (step.retires and step.settles)
        assert not (step.folds and not step.shrinks)
        assert not (step.hides_patches and step.observes)
        assert step.hides_patches or step.keep_ratio == 1.0
        assert not step.retires or number + 1 < laid_out.settled_after
    # Lambda never rises, and stands at its start while importance is observed.
    lams = [step.lam for step in every]
    assert lams == sorted(lams, reverse=True)
    if config.warmup * total > 0:
        assert set(lams[: laid_out.observed_steps]) <= {config.importance_start}


def test_what_holds_in_a_step_does_not_depend_on_the_steps_before():
    """That is what makes a resumed run equal to an uninterrupted one."""
    laid_out = phases(40)
    forwards = [laid_out.at(step) for step in range(40)]
    backwards = [phases(40).at(step) for step in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert replace(laid_out) == phases(40)
