"""Callbacks: what happens around an optimizer step, and what is written down about it."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce, set_seed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import ASIDE

if TYPE_CHECKING:
    from ..search.trainer import OFBTrainer
    from .averaging import WeightAverage

HISTORY_FILE = "search_history.jsonl"
HISTORY_FIELDS = [
    "step",
    "phase",
    "loss",
    "task",
    "one_hot",
    "flops",
    "pmim",
    "importance",
    "lam",
    "keep_ratio",
    "expected_macs",
    "macs",
    "params",
    "active_candidates",
]


class SearchCallback(TrainerCallback):
    """Moves the search on: schedules before a step; multiplier, retirement, shrinking and settlement after it."""

    def __init__(self, trainer: "OFBTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Looks at where the supernet stands; a checkpoint has been loaded by now."""
        self.trainer.begin_search()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Sets lambda, keep ratio, budget and one-hot weight for this step."""
        self.trainer.begin_search_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Decides and cuts. Gradients are gone here, and a checkpoint of this step includes the cut."""
        self.trainer.end_search_step()


class AverageCallback(TrainerCallback):
    """Updates the weight average after every step and puts it into the model at the end."""

    def __init__(self, average: "WeightAverage"):
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Follows the weights."""
        self.average.update(kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """The average is the result."""
        self.average.copy_to_(kwargs["model"])


class EpochCallback(TrainerCallback):
    """Tells a data set that wants to know which epoch begins, on every process and before workers copy it."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Passes the number of the epoch on, also in the middle of a resumed one."""
        self.dataset.set_epoch(int(state.epoch + 1e-6))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Lets a stream judge and report what it could not read."""
        if hasattr(self.dataset, "end_epoch"):
            self.dataset.end_epoch(lambda counts: reduce(counts.to(args.device), "sum"))


class RandomStreamsCallback(TrainerCallback):
    """Gives every rank random streams of its own.

    Args:
        generators: seeded from seed, step and rank before every step: a resumed run draws what it would have drawn.
    """

    def __init__(self, *generators: torch.Generator):
        self.generators, self._seed_afterwards = generators, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Seeds dropout and drop path with the rank; a resumed run then restores each rank's own saved state.

        Not earlier: the order of the data is drawn from the seed that all ranks share.
        """
        if args.world_size > 1:
            self._seed_afterwards = int(torch.randint(2**31, ()))
            set_seed(args.seed, device_specific=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Gives all ranks one random stream again: a second training draws the order of its data from it."""
        if args.world_size > 1:
            set_seed(self._seed_afterwards)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Seeds the generators for the step about to run."""
        for generator in self.generators:
            generator.manual_seed((args.seed * 1_000_003 + state.global_step) * 4096 + args.process_index)


class HistoryCallback(TrainerCallback):
    """Writes one JSON object per logging step.

    Args:
        path: the file, usually `search_history.jsonl`.
        phase: goes into every row: `dense`, `search` or `finetune`.
    """

    def __init__(self, path: str | Path, phase: str):
        self.path, self.phase = Path(path), phase

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Drops rows that a resumed run is about to write again, and all rows of this phase when it starts over."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_history(self.path) if self.path.exists() else []
            kept = [row for row in rows if row["phase"] != self.phase or row["step"] <= state.global_step]
            aside = self.path.with_name(f"{ASIDE}-{self.path.name}")
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(aside, self.path)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Asks for a log after the last step: the end of every run is on record, however short it is."""
        control.should_log |= state.global_step >= state.max_steps
        return control

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Appends a row, once per logging step."""
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        row = {"step": state.global_step, "phase": self.phase}
        row |= {name: logs.get(name) for name in HISTORY_FIELDS if name not in row}
        # Predicted, with a latency table.
        row |= {name: logs[name] for name in ("latency_ms", "expected_latency_ms") if name in logs}
        # Names, which loggers of numbers could not take: straight from the network as it is, and only if there are any.
        architecture = getattr(kwargs.get("model"), "architecture", None)
        if architecture is not None and architecture.left_out:
            row["left_out"] = architecture.left_out
        if schedule := getattr(getattr(kwargs.get("model"), "config", None), "token_schedule", None):
            row["tokens"] = [merged for _, merged in schedule]  # that leave each layer
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def left_out_at(history: list[dict[str, Any]]) -> dict[str, int]:
    """The attentions and MLPs that a search left out -> the step by which they were gone, as far as it was logged."""
    steps: dict[str, int] = {}
    for row in history:
        for name in row.get("left_out") or ():
            steps.setdefault(name, row["step"])
    return steps


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a history file; a last line that a kill left incomplete is dropped."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
