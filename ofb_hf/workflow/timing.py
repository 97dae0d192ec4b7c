"""Time the forward pass of a model: each of its parts, or the whole of it."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.forward_parts import part_ends
from ..families.registry import describe

Clock = Callable[[], float]  # seconds

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
CALLS = 50  # of an empty module, to see what marks cost
# A network keeps its turn this long, or for this many passes if it is faster than that: then the
# others are measured in nearly the same state of the machine.
SECONDS_PER_TURN = 0.03
RUNS_PER_TURN = 20


class Timeline:
    """Time the forward parts of a classifier, by marks that hooks leave where parts end.

    Args:
        model: a classifier of this package, on the device to measure.
        clock: measures time on a CPU; a GPU has its own events.
    """

    def __init__(self, model: PreTrainedModel, clock: Clock = time.perf_counter):
        self.model = model
        self.clock = clock
        # (name of the part that ends here, time): seconds on a CPU, an event on a GPU
        self._marks: list[tuple[str, Any]] = []
        self._is_cuda = model.device.type == "cuda"
        # events of a GPU are recorded in its own stream, where hooks cost nothing
        self._cost = 0.0 if self._is_cuda else _cost_of_a_hook(clock)
        # without the last part, which ends with the pass
        for end in part_ends(describe(model.config)):
            module = model.get_submodule(end.module)
            if end.is_entered:
                module.register_forward_pre_hook(self._marker(end.part))
            else:
                module.register_forward_hook(self._marker(end.part))

    def _marker(self, name: str) -> Callable[..., None]:
        """Return a hook that marks the end of a part."""
        return lambda *_: self._mark(name)

    def _mark(self, name: str) -> None:
        """Note that a part ends now."""
        if self._is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = self.clock()
        self._marks.append((name, now))

    def __call__(self, pixel_values: Tensor) -> dict[str, float]:
        """Run one forward pass.

        Args:
            pixel_values: images (B, C, H, W).

        Returns:
            Part -> milliseconds; together they are the whole pass.
        """
        self._marks.clear()
        self._mark("")  # no part ends here, the first one begins
        self.model(pixel_values=pixel_values)
        self._mark("head")
        if self._is_cuda:
            torch.cuda.synchronize()
        times = {}
        for (_, begin), (name, end) in pairwise(self._marks):
            if self._is_cuda:
                times[name] = begin.elapsed_time(end)
            else:
                times[name] = 1e3 * (end - begin) - self._cost
        return times


def _cost_of_a_hook(clock: Clock) -> float:
    """Return the milliseconds that a mark adds to a forward pass.

    It is nothing compared with a large network, and some percent of a tiny one.
    """
    plain = nn.Identity()
    marked = nn.Identity()
    marked.register_forward_hook(lambda *_: clock())

    def seconds(module: nn.Module) -> float:
        began = clock()
        for _ in range(CALLS):
            module(None)
        return clock() - began

    differences = [seconds(marked) - seconds(plain) for _ in range(CALLS)]
    # on a busy machine the difference may even be negative
    seconds_per_call = max(0.0, statistics.median(differences)) / CALLS
    return 1e3 * seconds_per_call


def turn(run: Callable[[], Any]) -> list[Any]:
    """Return the results of a few runs in a row.

    The first run is not among them: it finds the weights of another network in the caches.
    """
    run()
    samples: list[Any] = []
    began = time.perf_counter()
    while len(samples) < RUNS_PER_TURN:
        # two samples at least, however slow the network is
        if len(samples) >= 2 and time.perf_counter() - began >= SECONDS_PER_TURN:
            break
        samples.append(run())
    return samples


def whole_pass(model: nn.Module, images: Tensor, clock: Clock) -> float:
    """Return the milliseconds of one forward pass with images (B, C, H, W)."""
    began = clock()
    model(pixel_values=images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - began)
