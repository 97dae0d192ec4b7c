"""Help of a command: the flags that users set first, all others on request, in named groups."""

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ..argument_checks import require_choice
from ..data import AugmentationArguments, DataArguments
from ..space.configuration import BiMaskConfig
from ..token_search.learned_counts import TokenSearchConfig
from .idle_settings import is_read

TRANSFORMERS = "training arguments of transformers"
MAX_WIDTH = 100
INDENT = 34  # of the help texts
# How the value of a flag is shown in the help, by the type that it is read as.
METAVARS = {int: "N", float: "X", str: "VALUE"}
USAGE = "%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]"
# Flags that every command has and no dataclass: they are about the command line, and stand in no
# YAML file.
TRACEBACK = "traceback"
OF_THE_LINE = ("config", TRACEBACK)
TRACEBACK_HELP = "Show where in the code an error was raised, not only what is wrong."
CONFIG_HELP = "YAML file with any of these settings; the command line wins."


def _names(*classes: type) -> tuple[str, ...]:
    """Return the names of the fields of dataclasses."""
    return tuple(each.name for one in classes for each in fields(one))


OF_TRAININGS = frozenset(_names(TrainingArguments, AugmentationArguments))


# Groups of `--help all` and patterns of the flags in them. A flag stands in the first group that
# has a pattern for it, so the last groups may take whatever a class has besides.
GROUPS: dict[str, tuple[str, ...]] = {
    "model and data": (
        *("config", "model_*", "teacher_*", "dense_*", "num_images", "num_labels"),
        *("new_classifier", "match_labels_by_number"),
        *_names(DataArguments),
    ),
    "augmentation (--augmentation deit)": _names(AugmentationArguments),
    "budget": ("target_*", "latency_table"),
    "search space": (
        *("preset", "search_*", "*_candidates", "uniform_across_layers"),
        *("multiple_of", "smallest_share", "basis", "prune_during_search"),
    ),
    "masked image modelling": ("pmim*", "keep_ratio_*"),
    "token search": _names(TokenSearchConfig),
    "decision": _names(BiMaskConfig),
    "training": (
        *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        *("weight_decay", "per_device_*", "gradient_accumulation_steps", "label_smoothing_factor"),
        *("bf16", "fp16", "use_cpu", "seed", "distillation_*", "ema_decay", "guard_images"),
    ),
    "finetuning": ("finetune_*",),
    "output": (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_strategy"),
        TRACEBACK,
        *("keep_dense", "token_pictures", "push_to_hub", "hub_*", "report_to"),
    ),
    TRANSFORMERS: _names(TrainingArguments),
}
# Flags of transformers that its own help describes for another program.
HELP = {
    "output_dir": "Folder for model, results, pictures and checkpoints; a new one for every run.",
    "num_train_epochs": "Epochs of the training; in a search, those of the search.",
    "learning_rate": "Peak learning rate of the weights.",
    "per_device_train_batch_size": "Images of a step in every process.",
    "per_device_eval_batch_size": "Images that are evaluated together in every process.",
    "resume_from_checkpoint": "auto: continue the run in OUTPUT_DIR; or one of its checkpoints.",
}


@dataclass(frozen=True)
class Command:
    """A command: the settings that it has, and what its help says.

    Attributes:
        name: as it is typed after `ofb-hf`.
        classes: dataclasses; every field is a flag.
        description: what the command does and how it is called, at the top of the help.
        essentials: group -> flags of the short help. Without them the help shows all flags.
        groups: groups of the whole help and patterns of the flags in them.
    """

    name: str
    classes: tuple[type, ...]
    description: str
    essentials: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=lambda: GROUPS)


