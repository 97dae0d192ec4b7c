"""What must never be published: tokens, names and folders of the machine that something was made
on, pickles."""

import getpass
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from PIL import Image

TOKENS = re.compile(
    r"hf_(?:[a-z]+_)?[A-Za-z0-9.-]{16,}|api_org_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|AIza[\w-]{30,}|AKIA[0-9A-Z]{16}|\bsk-[\w-]{20,}|xox[abpr]-[\w-]{10,}"
)
PATHS = re.compile(
    # Where people and machines keep their files, whatever stands before it but an address.
    r"(?<![\w.])/(?:home|Users|root|mnt|scratch|tmp|workspace|content|kaggle|data\d*)/[\w.+@/-]+|file:/+[\w.]"
    # Any path of at least three names that does not continue something: no part of an address, a
    # tag, or a fraction.
    r"|(?<![\w.:/<)\]*~-])/(?:[\w.+@-]+/){2,}[\w.+@-]*"
    r"|\b[A-Za-z]:[\\/]+[\w.]+[\\/]|\\\\[\w.-]+\\[\w.$-]+|~/[\w.]"
)
# Names of variables whose values are secrets, as services call them.
SECRET_VARIABLES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)(?:_|$)")
# Names of accounts and machines that say nothing about anybody.
IMPERSONAL = {"root", "user", "admin", "runner", "ubuntu", "localhost", "jovyan"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
SHORTEST_SECRET = 8


class LeakError(ValueError):
    """Something in a folder must not be published."""


@dataclass(frozen=True)
class Leak:
    """One finding: the file, where in it, and what it is (never the secret itself)."""

    file: str
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}{self.place}: {self.what}"


def require_no_leaks(
    folder: Path, public_names: set[str] = frozenset(), secrets: set[str] = frozenset()
) -> None:
    """Reads every file of a folder.

    Args:
        public_names: names that may occur, such as that of the account that is published to.
        secrets: what must not occur besides the secrets of this machine.

    Raises:
        LeakError: naming files, lines and what was found there.
    """
    leaks = [
        leak
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for leak in _leaks_in(path, folder, public_names, secrets | _secrets())
    ]
    if leaks:
        more = f" And {len(leaks) - 10} more." if len(leaks) > 10 else ""
        raise LeakError(
            "not published, because this would be public: "
            + "; ".join(map(str, leaks[:10]))
            + f".{more} Remove it from these files (or publish a folder without them) and try again."
        )


def require_no_token(path: Path, secrets: set[str] = frozenset()) -> None:
    """Looks for access tokens in a file of any kind that is not published itself, but lies beside
    what is.

    Raises:
        LeakError: naming the file.
    """
    content = path.read_bytes()
    if re.search(TOKENS.pattern.encode(), content) or any(
        secret.encode() in content for secret in secrets | _secrets()
    ):
        raise LeakError(
            f"not published: {path.name} holds an access token. The file itself would have stayed "
            f"here, but whoever "
            "gets this folder gets the token: delete the file, and revoke the token if the folder "
            "was shared."
        )


def _leaks_in(path: Path, folder: Path, public_names: set[str], secrets: set[str]) -> list[Leak]:
    name = path.relative_to(folder).as_posix()
    if path.suffix in PICKLES:
        return [Leak(name, "", "a file that may hold pickled code")]
    findings = (
        (place, what)
        for place, text in _texts(path)
        for what in _findings(text, public_names, secrets)
    )
    return [Leak(name, place, what) for place, what in findings]


def _texts(path: Path) -> list[tuple[str, str]]:
    """The words in a file, each with its place."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return [(f" ({key})", str(value)) for key, value in image.info.items()]
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        return [(" (header)", header.decode("utf-8", "replace"))]
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(f", line {number}", line) for number, line in enumerate(lines, start=1)]


def _findings(text: str, public_names: set[str], secrets: set[str]) -> list[str]:
    found = []
    if TOKENS.search(text):
        found.append("an access token")
    elif any(secret in text for secret in secrets):
        found.append("the value of a secret of this machine")
    if match := PATHS.search(text):
        found.append(f"a folder of a machine ({match[0][:60]})")
    for kind, name in (("account", _account()), ("machine", platform.node())):
        personal = len(name) > 2 and name.lower() not in IMPERSONAL | {
            public.lower() for public in public_names
        }
        if personal and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            found.append(f"the name of the {kind} ({name})")
    return found


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user need not have a name
        return ""


def _secrets() -> set[str]:
    values = {value for name, value in os.environ.items() if SECRET_VARIABLES.search(name)} | {
        get_token() or ""
    }
    return {value for value in values if len(value) >= SHORTEST_SECRET}
