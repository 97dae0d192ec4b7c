"""Forward passes that wait at layers: in order, with their errors, and without leftovers."""

import copy
import threading

import pytest
import torch
from torch import nn

from ofb_hf.pruning.paused_forward import PausedForward, Stops


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5), nn.Linear(5, 2))


def test_passes_stop_in_turn_and_see_what_a_plain_pass_sees():
    model, batches = network(), torch.randn(6, 3).split(2)
    results, plain = {}, copy.deepcopy(model)
    threads = threading.active_count()

    def run(number):
        results[number] = model(batches[number])

    with Stops(model, ["2", "3"], before=True):
        forwards = [PausedForward(lambda number=number: run(number)) for number in range(3)]
        for path, layers in (("2", 2), ("3", 3)):
            for forward, images in zip(forwards, batches, strict=True):
                stopped, seen = forward.advance()
                assert stopped == path
                # Outside the passes there are no hooks: a plain pass up to the layer.
                wanted = images
                for layer in plain[:layers]:
                    wanted = layer(wanted)
                torch.testing.assert_close(seen, wanted, rtol=0, atol=0)
        for forward in forwards:
            assert forward.advance() is None
    for number, images in enumerate(batches):
        torch.testing.assert_close(results[number], model(images), rtol=0, atol=0)
        assert not results[number].requires_grad
    assert threading.active_count() == threads


def test_a_change_between_stops_counts():
    model, images = network(), torch.randn(2, 3)
    with Stops(model, ["2"], before=False):
        forward = PausedForward(lambda: seen.append(model(images)))
        seen = []
        forward.advance()
        with torch.no_grad():
            model[3].weight.zero_()
        forward.advance()
    torch.testing.assert_close(seen[0], model[3].bias.expand(2, 2))


def test_errors_of_a_pass_are_raised_by_advance():
    model = network()
    with Stops(model, ["2"], before=True):
        forward = PausedForward(lambda: model(torch.randn(2, 7)))
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            forward.advance()


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_pass_ends_and_hooks_go(begun):
    model, threads = network(), threading.active_count()
    with Stops(model, ["2"], before=True):
        forward = PausedForward(lambda: model(torch.randn(2, 3)))
        if begun:
            forward.advance()
        forward.cancel()
    assert threading.active_count() == threads
    assert not model[2]._forward_pre_hooks
