"""SIGTERM and Ctrl-C: finish the step, save a checkpoint, leave with a message."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import reduce
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ranks see a signal at different moments and have to agree on the step to stop at. Agreeing waits
# for the device, so on accelerators it is done every few steps only.
AGREE_EVERY_ON_ACCELERATORS = 10
# the same signal may arrive twice within this time, directly and through a launcher
PASSED_ON_SECONDS = 1.0


class TrainingInterrupted(SystemExit):
    """Training was asked to stop and saved a checkpoint first. Its exit status is the shell's, 128
    + signal.

    Args:
        number: the signal.
        message: what happened and how to go on.
    """

    def __init__(self, number: signal.Signals, message: str):
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interruption(TrainerCallback):
    """Turns SIGTERM and SIGINT into an orderly end of training, on all ranks at the same step.

    A context manager around the training, and a callback in it; the Trainer saves the checkpoint. A
    second Ctrl-C stops at once, unless it comes right after the first: launchers pass on what has
    been sent to all processes already. Further SIGTERMs are ignored for the same reason.

    Attributes:
        stopped_by: the signal after which training ended, None if it ended by itself.
    """

    def __init__(self):
        self.stopped_by: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.stopped_by = self._received = None
        # Python delivers signals nowhere else
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._received is not None and self.stopped_by is None and error[0] is None:
            # it came after the last moment at which training could react
            signal.raise_signal(self._received)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > PASSED_ON_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)

    def is_asked_for(self, args: TrainingArguments) -> bool:
        """Whether any rank has received a signal. All ranks have to call it together."""
        asked = int(self._received is not None)
        if args.world_size > 1:
            asked = int(reduce(torch.tensor([asked], device=args.device), "sum"))
        if asked:
            self.stopped_by = self._received or signal.SIGTERM
        return bool(asked)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Ends training once any rank has received a signal."""
        every = (
            AGREE_EVERY_ON_ACCELERATORS if args.world_size > 1 and args.device.type != "cpu" else 1
        )
        if state.global_step % every == 0 or state.global_step >= state.max_steps:
            control.should_training_stop |= self.is_asked_for(args)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Does nothing of what belongs to the end of an epoch where training was stopped in the
        middle of one."""
        if self.stopped_by is not None and state.epoch % 1 and state.global_step < state.max_steps:
            control.should_evaluate = control.should_save = control.should_log = False
        return control


def shield_workers(loader: DataLoader) -> DataLoader:
    """Makes the worker processes of a loader outlive signals that are meant for the training.

    Clusters send SIGTERM to all processes of a job, terminals send Ctrl-C to a whole group. A
    worker that dies of it takes the training along before a checkpoint is written.
    """
    # accelerate's loaders start the workers of another one inside.
    for each in (loader, getattr(loader, "base_dataloader", None)):
        init = getattr(each, "worker_init_fn", None)
        if each is not None and not (isinstance(init, partial) and init.func is _init_worker):
            each.worker_init_fn = partial(_init_worker, init)
    return loader


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # nowhere else can be known who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_parent_only, daemon=True).start()
    if init is not None:
        init(worker)


def _obey_the_parent_only() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
