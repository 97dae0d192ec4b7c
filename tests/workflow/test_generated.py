"""Generated commands: those that cannot work are refused at once, odd ones give what `pipeline`
gives. More of both: `python tests/generated.py --help`."""

import generated
import pytest

from ofb_hf.training.resumable import ResumableTrainer

INVALID = 200
VALID = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint and images that are right."""
    return generated.write_place(tmp_path_factory.mktemp("generated"))


@pytest.mark.slow
def test_commands_that_cannot_work_are_refused_before_the_first_step(place, monkeypatch):
    def step(*args, **kwargs):
        pytest.fail("a step was made")

    monkeypatch.setattr(ResumableTrainer, "training_step", step)
    faults = {}
    for number, case in enumerate(generated.invalid_cases(0, INVALID, place)):
        if fault := generated.refusal_fault(case):
            faults[number, str(case)] = fault
    assert not faults


@pytest.mark.slow
def test_odd_images_and_checkpoints_give_what_the_pipeline_gives(tmp_path):
    faults = {}
    for number, case in enumerate(generated.valid_cases(0, VALID, tmp_path)):
        if found := generated.result_faults(case):
            faults[number, str(case)] = found
    assert not faults
