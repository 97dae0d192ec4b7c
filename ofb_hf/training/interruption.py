"""SIGTERM and Ctrl-C: finish the step, save a checkpoint, exit with a message."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import reduce
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ranks see a signal at different moments and have to agree on the step to stop at. Agreeing waits
# for the device, so on accelerators it is done every tenth step only.
AGREE_EVERY_ON_ACCELERATORS = 10
# Within this time the same signal may arrive twice: directly, and again through a launcher.
PASSED_ON_SECONDS = 1.0


class TrainingInterrupted(SystemExit):
    """Report that training was asked to stop, and saved a checkpoint first.

    The exit status is the one that shells use: 128 + the number of the signal.

    Args:
        number: the signal.
        message: what happened and how to continue.
    """

    def __init__(self, number: signal.Signals, message: str):
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Leave a block at SIGTERM by `TrainingInterrupted`, outside of a training.

    Ctrl-C does so by itself. A training in the block handles both in its own way.
    """
    # Python delivers signals to the main thread, and allows handlers to be set there only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, frame: Any) -> None:
    # Launchers pass on signals that all processes have received already.
    signal.signal(number, signal.SIG_IGN)
    name = signal.Signals(number)
    raise TrainingInterrupted(
        name,
        f"stopped by {name.name} between two phases of training, of which the finished ones are "
        "kept. Continue with --resume_from_checkpoint auto.",
    )


class Interruption(TrainerCallback):
    """Turn SIGTERM and SIGINT into an orderly end of training, on all ranks at the same step.

    It is a context manager around the training, and a callback in it; the Trainer saves the
    checkpoint. A second Ctrl-C stops the process at once, unless it follows the first within a
    second: launchers pass on signals that all processes have received already. Further SIGTERMs are
    ignored for the same reason.

    Attributes:
        stopped_by: the signal after which training ended, None if it ended by itself.
    """

    def __init__(self):
        self.stopped_by: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.stopped_by = None
        self._received = None
        # Python delivers signals to the main thread, and allows handlers to be set there only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        came_too_late = self._received is not None and self.stopped_by is None
        if came_too_late and error[0] is None:
            # After the last step that could react to it: let it do what it does without us.
            signal.raise_signal(self._received)

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = signal.Signals(number)
            self._received_at = now
        elif number == signal.SIGINT and now - self._received_at > PASSED_ON_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)

    def is_asked_for(self, args: TrainingArguments) -> bool:
        """Return whether any rank has received a signal; all ranks have to call it together."""
        asked = self._received is not None
        if args.world_size > 1:
            count = torch.tensor([int(asked)], device=args.device)
            asked = int(reduce(count, "sum")) > 0
        if asked:
            # The signal of a rank that has not received one itself is not known to it.
            self.stopped_by = self._received or signal.SIGTERM
        return asked

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """End training once any rank has received a signal."""
        must_agree = args.world_size > 1 and args.device.type != "cpu"
        every = AGREE_EVERY_ON_ACCELERATORS if must_agree else 1
        if state.global_step % every == 0 or state.global_step >= state.max_steps:
            control.should_training_stop |= self.is_asked_for(args)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Suppress what belongs to the end of an epoch if training was stopped in its middle."""
        is_last_step = state.global_step >= state.max_steps
        if self.stopped_by is not None and state.epoch % 1 and not is_last_step:
            control.should_evaluate = False
            control.should_save = False
            control.should_log = False
        return control


def shield_workers(loader: DataLoader) -> DataLoader:
    """Make the worker processes of a loader survive signals that are meant for the training.

    Clusters send SIGTERM to all processes of a job, terminals send Ctrl-C to a whole process group.
    If a worker died of it, the training would fail before it has written a checkpoint.
    """
    # accelerate's loaders contain another loader, which starts the workers.
    for each in (loader, getattr(loader, "base_dataloader", None)):
        if each is None:
            continue
        init = getattr(each, "worker_init_fn", None)
        is_shielded = isinstance(init, partial) and init.func is _init_worker
        if not is_shielded:
            each.worker_init_fn = partial(_init_worker, init)
    return loader


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only sigwaitinfo tells who sent a signal; macOS and Windows do not have it.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_parent_only, daemon=True).start()
    if init is not None:
        init(worker)


def _obey_the_parent_only() -> None:
    # The loader ends its workers by SIGTERM, too, and that one has to work.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
