"""Files that survive a power failure, and a record by which damage to them is noticed.

A renamed file has its new name at once, but its content may reach the disk later. What counts is
therefore flushed before it is renamed, and the folder after it.
"""

import hashlib
import json
import os
from pathlib import Path

# SHA-256 of every other file of a folder, by its path in it.
DIGESTS_FILE = "digests.json"


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            flush(child)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt":
        if path.is_dir():  # cannot be opened there
            return
        access = os.O_RDWR
    else:
        access = os.O_RDONLY
    descriptor = os.open(path, access)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(written: Path, place: Path) -> None:
    """Rename a file, or a folder to a free place, so that a power failure leaves it whole."""
    flush(written)
    os.replace(written, place)
    _sync(place.parent)


def write_digests(folder: Path) -> None:
    """Record the content of all files of a folder in `digests.json`."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != DIGESTS_FILE:
            digests[path.relative_to(folder).as_posix()] = _digest(path)
    (folder / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def damaged_file(folder: Path) -> str | None:
    """Return the first file of a folder that is not as `digests.json` says, None if all are.

    A folder without that file, as earlier versions wrote it, has nothing to be compared with.
    """
    record = folder / DIGESTS_FILE
    if not record.exists():
        return None
    try:
        digests = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return DIGESTS_FILE
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or _digest(file) != digest:
            return name
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
