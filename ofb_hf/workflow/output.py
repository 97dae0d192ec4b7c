"""Write to an output folder that is complete or marked as failed, never half-written."""

import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..cost.latency import LATENCY_TABLE_FILE
from ..durable import flush, move
from ..space.presets import ADDED, ALIASES, without_removed
from ..training.arguments import OFBTrainingArguments
from ..training.checkpoints import ASIDE, fault
from ..training.history import HISTORY_FILE

logger = logging.get_logger(__name__)

FAILED_FILE = "FAILED.txt"
SETTINGS_FILE = "run_settings.json"
RESUME = "Continue with --resume_from_checkpoint auto, or start over with --overwrite_output_dir."
# The number of processes, and what changes with it if the total batch is to stay as it is.
WORLD_SIZE = "num_processes"
SPREAD = (WORLD_SIZE, "per_device_train_batch_size", "gradient_accumulation_steps")
# Name of a phase in the history -> its subfolder, which holds its checkpoints and its result.
PHASES = {
    "dense": "dense_training",
    "basis": "basis",
    "search": "search",
    "finetune": "finetune",
}
# Those that train, and write checkpoints.
SEARCH_PHASES = tuple(folder for phase, folder in PHASES.items() if phase != "basis")
# Of the model that a finished phase leaves, in the folder of the phase.
RESULT = "model"
SUBNET = "subnet.json"
RESULTS_FILE = "eval_results.json"
SEARCH_PICTURE = "search.png"
FINETUNE_PICTURE = "finetune.png"
COMPRESS_PICTURE = "compress.png"
# Shows images of the data, so it is not published.
TOKEN_PICTURE = "tokens.png"
# Of a run with several budgets.
BUDGETS_RESULTS = "family.json"
BUDGETS_PICTURE = "family.png"
PRODUCT = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    SUBNET,
    HISTORY_FILE,
    SEARCH_PICTURE,
    FINETUNE_PICTURE,
    COMPRESS_PICTURE,
    TOKEN_PICTURE,
    "README.md",
    RESULTS_FILE,
    LATENCY_TABLE_FILE,
)


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file or folder next to its place, then rename it to its place.

    A folder that is there already is replaced.
    """
    aside = path.with_name(f"{ASIDE}-{path.name}")
    remove(aside)  # what a kill may have left there
    path.parent.mkdir(parents=True, exist_ok=True)
    write(aside)
    # A file is replaced in one step; a folder can only be renamed to a free place.
    if path.is_dir():
        shutil.rmtree(path)
    move(aside, path)


def move_all(aside: Path, folder: Path) -> None:
    """Move all files and folders out of one folder into another one, and remove the first."""
    for path in list(aside.iterdir()):
        move(path, folder / path.name)
    aside.rmdir()


def write_json(path: Path, content: Any) -> None:
    """Write JSON next to its place, then rename it."""
    text = json.dumps(content, indent=2) + "\n"

    def write(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")

    write_aside(path, write)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free(
    args: OFBTrainingArguments, settings: dict[str, Any], overwrite: bool, phases: tuple[str, ...]
) -> None:
    """Refuse an output folder that holds other things than this run.

    Args:
        args: for `output_dir` and `resume_from_checkpoint`.
        settings: what decides the result; resuming with other settings is refused.
        overwrite: whether a run of this package may be replaced. A folder with other files in it
            is never written to.
        phases: subfolders that this kind of run writes checkpoints to, "" for the folder itself.

    Raises:
        ValueError: saying what is there and which flags to use.
    """
    folder = Path(args.output_dir)
    is_ours = _holds_run(folder)
    if args.resume_from_checkpoint is not None:
        if args.resume_from_checkpoint != "auto":
            _check_checkpoint(Path(args.resume_from_checkpoint), folder, phases)
        if is_ours:
            _check_settings(folder, settings)
    elif is_ours and not overwrite:
        raise ValueError(
            f"output_dir {folder} holds a run; continue it with --resume_from_checkpoint auto, "
            "start over with --overwrite_output_dir, or give another folder."
        )


def require_free(folder: Path, overwrite: bool) -> None:
    """Refuse the output folder of a command that cannot be resumed, unless it is free.

    Args:
        folder: the output folder.
        overwrite: whether a run of this package may be replaced.

    Raises:
        ValueError: saying what is there and what to do.
    """
    if _holds_run(folder) and not overwrite:
        raise ValueError(
            f"output_dir {folder} holds a run; replace it with --overwrite_output_dir, or give "
            "another folder."
        )
    if folder.resolve() == Path.cwd():
        raise ValueError(f"output_dir {folder} is the current folder; give a new one.")
    # The new folder is completed next to its place, then takes it.
    parents = folder.resolve().parents
    existing = next(parent for parent in parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir {folder} is below {existing}, which is a file.")
    for place in (folder, existing):
        if place.exists() and not os.access(place, os.W_OK):
            raise ValueError(
                f"output_dir {folder} cannot be written, for {place} cannot; give another folder."
            )


def _holds_run(folder: Path) -> bool:
    """Return whether an output folder holds a run; raise ValueError if it holds other things."""
    if folder.is_file():
        raise ValueError(f"output_dir {folder} is a file; give a folder.")
    # every run writes its settings before anything else
    is_ours = (folder / SETTINGS_FILE).is_file()
    if not is_ours and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir {folder} holds other files than those of a run; give another folder."
        )
    return is_ours


def write_whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder next to an output folder, then put it in its place.

    Files of an earlier run are removed, and others stay. A kill leaves either run, but for the
    moment of renaming, in which `FAILED.txt` marks the folder.

    Args:
        folder: free, or the folder of a run.
        write: writes everything, the settings among it.
    """
    if not _holds_run(folder):
        write_aside(folder, write)
        return
    aside = folder.with_name(f"{ASIDE}-{folder.name}")
    remove(aside)
    write(aside)
    advice = "Start over with --overwrite_output_dir."
    flush(aside)
    mark_failed(folder, "it was killed while files were replaced.", advice)
    _remove_run(folder)
    move_all(aside, folder)
    remove(folder / FAILED_FILE)


