"""The history of a run: one JSON object per logging step, in a file that a resumed run
continues."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import ASIDE

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


class HistoryCallback(TrainerCallback):
    """Writes one JSON object per logging step.

    Args:
        path: the file, usually `search_history.jsonl`.
        phase: goes into every row: `dense`, `search` or `finetune`.
    """

    def __init__(self, path: str | Path, phase: str):
        self.path, self.phase = Path(path), phase

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Drops rows that a resumed run is about to write again, and all rows of this phase when it
        starts over."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_history(self.path) if self.path.exists() else []
            kept = [
                row
                for row in rows
                if row["phase"] != self.phase or row["step"] <= state.global_step
            ]
            aside = self.path.with_name(f"{ASIDE}-{self.path.name}")
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(aside, self.path)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Asks for a log after the last step: the end of every run is on record, however short it
        is."""
        control.should_log |= state.global_step >= state.max_steps
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Appends a row, once per logging step."""
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        row = {"step": state.global_step, "phase": self.phase}
        row |= {name: logs.get(name) for name in HISTORY_FIELDS if name not in row}
        # Predicted, with a latency table.
        row |= {name: logs[name] for name in ("latency_ms", "expected_latency_ms") if name in logs}
        # Names, which loggers of numbers could not take: straight from the network as it is, and
        # only if there are any.
        architecture = getattr(kwargs.get("model"), "architecture", None)
        if architecture is not None and architecture.left_out:
            row["left_out"] = architecture.left_out
        if schedule := getattr(
            getattr(kwargs.get("model"), "config", None), "token_schedule", None
        ):
            row["tokens"] = [merged for _, merged in schedule]  # that leave each layer
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def left_out_at(history: list[dict[str, Any]]) -> dict[str, int]:
    """The attentions and MLPs that a search left out -> the step by which they were gone, as far as
    it was logged."""
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
