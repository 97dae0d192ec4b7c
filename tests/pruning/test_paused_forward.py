"""Forward passes that wait in calls: in order, with their errors, and without leftovers."""

import threading

import pytest
import torch
from torch import nn

from ofb_hf.pruning.paused_forward import PausedForward, waiting_at


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5), nn.Linear(5, 2))


def test_passes_wait_in_turn_and_give_what_a_plain_pass_gives():
    model, batches = network(), torch.randn(6, 3).split(2)
    wanted = [model(images) for images in batches]
    results = {}
    threads = threading.active_count()

    def run(number):
        results[number] = model(batches[number])

    with waiting_at(model, ["2", "3"]):
        forwards = [PausedForward(lambda number=number: run(number)) for number in range(3)]
        answers = [None] * 3
        for path in ("2", "3"):
            for number, forward in enumerate(forwards):
                call = forward.send(answers[number])
                assert call.path == path
                # Outside the passes the module computes as ever.
                with torch.no_grad():
                    answers[number] = model.get_submodule(path)(*call.args, **call.kwargs)
        for number, forward in enumerate(forwards):
            assert forward.send(answers[number]) is None
    for number in range(3):
        torch.testing.assert_close(results[number], wanted[number], rtol=0, atol=0)
        assert not results[number].requires_grad
    assert threading.active_count() == threads


def test_a_pass_goes_on_with_what_it_is_given():
    model, seen = network(), []
    with waiting_at(model, ["2"]):
        forward = PausedForward(lambda: seen.append(model(torch.randn(2, 3))))
        forward.send()
        forward.send(torch.zeros(2, 5))
    torch.testing.assert_close(seen[0], model[3].bias.expand(2, 2))


def test_errors_of_a_pass_are_raised_by_send():
    model = network()
    with waiting_at(model, ["2"]):
        forward = PausedForward(lambda: model(torch.randn(2, 7)))
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            forward.send()


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_pass_ends_and_modules_are_as_before(begun):
    model, threads = network(), threading.active_count()
    with waiting_at(model, ["2"]):
        forward = PausedForward(lambda: model(torch.randn(2, 3)))
        if begun:
            forward.send()
        forward.cancel()
        assert "forward" in vars(model[2])
    assert threading.active_count() == threads
    assert "forward" not in vars(model[2])