def _check_checkpoint(checkpoint: Path, folder: Path, phases: tuple[str, ...]) -> None:
    """Refuse a checkpoint that this run could not continue from."""
    if reason := fault(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint {checkpoint} is no complete checkpoint: {reason}; give "
            "another one, or 'auto'."
        )
    allowed = [folder / phase for phase in phases]
    parent = checkpoint.resolve().parent
    if parent not in [phase.resolve() for phase in allowed]:
        raise ValueError(
            f"resume_from_checkpoint {checkpoint} is no checkpoint of this run, which writes them "
            f"to {', '.join(map(str, allowed))}; give one of these, or 'auto', or the "
            "--output_dir it belongs to."
        )
    if (parent / RESULT).is_dir():
        raise ValueError(
            f"resume_from_checkpoint {checkpoint} belongs to a phase of the run that is finished; "
            "'auto' goes on after it. To repeat it, give another --output_dir."
        )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume with other settings; only warn of another number of processes."""
    try:
        saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / SETTINGS_FILE} is damaged ({error}), so nobody knows whether this run has "
            "the same settings; start over with --overwrite_output_dir."
        ) from error
    # version 0.1 wrote an earlier name of the preset, fields that have been removed, and not those
    # that were added
    saved = {"new_classifier": False, "guard_images": 0} | ADDED | without_removed(saved)
    if "preset" in saved:
        saved["preset"] = ALIASES.get(saved["preset"], saved["preset"])
    # what JSON makes of tuples and the like, as in the file
    settings = json.loads(json.dumps(settings))
    differing = {
        name: (saved.get(name), value)
        for name, value in settings.items()
        if saved.get(name) != value
    }
    if WORLD_SIZE in differing:
        spread = {name: differing.pop(name) for name in SPREAD if name in differing}
        logger.warning(
            f"the run in {folder} goes on with another number of processes; (there, here) differ "
            f"in {spread}. Each of them sees other images than before, and the result is not that "
            "of an uninterrupted run."
        )
    if differing:
        raise ValueError(
            f"the run in {folder} has other settings; (there, here) differ in {differing}. Resume "
            "with the same settings, or give another output_dir."
        )


def begin(args: OFBTrainingArguments, settings: dict[str, Any]) -> None:
    """Mark the folder as that of an unfinished run.

    A run that starts over removes the files of the last run first.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    is_resuming = args.resume_from_checkpoint is not None
    if not is_resuming and (folder / SETTINGS_FILE).is_file():
        _remove_run(folder)
    write_json(folder / SETTINGS_FILE, settings)
    mark_failed(folder, "it is running, or it was killed.")


def _remove_run(folder: Path) -> None:
    """Remove everything that a run may have written, and nothing that it did not write."""
    for name in ("dense", RESULT, *PHASES.values(), *PRODUCT, BUDGETS_RESULTS, BUDGETS_PICTURE):
        remove(folder / name)
    for checkpoint in folder.glob("checkpoint-*"):
        remove(checkpoint)
    # a folder whose name only looks like that of a budget holds no settings
    for settings in folder.glob(f"target_*/{SETTINGS_FILE}"):
        remove(settings.parent)


def finished_results(folder: Path) -> dict[str, Any] | None:
    """Return the `eval_results.json` of a folder whose run is finished, else None."""
    file = folder / RESULTS_FILE
    if not file.is_file() or (folder / FAILED_FILE).exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def mark_failed(folder: Path, reason: str, advice: str = RESUME) -> None:
    """Write `FAILED.txt`, which says why and how to go on."""
    (folder / FAILED_FILE).write_text(
        f"This run has not finished: {reason}\n{advice}\n",
        encoding="utf-8",
    )


@contextmanager
def marked_if_failed(folder: Path, is_main: bool) -> Iterator[None]:
    """Leave `FAILED.txt` with the error in a folder if the block raises; remove it otherwise."""
    try:
        yield
    except BaseException as error:  # also Ctrl-C and SystemExit
        if is_main:
            mark_failed(folder, "".join(traceback.format_exception_only(error)))
        raise
    if is_main:
        remove(folder / FAILED_FILE)
