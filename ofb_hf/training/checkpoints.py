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

from ..durable import DIGESTS_FILE, damaged_file, move, write_digests

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
    write_digests(claimed)
    shutil.rmtree(old, ignore_errors=True)
    if place.is_dir():
        os.rename(place, old)
    move(claimed, place)
    shutil.rmtree(old, ignore_errors=True)


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a run can resume from a folder: all files exist, and none is damaged."""
    return fault(checkpoint) is None


def fault(checkpoint: Path) -> str | None:
    """Return why a run cannot resume from a folder, None if it can."""
    for patterns in NEEDED:
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {patterns[0]}"
    damaged = damaged_file(checkpoint)
    if damaged is None and not (checkpoint / DIGESTS_FILE).exists():
        # of an earlier version: a file that was cut short is found by its format
        cut = [file.name for file in checkpoint.iterdir() if file.is_file() and not _is_whole(file)]
        damaged = min(cut, default=None)
    return None if damaged is None else f"its file {damaged} is damaged"


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

    Logs a warning that names the newer ones that cannot be used.
    """
    _restore_replaced(folder)
    checkpoints: dict[int, Path] = {}
    for child in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", child.name)
        if match is not None:
            checkpoints[int(match[1])] = child
    newest = None
    passed_over = []
    for step in sorted(checkpoints, reverse=True):
        reason = fault(checkpoints[step])
        if reason is None:
            newest = checkpoints[step]
            break
        passed_over.append(f"{checkpoints[step].name} ({reason})")
    # A kill leaves what was being written in the other folder.
    for child in (folder / ASIDE).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        passed_over.append(f"{child.name} (it was being written)")
    if passed_over:
        start = "from the beginning" if newest is None else f"from {newest.name}"
        logger.warning(
            f"{folder} cannot be resumed from {', '.join(passed_over)}; it goes on {start}."
        )
    return None if newest is None else str(newest)


def _restore_replaced(folder: Path) -> None:
    """Put an old checkpoint back if a kill came between the two renames of `move_into_place`."""
    for old in (folder / ASIDE).glob(f"{REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
        place = folder / old.name.removeprefix(REPLACED)
        if not place.exists():
            os.rename(old, place)
