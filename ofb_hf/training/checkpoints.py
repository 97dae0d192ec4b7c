"""Checkpoints of a run, and of a classifier: complete or not there."""

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

# where checkpoints and results are written before they are renamed to their place
ASIDE = ".incomplete"
STATE_FILE = "trainer_state.json"
REPLACED = "replaced-"
# What a Trainer needs to go on, as patterns: any match of a row will do. Sharded optimizers are
# folders.
NEEDED = (
    (STATE_FILE,),
    ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    ("optimizer.pt", "optimizer_*", "global_step*"),
    ("scheduler.pt", "global_step*"),
    ("rng_state*.pth",),
    ("config.json", "bi_mask_config.json", "adapter_config.json"),
)


def move_into_place(written: Path, place: Path) -> None:
    """Renames a checkpoint that all processes have finished writing.

    Machines that share a disk may all call this: the first one does it.

    Args:
        written: where it was written.
        place: where it belongs; an older checkpoint of the same step is replaced.
    """
    claimed, old = (
        written.with_name(f"moving-{written.name}"),
        written.with_name(f"{REPLACED}{written.name}"),
    )
    try:
        os.rename(written, claimed)
    except FileNotFoundError:
        return
    shutil.rmtree(old, ignore_errors=True)
    if place.is_dir():
        os.rename(place, old)
    os.rename(claimed, place)
    shutil.rmtree(old, ignore_errors=True)


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint to resume from: everything is there, and no file was cut
    short."""
    if not all(any(_matches(checkpoint, row)) for row in NEEDED):
        return False
    return all(_is_whole(file) for file in checkpoint.iterdir() if file.is_file())


def _matches(checkpoint: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in checkpoint.glob(pattern)]


def _is_whole(file: Path) -> bool:
    if file.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(file)  # the table of contents is at the end
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
    """The last complete checkpoint of a phase, None if there is none. Says so when a later one was
    cut short."""
    _restore_replaced(folder)
    checkpoints = {
        int(match[1]): child
        for child in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", child.name))
    }
    complete = [step for step, child in checkpoints.items() if is_complete(child)]
    newest = checkpoints[max(complete)] if complete else None
    unfinished = [step for step in checkpoints if step not in complete]
    if unfinished or list((folder / ASIDE).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        logger.warning(
            f"{folder} holds a checkpoint that was not written to its end, or without an "
            f"optimizer; resuming from "
            f"{newest}."
        )
    return None if newest is None else str(newest)


def _restore_replaced(folder: Path) -> None:
    """Puts back what a kill between the two renames of `move_into_place` has left without its
    name."""
    for old in (folder / ASIDE).glob(f"{REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
        place = folder / old.name.removeprefix(REPLACED)
        if not place.exists():
            os.rename(old, place)
