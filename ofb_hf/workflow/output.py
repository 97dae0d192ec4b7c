"""The output folder: complete or marked as failed, never half-written."""

import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..callbacks import HISTORY_FILE
from ..checkpoints import ASIDE, is_complete

FAILED_FILE = "FAILED.txt"
SETTINGS_FILE = "run_settings.json"
PHASES = ("dense", "dense_training", "search", "finetune")
PRODUCT = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "subnet.json",
    HISTORY_FILE,
    "search.png",
    "README.md",
    "eval_results.json",
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
    write_aside(path, lambda aside: aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free(folder: Path, settings: dict[str, Any], overwrite: bool, resume: str | None) -> None:
    """Refuses a folder that holds something else than this very run, unless a run there is to be replaced.

    Args:
        settings: what defines the run; resuming with other settings is refused.
        overwrite: replace a run of ours. A folder with anything else in it is never touched.
        resume: `--resume_from_checkpoint`.

    Raises:
        ValueError: saying what is there and which flags to use.
    """
    if folder.is_file():
        raise ValueError(f"output_dir {folder} is a file; give a folder.")
    is_ours = (folder / SETTINGS_FILE).is_file()
    if resume is not None:
        if resume != "auto" and not is_complete(Path(resume)):
            raise ValueError(f"resume_from_checkpoint {resume} is no complete checkpoint; give one, or 'auto'.")
        if is_ours:
            _check_settings(folder, settings)
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"output_dir {folder} holds other files than those of a run; give another folder.")
    elif folder.is_dir() and any(folder.iterdir()):
        if not is_ours:
            raise ValueError(f"output_dir {folder} holds other files than those of a run; give another folder.")
        if not overwrite:
            raise ValueError(
                f"output_dir {folder} holds a run; continue it with --resume_from_checkpoint auto, start over with "
                "--overwrite_output_dir, or give another folder."
            )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    settings = json.loads(json.dumps(settings))
    differing = {name: (saved.get(name), value) for name, value in settings.items() if saved.get(name) != value}
    if differing:
        raise ValueError(
            f"the run in {folder} has other settings; (there, here) differ in {differing}. Resume with the same "
            "settings, or give another output_dir."
        )


def begin(folder: Path, settings: dict[str, Any], resuming: bool) -> None:
    """Marks the folder as that of an unfinished run; a run that starts over first removes what the last one left."""
    folder.mkdir(parents=True, exist_ok=True)
    if not resuming and (folder / SETTINGS_FILE).is_file():
        for name in (*PHASES, *PRODUCT):
            remove(folder / name)
        for checkpoint in folder.glob("checkpoint-*"):
            remove(checkpoint)
    write_json(folder / SETTINGS_FILE, settings)
    mark_failed(folder, "it is running, or it was killed.")


def mark_failed(folder: Path, reason: str) -> None:
    """Writes `FAILED.txt`."""
    (folder / FAILED_FILE).write_text(
        f"This run has not finished: {reason}\nContinue with --resume_from_checkpoint auto, or start over with "
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
