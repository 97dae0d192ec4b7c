"""SIGTERM and Ctrl-C: finish the step, save a checkpoint, leave with a message."""

import signal
import threading
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ranks see a signal at different moments and have to agree on the step to stop at. Agreeing waits for the device, so
# on accelerators it is done every few steps only.
AGREE_EVERY_ON_ACCELERATORS = 10


class TrainingInterrupted(SystemExit):
    """Training was asked to stop and saved a checkpoint first. Its exit status is the shell's, 128 + signal."""


class Interruption(TrainerCallback):
    """Turns SIGTERM and SIGINT into a checkpoint and an orderly end, on all ranks at the same step.

    A context manager around the training, and a callback in it. A second Ctrl-C stops at once; further SIGTERMs are
    ignored, as launchers pass on what the cluster has sent already.

    Attributes:
        stopped_by: the signal after which training ended, None if it ended by itself.
    """

    def __init__(self):
        self.stopped_by: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.stopped_by = self._received = None
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: Any) -> None:
        self._received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Asks for a checkpoint and the end of training once any rank has received a signal."""
        stop = int(self._received is not None)
        if args.world_size > 1:
            every = 1 if args.device.type == "cpu" else AGREE_EVERY_ON_ACCELERATORS
            if state.global_step % every:
                return control
            stop = int(reduce(torch.tensor([stop], device=args.device), "sum"))
        if stop and state.global_step < state.max_steps:
            self.stopped_by = self._received or signal.SIGTERM
            control.should_save = control.should_training_stop = True
        return control
