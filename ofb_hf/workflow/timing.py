"""Time the forward pass of a model: each of its parts, or the whole of it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.forward_parts import part_ends
from ..families.registry import describe

CALLS = 50  # of an empty module, to see what marks cost
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SECONDS_PER_TURN, RUNS_PER_TURN = 0.03, 20


class Timeline:
    """The times of the parts of a classifier's forward pass, by marks between them.

    Args:
        model: classifier of ours, on the device to measure.
        clock: seconds, on a CPU.
    """

    def __init__(self, model: PreTrainedModel, clock: Callable[[], float] = time.perf_counter):
        self.model, self.clock, self._marks = model, clock, []
        self._is_cuda = model.device.type == "cuda"
        self._cost = 0.0 if self._is_cuda else _cost_of_a_hook(clock)
        # The last part ends with the pass.
        for end in part_ends(describe(model.config)):
            module = model.get_submodule(end.module)
            if end.is_entered:
                module.register_forward_pre_hook(self._marker(end.part))
            else:
                module.register_forward_hook(self._marker(end.part))

    def _marker(self, name: str) -> Callable[..., None]:
        return lambda *_: self._mark(name)

    def _mark(self, name: str) -> None:
        if self._is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = self.clock()
        self._marks.append((name, now))

    def __call__(self, pixel_values: Tensor) -> dict[str, float]:
        """One forward pass with images (B, C, H, W) -> part -> milliseconds. Together they are all
        of it."""
        self._marks.clear()
        self._mark("")
        self.model(pixel_values=pixel_values)
        self._mark("head")
        if self._is_cuda:
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return {
            name: a.elapsed_time(b) if self._is_cuda else 1e3 * (b - a) - self._cost
            for (_, a), (name, b) in pairs
        }


def _cost_of_a_hook(clock: Callable[[], float]) -> float:
    """Milliseconds that a mark adds to a forward pass: nothing beside a large network, some percent
    of a tiny one."""
    plain, marked = nn.Identity(), nn.Identity()
    marked.register_forward_hook(lambda *_: clock())

    def seconds(module: nn.Module) -> float:
        began = clock()
        for _ in range(CALLS):
            module(None)
        return clock() - began

    return (
        1e3
        / CALLS
        * max(0.0, statistics.median(seconds(marked) - seconds(plain) for _ in range(CALLS)))
    )


def turn(run: Callable[[], Any]) -> list[Any]:
    """What a few runs in a row return; the first one, with another network's weights in the caches,
    is left out."""
    run()
    began, samples = time.perf_counter(), []
    while len(samples) < 2 or (
        time.perf_counter() - began < SECONDS_PER_TURN and len(samples) < RUNS_PER_TURN
    ):
        samples.append(run())
    return samples


def whole_pass(model: nn.Module, images: Tensor, clock: Callable[[], float]) -> float:
    """Milliseconds of one forward pass."""
    began = clock()
    model(pixel_values=images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - began)
