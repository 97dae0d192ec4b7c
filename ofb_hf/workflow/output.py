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

FAILED_FILE = "FAILED.txt"
ASIDE = ".incomplete"


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


def check_free(folder: Path, overwrite: bool, resuming: bool) -> None:
    """Refuses a folder that holds another run, unless it is to be resumed or replaced.

    Raises:
        ValueError: saying which flags to use.
    """
    if folder.is_file():
        raise ValueError(f"output_dir {folder} is a file; give a folder.")
    if not folder.is_dir() or not any(folder.iterdir()) or overwrite or resuming:
        return
    raise ValueError(
        f"output_dir {folder} is not empty; continue with --resume_from_checkpoint auto, start over with "
        "--overwrite_output_dir, or give another folder."
    )


def clear_run(folder: Path) -> None:
    """Removes what an earlier run left in a folder, and nothing else."""
    for name in ("dense", "dense_training", "search", "finetune", HISTORY_FILE, FAILED_FILE):
        remove(folder / name)


@contextmanager
def marked_if_failed(folder: Path) -> Iterator[None]:
    """Leaves `FAILED.txt` with the error in `folder` if the block raises; removes it otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        text = "".join(traceback.format_exception_only(error))
        (folder / FAILED_FILE).write_text(
            f"This run did not finish: {text}\nThe files here may be missing or those of an earlier run. Continue with "
            "--resume_from_checkpoint auto, or start over with --overwrite_output_dir.\n",
            encoding="utf-8",
        )
        raise
    remove(folder / FAILED_FILE)


def newest_checkpoint(folder: Path) -> str | None:
    """The last checkpoint of a phase that was written to the end, None if there is none."""
    if not folder.is_dir():
        return None
    complete = [
        child
        for child in folder.glob("checkpoint-*")
        # The Trainer writes its state last.
        if (child / "trainer_state.json").is_file()
    ]
    return str(max(complete, key=lambda child: int(child.name.rpartition("-")[2]))) if complete else None
