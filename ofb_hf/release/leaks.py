"""Find what must not be published: secrets, names and folders of a machine, pickles."""

import functools
import getpass
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from PIL import Image

from .. import models
from . import card

# Access tokens by their prefixes: Hugging Face, GitHub, GitLab, npm, Google, AWS, OpenAI, Slack.
TOKENS = re.compile(
    r"hf_(?:[a-z]+_)?[A-Za-z0-9.-]{16,}|api_org_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|AIza[\w-]{30,}|AKIA[0-9A-Z]{16}|\bsk-[\w-]{20,}|xox[abpr]-[\w-]{10,}"
)
PATHS = re.compile(
    # Folders in which people and machines keep their files, unless they continue an address.
    r"(?<![\w.])/(?:home|Users|root|mnt|scratch|tmp|workspace|content|kaggle|data\d*)/[\w.+@/-]+|file:/+[\w.]"
    # Any absolute path of at least three names, unless it continues something: an address, a tag, a
    # fraction.
    r"|(?<![\w.:/<)\]*~-])/(?:[\w.+@-]+/){2,}[\w.+@-]*"
    # Windows: a drive, a share; and a home folder.
    r"|\b[A-Za-z]:[\\/]+[\w.]+[\\/]|\\\\[\w.-]+\\[\w.$-]+|~/[\w.]"
)
# Names of environment variables whose values are secrets, as services call them.
SECRET_VARIABLES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)(?:_|$)")
# Common names of accounts and machines, which identify nobody.
IMPERSONAL = {"root", "user", "admin", "runner", "ubuntu", "localhost", "jovyan"}
# Files whose keys are those of this package and of transformers, or names of classes and tensors.
KEYED = {".json", ".jsonl", ".safetensors"}
KEY = re.compile(r'"(?:[^"\\]|\\.)*"\s*:')
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
# Values of variables shorter than this are not looked for: they occur in any text.
SHORTEST_SECRET = 8
# Findings that an error shows.
SHOWN = 10


class LeakError(ValueError):
    """Report that something in a folder must not be published."""


@dataclass(frozen=True)
class Leak:
    """Store one finding: the file, the place in it, and what it is (never the secret itself)."""

    file: str
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}{self.place}: {self.what}"


def require_no_leaks(
    folder: Path, public_names: set[str] = frozenset(), secrets: set[str] = frozenset()
) -> None:
    """Read every file of a folder, and raise if one of them holds what must not be published.

    The names of account and machine are looked for where they can leak: not in the code of this
    package, not in keys, and not at all if they are words that its cards are written with.

    Args:
        folder: to read.
        public_names: names that may occur, such as the account that is published to, and classes.
        secrets: strings to look for in addition to the secrets of this machine.

    Raises:
        LeakError: with files, lines and what was found there.
    """
    secrets = secrets | _secrets()
    names = _personal_names(public_names)
    leaks = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _is_own_code(path):
            leaks += _leaks_in(path, folder, names, secrets)
    if not leaks:
        return
    shown = "; ".join(str(leak) for leak in leaks[:SHOWN])
    more = f" And {len(leaks) - SHOWN} more." if len(leaks) > SHOWN else ""
    raise LeakError(
        f"not published, because this would be public: {shown}.{more} Remove it from these files "
        "(or publish a folder without them) and try again. A name of this account or machine that "
        "means something else there is allowed by `ofb-hf publish --allow_words NAME`."
    )


def words_in(texts: Iterable[str]) -> set[str]:
    """Return the words of some texts, in lower case."""
    found: set[str] = set()
    for text in texts:
        found |= set(re.findall(r"[^\W_]+", text.lower())) | set(
            re.findall(r"[\w-]+", text.lower())
        )
    return found


@functools.cache
def _own_words() -> frozenset[str]:
    """Return the words that cards are written with, whatever the model."""
    files = [Path(card.__file__), *card.TEMPLATES.iterdir()]
    return frozenset(words_in(file.read_text(encoding="utf-8") for file in files))


def _is_own_code(path: Path) -> bool:
    """Return whether a file is one of this package, as it is."""
    own = Path(models.__file__).with_name(path.name)
    return path.suffix == ".py" and own.is_file() and own.read_bytes() == path.read_bytes()


def _personal_names(public_names: Iterable[str]) -> dict[str, str]:
    """Return the names of account and machine, unless they are public or identify nobody."""
    harmless = IMPERSONAL | _own_words() | {public.lower() for public in public_names}
    names = {"account": _account(), "machine": platform.node()}
    # Names of one or two letters occur in any text.
    return {
        kind: name for kind, name in names.items() if len(name) > 2 and name.lower() not in harmless
    }


def require_no_token(path: Path, secrets: set[str] = frozenset()) -> None:
    """Raise if a file next to a checkpoint, itself not published, holds an access token.

    Args:
        path: file of any kind.
        secrets: strings to look for in addition to the secrets of this machine.

    Raises:
        LeakError: with the name of the file.
    """
    content = path.read_bytes()
    has_token = re.search(TOKENS.pattern.encode(), content) is not None
    has_secret = any(secret.encode() in content for secret in secrets | _secrets())
    if has_token or has_secret:
        raise LeakError(
            f"not published: {path.name} holds an access token. The file itself is never "
            "published, but everybody who gets this folder gets the token: delete the file, and "
            "revoke the token if the folder was shared."
        )


def _leaks_in(path: Path, folder: Path, names: dict[str, str], secrets: set[str]) -> list[Leak]:
    name = path.relative_to(folder).as_posix()
    if path.suffix in PICKLES:
        return [Leak(name, "", "a file that may hold pickled code")]
    leaks = []
    for place, text in _texts(path):
        without_keys = KEY.sub(" ", text) if path.suffix in KEYED else text
        for what in [*_findings(text, secrets), *_names_in(without_keys, names)]:
            leaks.append(Leak(name, place, what))
    return leaks


def _texts(path: Path) -> list[tuple[str, str]]:
    """Return all text in a file, each piece with its place."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return [(f" ({key})", str(value)) for key, value in image.info.items()]
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
        return [(" (header)", header.decode("utf-8", "replace"))]
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(f", line {number}", line) for number, line in enumerate(lines, start=1)]


def _findings(text: str, secrets: set[str]) -> list[str]:
    """Return the secrets and folders in a text."""
    found = []
    if TOKENS.search(text):
        found.append("an access token")
    elif any(secret in text for secret in secrets):
        found.append("the value of a secret of this machine")
    path = PATHS.search(text)
    if path:
        found.append(f"a folder of a machine ({path[0][:60]})")
    return found


def _names_in(text: str, names: dict[str, str]) -> list[str]:
    """Return which names of account and machine are in a text."""
    found = []
    for kind, name in names.items():
        if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            found.append(f"the name of the {kind} ({name})")
    return found


def _account() -> str:
    """Return the name of this user, "" if there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # the user of a container need not have a name
        return ""


def _secrets() -> set[str]:
    """Return the secrets of this machine: the Hub's token, and values of environment variables."""
    values = {get_token() or ""}
    for name, value in os.environ.items():
        if SECRET_VARIABLES.search(name):
            values.add(value)
    return {value for value in values if len(value) >= SHORTEST_SECRET}
