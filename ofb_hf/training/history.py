"""The history of a run: a file with one JSON object per logging step."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..durable import flush, move
from .checkpoints import ASIDE

logger = logging.get_logger(__name__)

HISTORY_FILE = "search_history.jsonl"
# The columns of every row, in this order; null where a phase does not have them.
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
# Columns of searches that predict the latency from a table.
LATENCY_FIELDS = ["latency_ms", "expected_latency_ms"]


class HistoryCallback(TrainerCallback):
    """Write one JSON object per logging step.

    Args:
        path: the file, usually `search_history.jsonl`. Rows of other phases in it are kept.
        phase: the phase that is named in every row: `dense`, `search` or `finetune`.
    """

    def __init__(self, path: str | Path, phase: str):
        self.path = Path(path)
        self.phase = phase

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Drop the rows of this phase that the run is about to write, again if it is resumed."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        kept = set()
        for row in read_history(self.path) if self.path.exists() else []:
            if row["phase"] != self.phase or row["step"] <= state.global_step:
                lines.append(json.dumps(row) + "\n")
            if row["phase"] == self.phase:
                kept.add(row["step"])
        logged = {entry["step"] for entry in state.log_history if "loss" in entry}
        if lost := sorted(logged - kept):
            logger.warning(
                f"{self.path} has lost {len(lost)} rows of the phase {self.phase!r}, from step "
                f"{lost[0]} to {lost[-1]}; the picture of the run will lack them."
            )
        # Written to another file and renamed: a kill leaves the whole old history or the new one.
        aside = self.path.with_name(f"{ASIDE}-{self.path.name}")
        aside.write_text("".join(lines), encoding="utf-8")
        move(aside, self.path)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Flush the rows up to a checkpoint to the disk, as the checkpoint itself is."""
        if state.is_world_process_zero and self.path.exists():
            flush(self.path)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Ask for a log after the last step, so that the history has the end of every run."""
        control.should_log |= state.global_step >= state.max_steps
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Append a row, once per logging step."""
        logs = kwargs.get("logs") or {}
        # Evaluations and the summary at the end of a training log without a loss.
        if not state.is_world_process_zero or "loss" not in logs:
            return
        row: dict[str, Any] = {"step": state.global_step, "phase": self.phase}
        for name in HISTORY_FIELDS:
            row.setdefault(name, logs.get(name))
        for name in LATENCY_FIELDS:
            if name in logs:
                row[name] = logs[name]
        row |= _lists_of(kwargs.get("model"))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _lists_of(model: Any) -> dict[str, list]:
    """Return what a row says about the network besides numbers, as far as there is any of it.

    It is read from the network itself, because loggers such as TensorBoard take numbers only.
    """
    lists = {}
    architecture = getattr(model, "architecture", None)
    if architecture is not None and architecture.left_out:
        lists["left_out"] = architecture.left_out
    schedule = getattr(getattr(model, "config", None), "token_schedule", None)
    if schedule:
        lists["tokens"] = [merged for _, merged in schedule]  # tokens that leave each layer
    return lists


def left_out_at(history: list[dict[str, Any]]) -> dict[str, int]:
    """Return the removed attentions and MLPs -> the first logged step without them."""
    steps: dict[str, int] = {}
    for row in history:
        for name in row.get("left_out") or ():
            steps.setdefault(name, row["step"])
    return steps


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a history file, without a last line that a kill left incomplete.

    Raises:
        ValueError: for a line that is no row, as a power failure may leave it.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        # A row is complete if its line has an end: it is written last.
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"line {number} of {path} is damaged: {line[:40]!r}; remove that line, or the "
                "file, and resume again."
            ) from error
    return rows
