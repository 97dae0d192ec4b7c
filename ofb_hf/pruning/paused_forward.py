"""Forward passes that wait at given modules, so that several of them move on module by module.

A layer can be fitted on many images only when the layers before it are final, and each layer only
needs sums over the images. So the forward pass of every batch stops where a block is called, hands
over the arguments of the call, and goes on with the result that it is given. What is in memory
is what the waiting calls hold: the residual streams.

A pass runs in a thread, as a generator would, if a forward pass could `yield`. Only one thread ever
runs, so the result does not depend on timing.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """A call of a module that a forward pass waits in.

    Args:
        path: of the module.
        args, kwargs: of the call.
    """

    path: str
    args: tuple
    kwargs: dict[str, Any]


class _Cancelled(BaseException):
    """End the thread of a pass that is given up."""


class PausedForward:
    """One forward pass that moves on from one call to the next.

    Args:
        run: makes the pass, of a model whose modules wait (`waiting_at`).
    """

    def __init__(self, run: Callable[[], Any]):
        self._run = run
        self._go = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._call: Call | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, result: Any = None) -> Call | None:
        """Go on to the next call.

        Args:
            result: what the call that the pass waits in returns; nothing at the beginning.

        Returns:
            The next call; None when the pass is over.

        Raises:
            Exception: what the pass raised.
        """
        self._call, self._result = None, result
        del result
        self._go.release()
        self._arrived.acquire()
        if self._error is not None:
            raise self._error
        return self._call

    def cancel(self) -> None:
        """Let go of a pass that waits."""
        self._is_cancelled = True
        self._go.release()
        self._thread.join()

    def wait_in(self, call: Call) -> Any:
        """Wait in a call and return what it is answered with; from within the pass."""
        self._call = call
        # The waiting frame must not keep what only the caller of `send` needs.
        del call
        self._arrived.release()
        self._go.acquire()
        if self._is_cancelled:
            raise _Cancelled
        result, self._result = self._result, None
        return result

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
        self._call = None
        self._arrived.release()


_running = threading.local()


@contextmanager
def waiting_at(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Let passes wait where these modules of a model are called, for the time of a block.

    Calls outside of a `PausedForward` compute as ever.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    for path, module in modules.items():
        module.forward = partial(_wait_or_compute, module.forward, path)
    try:
        yield
    finally:
        for module in modules.values():
            # The instance's attribute goes, the method of its class is seen again.
            del module.forward


def _wait_or_compute(compute: Callable, path: str, *args: Any, **kwargs: Any) -> Any:
    forward = getattr(_running, "forward", None)
    if forward is None:
        return compute(*args, **kwargs)
    return forward.wait_in(Call(path, args, kwargs))
