"""Read the command line and YAML files, and write a command line down without secrets."""

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ..argument_checks import require_finite
from ..space.idle_settings import IdleSettingError
from .flag_help import OF_THE_LINE, Command, CommandParser
from .idle_settings import require_effect

DEMO_CONFIG = Path(__file__).with_name("demo.yaml")
# One of these says what to work on; without them the demonstration runs, where there is one.
INPUTS = ("dataset_name", "data_dir", "model_name_or_path")


def parse(
    command: Command, argv: list[str] | None, demo: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """Read the command line into one instance of each dataclass of a command.

    Args:
        command: whose settings are read.
        argv: words of the command line without the program, None for the process's own.
        demo: with the settings of the embedded demonstration, these apply when neither model nor
            data are named.

    Raises:
        ValueError: for flags that do not exist, naming similar ones; for flags that would do
            nothing; for a config file that is missing, is no mapping or has unknown keys; and for
            values that the dataclasses refuse.
        SystemExit: after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(command, prog=_program(command.name))
    # `--help` ends here; unknown flags are refused before a file is read
    namespace = _parsed(parser, argv)
    from_file: dict[str, Any] = {}
    if namespace.config is not None:
        from_file = _read(Path(namespace.config), parser)
    # of two flags of one name the last one wins, so the command line comes last
    namespace = _parsed(parser, _words(from_file) + argv)
    named = [getattr(namespace, name, None) for name in INPUTS]
    if demo is not None and not any(named):
        from_file = _read(DEMO_CONFIG, parser) | demo | from_file
    parsed = _merged(parser, from_file, argv)
    parts = parsed[: len(command.classes)]  # the last one holds --config
    for settings in parts:
        require_finite(settings)
    require_effect(command.name, _given(parser, argv), parts)
    return parts


def _merged(parser: CommandParser, from_file: dict[str, Any], argv: list[str]) -> tuple[Any, ...]:
    """Return the dataclasses of a file's settings and a command line, which wins.

    A file may hold settings of what the command line turns off (`pmim_window` and `--pmim false`):
    these are left out. A setting that its own file makes idle is refused.
    """

    def instances(words: list[str]) -> tuple[Any, ...]:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)

    try:
        return instances(_words(from_file) + argv)
    except IdleSettingError as error:
        typed = _given(parser, argv)
        idle = [name for name in error.names if name in from_file and name not in typed]
        if len(idle) < len(error.names):
            raise
        instances(_words(from_file))  # raises if the file contradicts itself
    kept = {name: value for name, value in from_file.items() if name not in idle}
    return _merged(parser, kept, argv)


def _parsed(parser: CommandParser, words: list[str]) -> Any:
    """Return the values of all flags.

    Raises:
        ValueError: for words that are no flag and belong to none.
    """
    namespace, unknown = parser.parse_known_args(words)
    # what follows "=" may be an access token
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if flags:
        raise ValueError(parser.suggest(flags))
    if unknown:
        raise ValueError(f"{unknown[0]!r} follows no flag; write --SETTING VALUE.")
    return namespace


def _given(parser: CommandParser, words: list[str]) -> set[str]:
    """Return the names of the settings that a command line names itself."""
    settings = {parser.setting_of(word.partition("=")[0]) for word in words}
    return settings - {None}


def _read(path: Path, parser: CommandParser) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ValueError: for a file that is missing, is no YAML or no mapping, and for unknown settings
            in it.
    """
    if not path.is_file():
        raise ValueError(f"--config {path} is no file; give a YAML file with settings.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(f"--config {path} is no YAML file: {reason}") from error
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise ValueError(f"--config {path} holds a {kind}; expected `name: value` lines.")
    known = set(parser.flags()) - set(OF_THE_LINE)
    unknown = sorted(str(name) for name in set(settings) - known)
    if unknown:
        raise ValueError(f"--config {path}: {parser.suggest(unknown)}")
    return settings


def _words(settings: dict[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:  # a file may leave a setting to its default
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):  # as lr_scheduler_kwargs
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += [str(item) for item in value]
        else:
            words.append(str(value))
    return words


def _is_recipe(program: Path) -> bool:
    """Return whether a program is a script of the folder `recipes`."""
    return program.suffix == ".py" and program.resolve().parent.name == "recipes"


def _program(command: str) -> str:
    """Return how a command was called, for its help: a recipe, or `ofb-hf COMMAND`."""
    program = Path(sys.argv[0])
    return f"recipes/{program.name}" if _is_recipe(program) else f"ofb-hf {command}"


def command_line() -> str:
    """Return the command that started this process, as one can type it again.

    It names no folder of this machine and holds no secret.
    """
    program = Path(sys.argv[0])
    if _is_recipe(program):
        name = [f"recipes/{program.name}"]
    elif program.name == "__main__.py":
        # `python -m ofb_hf`, and any other package that is run this way
        name = ["python", "-m", program.resolve().parent.name]
    else:
        name = [program.name]
    # each word after the program with the one before it, which may be a flag that takes a secret
    public = [_public(before, word) for before, word in pairwise(sys.argv)]
    return shlex.join([*name, *public])


def _public(before: str, word: str) -> str:
    """Return a word of a command line that others may read, given the one before it."""
    flag, equals, value = word.partition("=")
    if not (word.startswith("--") and equals):
        # a flag alone, or a value: an "=" in it separates nothing
        flag = equals = ""
        value = word
    if _takes_secret(flag or before):
        value = "HIDDEN"
    elif Path(value).is_absolute():
        value = Path(value).name
    return flag + equals + value


def _takes_secret(flag: str) -> bool:
    """Return whether an access token of the Hub follows a flag; other flags are about an image's
    tokens."""
    return flag.startswith("--") and flag.lstrip("-").replace("-", "_").split("_")[-1] == "token"
