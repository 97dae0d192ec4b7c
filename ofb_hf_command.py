"""`ofb-hf`: list the commands, or run one of them.

Importing `ofb_hf` takes seconds, because it registers models with transformers. This module stands
outside the package and imports the standard library only, so that `ofb-hf --help` answers at once.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `ofb-hf`: what it does in one line, and the function that it is."""

    summary: str
    function: str  # "module:function", imported when the command runs


COMMANDS = {
    "plan": Command(
        "Predict cost and time of a search within a minute, without data.",
        "ofb_hf.cli:plan",
    ),
    "latency-table": Command(
        "Measure the parts of a model on this machine, for budgets in milliseconds.",
        "ofb_hf.cli:latency_table",
    ),
    "compress": Command(
        "Make a classifier smaller in minutes, without labels and without training.",
        "ofb_hf.cli:compress",
    ),
    "search": Command(
        "Search a smaller version of a classifier under a budget, prune and finetune it.",
        "ofb_hf.cli:search",
    ),
    "search-tokens": Command(
        "Learn how many tokens each layer of a ViT keeps; its weights stay as they are.",
        "ofb_hf.cli:search_tokens",
    ),
    "finetune": Command(
        "Finetune a classifier, compressed or not, with or without a teacher.",
        "ofb_hf.cli:finetune",
    ),
    "evaluate": Command(
        "Measure accuracy, MACs, parameters, file size and speed of a classifier.",
        "ofb_hf.cli:evaluate",
    ),
    "verify": Command(
        "Evaluate a published checkpoint again and compare it with its card.",
        "ofb_hf.cli:verify",
    ),
    "export": Command(
        "Write a classifier as ONNX or for torch.export, and check what it computes.",
        "ofb_hf.cli:export",
    ),
    "publish": Command(
        "Publish a compressed classifier on the Hub, with its card.",
        "ofb_hf.cli:publish",
    ),
}

EXAMPLES = """\
examples:
  ofb-hf search                              the demonstration on handwritten digits, in minutes
  ofb-hf compress MODEL IMAGES               half the cost in minutes, without labels
  ofb-hf plan deit_small --target_macs 0.5   what a search would cost
  ofb-hf search --model_name_or_path facebook/deit-small-patch16-224 --data_dir PHOTOS \\
      --target_macs 0.5 --output_dir runs/half
"""


def help_text() -> str:
    """Return the list of all commands, with examples."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ofb-hf COMMAND [--SETTING VALUE ...]",
            "",
            "Make vision transformers of Hugging Face smaller: search, prune, finetune, publish.",
            "",
            "commands:",
            *lines,
            "",
            EXAMPLES,
            "`ofb-hf COMMAND --help` shows the flags of a command, `ofb-hf --version` the version.",
            "",
        ]
    )


def version() -> str:
    """Return the version of the package, read from its file: importing it would take seconds."""
    package = importlib.util.find_spec("ofb_hf")  # finds it, and does not import it
    assignment = Path(package.origin).with_name("_version.py").read_text(encoding="utf-8")
    return assignment.partition("=")[2].strip().strip("\"'")


def mistyped(name: str) -> str:
    """Return what to tell somebody who typed a command, or a flag, that does not exist."""
    import difflib  # only here: it is not needed when all is well

    if name.startswith("-"):
        flag = name.partition("=")[0]  # what follows "=" may be an access token
        return (
            f"error: unknown flag {flag}; `ofb-hf` alone has --help and --version, and other flags "
            "follow a command: `ofb-hf COMMAND --help` shows them.\n"
        )
    message = f"error: `ofb-hf` has no command {name!r}"
    similar = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    if similar:
        return f"{message}; did you mean `ofb-hf {similar[0]}`?\n"
    return f"{message}; the commands are {', '.join(COMMANDS)}.\n"


def main(argv: list[str] | None = None) -> None:
    """Run `ofb-hf COMMAND ...`.

    Args:
        argv: words of the command line after the program, None for the process's own.

    Raises:
        SystemExit: 0 after the help, 2 for a command line that names no command, and whatever
            status the command ends with.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        sys.stderr.write(help_text())
        raise SystemExit(2)
    name = words[0]
    if name in ("-h", "--help"):
        sys.stdout.write(help_text())
        raise SystemExit(0)
    if name == "--version":
        sys.stdout.write(f"ofb-hf {version()}\n")
        raise SystemExit(0)
    if name not in COMMANDS:
        sys.stderr.write(mistyped(name))
        raise SystemExit(2)
    module, _, function = COMMANDS[name].function.partition(":")
    getattr(importlib.import_module(module), function)(words[1:])


if __name__ == "__main__":
    main()
