"""The output folder: complete or marked as failed, never half-written."""

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
from ..training.arguments import OFBTrainingArguments
from ..training.checkpoints import ASIDE, is_complete
from ..training.history import HISTORY_FILE

logger = logging.get_logger(__name__)

FAILED_FILE = "FAILED.txt"
SETTINGS_FILE = "run_settings.json"
WORLD_SIZE = "num_processes"
# How a total batch is spread, which may change together with the number of processes.
SPREAD = (WORLD_SIZE, "per_device_train_batch_size", "gradient_accumulation_steps")
SEARCH_PHASES = ("dense_training", "search", "finetune")
FAMILY, FAMILY_PICTURE = "family.json", "family.png"  # of a run with several budgets
TOKEN_PICTURE = "tokens.png"  # shows images of the data, so it is not published
RESULT = "model"  # in the folder of a phase, once it is finished
PRODUCT = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "subnet.json",
    HISTORY_FILE,
    "search.png",
    TOKEN_PICTURE,
    "README.md",
    "eval_results.json",
    LATENCY_TABLE_FILE,
)


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a file or folder beside its place, then renames it there."""
    aside = path.with_name(f"{ASIDE}-{path.name}")
    remove(aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(aside)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(aside, path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON aside, then renames."""
    write_aside(
        path, lambda aside: aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    )


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free(
    args: OFBTrainingArguments, settings: dict[str, Any], overwrite: bool, phases: tuple[str, ...]
) -> None:
    """Refuses a folder that holds something else than this very run, unless a run there is to be
    replaced.

    Args:
        args: for `output_dir` and `resume_from_checkpoint`.
        settings: what defines the run; resuming with other settings is refused.
        overwrite: replace a run of ours. A folder with anything else in it is never touched.
        phases: subfolders that this kind of run writes checkpoints to, "" for the folder itself.

    Raises:
        ValueError: saying what is there and which flags to use.
    """
    folder = Path(args.output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir {folder} is a file; give a folder.")
    is_ours = (folder / SETTINGS_FILE).is_file()
    if not is_ours and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir {folder} holds other files than those of a run; give another folder."
        )
    if args.resume_from_checkpoint is not None:
        if args.resume_from_checkpoint != "auto":
            _check_checkpoint(Path(args.resume_from_checkpoint), folder, phases)
        if is_ours:
            _check_settings(folder, settings)
    elif is_ours and not overwrite:
        raise ValueError(
            f"output_dir {folder} holds a run; continue it with --resume_from_checkpoint auto, "
            f"start over with "
            "--overwrite_output_dir, or give another folder."
        )


def _check_checkpoint(checkpoint: Path, folder: Path, phases: tuple[str, ...]) -> None:
    """Refuses a checkpoint that this run could not continue from."""
    if not is_complete(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint {checkpoint} is no complete checkpoint; give one, or 'auto'."
        )
    allowed = [folder / phase for phase in phases]
    phase = next(
        (phase for phase in allowed if checkpoint.resolve().parent == phase.resolve()), None
    )
    if phase is None:
        raise ValueError(
            f"resume_from_checkpoint {checkpoint} is no checkpoint of this run, which writes them "
            f"to "
            f"{', '.join(map(str, allowed))}; give one of these, or 'auto', or the --output_dir "
            f"it belongs to."
        )
    if (phase / RESULT).is_dir():
        raise ValueError(
            f"resume_from_checkpoint {checkpoint} belongs to a part of the run that is finished; "
            f"'auto' goes on after "
            "it. To repeat it, take another --output_dir."
        )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
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
            f"in {spread}. Each of "
            "them sees other images than before, and the result is not that of an uninterrupted "
            "run."
        )
    if differing:
        raise ValueError(
            f"the run in {folder} has other settings; (there, here) differ in {differing}. Resume "
            f"with the same "
            "settings, or give another output_dir."
        )


def begin(args: OFBTrainingArguments, settings: dict[str, Any]) -> None:
    """Marks the folder as that of an unfinished run; a run that starts over first removes what the
    last one left."""
    folder, resuming = Path(args.output_dir), args.resume_from_checkpoint is not None
    folder.mkdir(parents=True, exist_ok=True)
    if not resuming and (folder / SETTINGS_FILE).is_file():
        for name in ("dense", RESULT, *SEARCH_PHASES, *PRODUCT, FAMILY, FAMILY_PICTURE):
            remove(folder / name)
        for path in (
            *folder.glob("checkpoint-*"),
            *(file.parent for file in folder.glob(f"target_*/{SETTINGS_FILE}")),
        ):
            remove(path)
    write_json(folder / SETTINGS_FILE, settings)
    mark_failed(folder, "it is running, or it was killed.")


def mark_failed(folder: Path, reason: str) -> None:
    """Writes `FAILED.txt`."""
    (folder / FAILED_FILE).write_text(
        f"This run has not finished: {reason}\nContinue with --resume_from_checkpoint auto, or "
        f"start over with "
        "--overwrite_output_dir.\n",
        encoding="utf-8",
    )


@contextmanager
def marked_if_failed(folder: Path, is_main: bool) -> Iterator[None]:
    """Leaves `FAILED.txt` with the error in `folder` if the block raises; removes it otherwise."""
    try:
        yield
    except BaseException as error:
        if is_main:
            mark_failed(folder, "".join(traceback.format_exception_only(error)))
        raise
    if is_main:
        remove(folder / FAILED_FILE)
