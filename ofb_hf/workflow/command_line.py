"""Read the command line and YAML files, and write a command line down without secrets."""

import argparse
import json
import shlex
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

DEMO_CONFIG = Path(__file__).with_name("demo.yaml")


def parse(
    classes: list[type],
    argv: list[str] | None,
    description: str,
    demo: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Reads the command line into one instance of each class.

    Args:
        classes: dataclasses; their fields are the flags, their help texts the help.
        argv: words of the command line without the program, None for the process's own.
        description: printed at the top of `--help`.
        demo: with the settings of the embedded demonstration, these apply when neither model nor
            data are named.

    Raises:
        ValueError: for a config file that is missing, is no mapping or has unknown keys, and for
            values that the classes refuse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        classes,
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # by their full names `command_line` knows which flags take secrets
    )
    parser.add_argument(
        "--config", help="YAML file with any of these settings; the command line wins."
    )
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    known, rest = config_parser.parse_known_args(argv)
    names = {f.name for c in classes for f in fields(c) if f.init}
    words = [] if known.config is None else _words(_read(Path(known.config), names))
    parsed = parser.parse_args_into_dataclasses(words + rest, look_for_args_file=False)
    given = {name: value for part in parsed for name, value in vars(part).items()}
    if demo is not None and not any(
        given[name] for name in ("dataset_name", "data_dir", "model_name_or_path")
    ):
        words = _words(_read(DEMO_CONFIG, names) | demo) + words
        parsed = parser.parse_args_into_dataclasses(words + rest, look_for_args_file=False)
    return parsed[: len(classes)]


def _read(path: Path, names: set[str]) -> dict[str, Any]:
    """The settings in a YAML file; all of them have to be among `names`."""
    if not path.is_file():
        raise ValueError(f"--config {path} is no file; give a YAML file with settings.")
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict):
        raise ValueError(
            f"--config {path} holds a {type(settings).__name__}; expected `name: value` lines."
        )
    if unknown := sorted(set(settings) - names):
        raise ValueError(
            f"--config {path} has unknown settings {unknown}; see --help for the known ones."
        )
    return settings


def _words(settings: dict[str, Any]) -> list[str]:
    """Settings as command line words."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        else:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return words


def command_line() -> str:
    """The command that started this process, as one can type it again: without folders of this
    machine, and secrets."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join([words[0], *(_public(before, word) for before, word in pairwise(words))])


def _public(before: str, word: str) -> str:
    """A word of a command line that others may read, given the one before it."""
    flag, equals, value = word.partition("=")
    if not (word.startswith("--") and equals):
        flag, equals, value = "", "", word
    if _takes_secret(flag or before):
        value = "HIDDEN"
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


def _takes_secret(flag: str) -> bool:
    """Whether what follows a flag is an access token of the Hub; other flags are about an image's
    tokens."""
    return flag.startswith("--") and flag.lstrip("-").replace("-", "_").split("_")[-1] == "token"
