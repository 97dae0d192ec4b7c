"""Checkpoints of a run: complete or not there."""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

ASIDE = ".incomplete"  # where checkpoints and results are written before they are renamed to their place
STATE_FILE = "trainer_state.json"


def move_into_place(written: Path, place: Path, state: TrainerState) -> None:
    """Renames a checkpoint that all processes have finished writing.

    Machines that share a disk may all call this: the first one does it.

    Args:
        written: where it was written.
        place: where it belongs; an older checkpoint of the same step is replaced.
        state: the Trainer's, whose path of the best checkpoint is mended.
    """
    claimed, old = (written.with_name(f"{prefix}-{written.name}") for prefix in ("moving", "replaced"))
    is_best = state.best_model_checkpoint == str(written)
    if is_best:
        state.best_model_checkpoint = str(place)
    try:
        os.rename(written, claimed)
    except FileNotFoundError:
        return
    if is_best:
        state.save_to_json(str(claimed / STATE_FILE))
    if place.is_dir():
        os.rename(place, old)
    os.rename(claimed, place)
    shutil.rmtree(old, ignore_errors=True)


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint to resume from."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return "global_step" in state and (checkpoint / "optimizer.pt").is_file()


def newest_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint of a phase, None if there is none. Says so when a later one was cut short."""
    checkpoints = {
        int(step): child
        for child in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := child.name.rpartition("-")[2]).isdigit()
    }
    complete = [step for step, child in checkpoints.items() if is_complete(child)]
    newest = checkpoints[max(complete)] if complete else None
    unfinished = [step for step in checkpoints if step not in complete]
    if unfinished or list((folder / ASIDE).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        logger.warning(f"{folder} holds a checkpoint that was not written to its end; resuming from {newest}.")
    return None if newest is None else str(newest)
