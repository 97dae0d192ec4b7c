"""Checkpoints of a training that are either complete or do not exist."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Checkpoints and results are written into this folder before they are renamed to their place.
ASIDE = ".incomplete"
STATE_FILE = "trainer_state.json"
# An older checkpoint of the same step gets this prefix while the new one takes its place.
REPLACED = "replaced-"
# What a Trainer needs to resume, one row per thing: one match of one pattern is enough. The state
# of a sharded optimizer is a folder.
NEEDED = (
    (STATE_FILE,),
    ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    ("optimizer.pt", "optimizer_*", "global_step*"),
    ("scheduler.pt", "global_step*"),
    ("rng_state*.pth",),
    # of a classifier, of a search, of a model with adapters
    ("config.json", "bi_mask_config.json", "adapter_config.json"),
)


def move_into_place(written: Path, place: Path) -> None:
    """Rename a checkpoint that all processes have finished writing.

    Machines that share a disk may all call this: the first one renames, the others do nothing.

    Args:
        written: the folder in which it was written.
        place: the folder that it is to become; an older checkpoint of the same step is replaced.
    """
    claimed = written.with_name(f"moving-{written.name}")
    old = written.with_name(f"{REPLACED}{written.name}")
    try:
        # Renaming is atomic: it succeeds on one machine only.
        os.rename(written, claimed)
    except FileNotFoundError:
        return
    shutil.rmtree(old, ignore_errors=True)
    if place.is_dir():
        os.rename(place, old)
    os.rename(claimed, place)
    shutil.rmtree(old, ignore_errors=True)


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a run can resume from a folder: all files exist, and none was cut short."""
    if not all(_has_any(checkpoint, patterns) for patterns in NEEDED):
        return False
    return all(_is_whole(file) for file in checkpoint.iterdir() if file.is_file())


def _has_any(checkpoint: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(checkpoint.glob(pattern)) for pattern in patterns)


def _is_whole(file: Path) -> bool:
    if file.suffix in (".pt", ".pth"):
        # torch.save writes zip files, whose table of contents is at the end.
        return zipfile.is_zipfile(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return True


def newest_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint of a phase, None if there is none.

    Logs a warning if another checkpoint is incomplete.
    """
    _restore_replaced(folder)
    checkpoints: dict[int, Path] = {}
    for child in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", child.name)
        if match is not None:
            checkpoints[int(match[1])] = child
    complete = [step for step, child in checkpoints.items() if is_complete(child)]
    newest = checkpoints[max(complete)] if complete else None
    # A kill leaves what was being written in the other folder.
    was_being_written = any((folder / ASIDE).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if was_being_written or len(complete) < len(checkpoints):
        logger.warning(
            f"{folder} holds a checkpoint that is cut short or has no optimizer; resuming from "
            f"{newest}."
        )
    return None if newest is None else str(newest)


def _restore_replaced(folder: Path) -> None:
    """Put an old checkpoint back if a kill came between the two renames of `move_into_place`."""
    for old in (folder / ASIDE).glob(f"{REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
        place = folder / old.name.removeprefix(REPLACED)
        if not place.exists():
            os.rename(old, place)
