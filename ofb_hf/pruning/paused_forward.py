"""Forward passes that wait at given layers, so that several of them move on layer by layer.

A layer can be fitted on many images only when the layers before it are final, and each layer only
needs sums over the images. So the forward pass of every batch stops in front of the layer, gives
its part of the sums, and goes on when the layer has its new weights. No activation is computed
twice, and what is in memory is what the waiting passes hold: the residual streams.

A pass runs in a thread, as a generator would, if a forward pass could `yield`. Only one thread ever
runs, so the result does not depend on timing.
"""

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class _Cancelled(BaseException):
    """End the thread of a pass that is given up."""


class PausedForward:
    """One forward pass that `advance` moves from one stop to the next.

    Args:
        run: makes the pass.
    """

    def __init__(self, run: Callable[[], Any]):
        self._run = run
        self._go = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._stop: tuple[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def advance(self) -> tuple[str, Tensor] | None:
        """Go on to the next stop.

        Returns:
            Its layer's path and what the stop saw there; None when the pass is over.

        Raises:
            Exception: what the pass raised.
        """
        self._stop = None
        self._go.release()
        self._arrived.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def cancel(self) -> None:
        """Let go of a pass that waits."""
        self._is_cancelled = True
        self._go.release()
        self._thread.join()

    def wait_at(self, path: str, seen: Tensor) -> None:
        """Stop here until `advance` is called; from within the pass."""
        self._stop = path, seen
        # The waiting frame must not keep what only the caller of `advance` needs.
        del seen
        self._arrived.release()
        self._go.acquire()
        if self._is_cancelled:
            raise _Cancelled

    def _work(self) -> None:
        self._go.acquire()
        _running.forward = self
        try:
            if not self._is_cancelled:
                with torch.no_grad():
                    self._run()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self._stop = None
        self._arrived.release()


_running = threading.local()


class Stops:
    """Layers of a model at which forward passes wait; a context manager.

    Args:
        model: the model.
        paths: of the layers.
        before: whether to stop before a layer, with its input, or behind it, with its output.
    """

    def __init__(self, model: nn.Module, paths: list[str], before: bool):
        self.model = model
        self.paths = paths
        self.before = before
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Stops":
        for path in self.paths:
            layer = self.model.get_submodule(path)
            if self.before:
                handle = layer.register_forward_pre_hook(partial(_stop_before, path=path))
            else:
                handle = layer.register_forward_hook(partial(_stop_behind, path=path))
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()


def _stop_before(layer: nn.Module, args: tuple, path: str) -> None:
    _running.forward.wait_at(path, args[0])


def _stop_behind(layer: nn.Module, args: tuple, output: Tensor, path: str) -> None:
    _running.forward.wait_at(path, output)