class CommandParser(HfArgumentParser):
    """Parser of one command, whose help is short unless all flags are asked for.

    Args:
        command: the command.
        prog: how it was called, for the usage.
    """

    def __init__(self, command: Command, prog: str):
        super().__init__(
            list(command.classes),
            prog=prog,
            usage=USAGE,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            # with full names only, it is known which flags are followed by an access token
            allow_abbrev=False,
        )
        self.command = command
        self.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        self.add_argument(f"--{TRACEBACK}", action="store_true", help=TRACEBACK_HELP)
        self.add_argument("-h", "--help", action=_Help, nargs="?", choices=("all",))
        if any(issubclass(each, TrainingArguments) for each in command.classes):
            flags = self.flags()
            for name, text in HELP.items():
                flags[name].help = text

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse lists all choices, which may be fifty
        if action.choices is not None and value not in action.choices:
            listed = f"`{self.prog} --help all`"
            require_choice(action.option_strings[0], value, action.choices, listed)

    def flags(self) -> dict[str, argparse.Action]:
        """Return the action of every setting, by the name of the setting."""
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            # a switch has two actions; the first one is `--x`, the second one `--no_x`
            actions.setdefault(action.dest, action)
        del actions["help"]
        return actions

    def shown(self) -> list[str]:
        """Return the names of the settings that the whole help shows: those that are read."""
        command = self.command.name
        return [name for name in self.flags() if name in OF_THE_LINE or is_read(command, name)]

    def setting_of(self, flag: str) -> str | None:
        """Return the setting that a flag sets (`--no-pmim` sets `pmim`), None for no flag."""
        action = self._option_string_actions.get(flag)
        return None if action is None else action.dest

    def groups(self, everything: bool) -> dict[str, list[str]]:
        """Return the names of the settings to show, by the title of their group."""
        essentials = self.command.essentials
        if not essentials:  # few settings: one group for all of them
            return {"settings": list(self.flags())}
        if not everything:
            return {title: list(names) for title, names in essentials.items()}
        groups: dict[str, list[str]] = {title: [] for title in self.command.groups}
        for name in self.shown():
            groups[_group_of(name, self.command.groups)].append(name)
        return {title: names for title, names in groups.items() if names}

    def format_help(self, everything: bool = False) -> str:
        """Return the help: the essential flags, or all of them."""
        flags = self.flags()
        paragraphs = [f"usage: {self.usage % {'prog': self.prog}}", self.description]
        for title, names in self.groups(everything).items():
            entries = [_entry(name, flags[name]) for name in names]
            paragraphs.append("\n".join([f"{title}:", *entries]))
        if self.command.essentials and not everything:
            paragraphs.append(f"`{self.prog} --help all` shows all {len(self.shown())} flags.")
        return "\n\n".join(paragraphs) + "\n"

    def suggest(self, names: Iterable[str]) -> str:
        """Return what to tell somebody who gave settings that do not exist.

        Args:
            names: of the settings, with or without leading dashes.
        """
        known = list(self.flags())
        unknown = []
        for name in names:
            bare = name.lstrip("-").replace("-", "_")
            similar = difflib.get_close_matches(bare, known, n=1)
            advice = f" (did you mean --{similar[0]}?)" if similar else ""
            if not similar and bare in OF_TRAININGS:
                advice = f" (it is for trainings, and `ofb-hf {self.command.name}` trains nothing)"
            unknown.append(f"--{bare}{advice}")
        shown = ", ".join(unknown)
        return f"unknown setting {shown}; `{self.prog} --help all` shows all of them."


def _group_of(name: str, groups: dict[str, tuple[str, ...]]) -> str:
    """Return the title of the group that a setting stands in."""
    for title, patterns in groups.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return title
    raise KeyError(f"{name} stands in no group of the help; add it to one of them.")


def _entry(name: str, action: argparse.Action) -> str:
    """Return the lines of the help on one flag."""
    call = f"  --{name} {_metavar(action)}".rstrip()
    text = (action.help or "").strip() % {"default": action.default}
    if action.choices is not None and action.metavar is None:
        text += f" One of {', '.join(map(str, action.choices))}."
    default = _shown_default(action)
    if default and "default" not in text.lower():
        text += f" (default: {default})"
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    # a description that a user's terminal is too narrow for is still readable at 40 columns
    lines = textwrap.wrap(text, max(width - INDENT, 40))
    if len(call) < INDENT - 1 and lines:
        call = call.ljust(INDENT) + lines.pop(0)
    return "\n".join([call, *(" " * INDENT + line for line in lines)])


def _metavar(action: argparse.Action) -> str:
    """Return what stands for the value of a flag: nothing for a switch that is off by default."""
    if action.metavar is not None:
        return action.metavar
    if isinstance(action.const, bool):
        return "[false]" if action.default is True else ""
    value = METAVARS.get(action.type, "VALUE")
    return f"{value} ..." if action.nargs == "+" else value


def _shown_default(action: argparse.Action) -> str:
    """Return a default as one would type it, "" where there is none worth telling."""
    default = action.default
    if isinstance(default, Enum):
        default = default.value
    if default is True:
        return "true"
    if default is None or default is False or isinstance(default, list | dict):
        return ""
    return str(default)


class _Help(argparse.Action):
    """`--help` shows the essential flags, `--help all` every flag."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any):
        # it leaves nothing in the namespace, where the parser would take it for a setting
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)

    def __call__(
        self,
        parser: CommandParser,
        namespace: argparse.Namespace,
        values: str | None,
        option_string: str | None = None,
    ) -> None:
        """Print the help and end the process with status 0."""
        sys.stdout.write(parser.format_help(everything=values == "all"))
        parser.exit()
