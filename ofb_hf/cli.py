"""`ofb-hf`: search, finetune and evaluate from the command line. The recipes are the same functions."""

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .architectures import FAMILIES
from .configuration import BiMaskConfig
from .data import AugmentationArguments, DataArguments
from .training_args import OFBTrainingArguments
from .workflow import finetune as finetune_workflow
from .workflow import search as search_workflow
from .workflow.arguments import FinetuneArguments, ModelArguments, parse

T = TypeVar("T")

SEARCH = f"""Search an image classifier for a smaller one, prune it on the way, finetune it, and write it down.

Models: classifiers of transformers or of this package, of type {", ".join(c.model_type for c in FAMILIES)}.

Without a model and data this runs the embedded demonstration on handwritten digits (a few minutes on a CPU).
Otherwise name a model and data, and a budget:

    accelerate launch recipes/search_deit.py --model_name_or_path facebook/deit-small-patch16-224 \\
        --data_dir PHOTOS --target_macs 0.5 --num_train_epochs 20 --finetune_epochs 30 --output_dir runs/half

PHOTOS is a folder with one subfolder per class, or with parquet shards. --num_train_epochs, --learning_rate and all
other training flags govern the search; finetuning has its own --finetune_* flags. --config FILE.yaml reads settings
from a file, --resume_from_checkpoint auto continues an interrupted run."""

FINETUNE = """Finetune an image classifier, searched or not, with or without a teacher (--teacher_name_or_path)."""

EVALUATE = """Measure an image classifier: top-1, top-5, MACs, parameters, file size, images per second. Prints JSON."""


def search(argv: list[str] | None = None, **demo: Any) -> dict[str, Any]:
    """Entry of the search recipes and `ofb-hf search`. Returns the results.

    Args:
        argv: words of the command line, None for the process's own.
        demo: settings of the demonstration, which runs when neither model nor data are named.
    """
    classes = [ModelArguments, DataArguments, AugmentationArguments]
    classes += [BiMaskConfig, FinetuneArguments, OFBTrainingArguments]
    walk = _in_words(lambda: search_workflow.prepare(*parse(classes, argv, SEARCH, demo)))
    return _closing_processes(lambda: search_workflow.run(walk))


def finetune(argv: list[str] | None = None) -> dict[str, Any]:
    """Entry of `recipes/finetune.py` and `ofb-hf finetune`. Returns the results."""
    classes = [ModelArguments, DataArguments, AugmentationArguments, OFBTrainingArguments]
    job = _in_words(lambda: finetune_workflow.prepare(*parse(classes, argv, FINETUNE)))
    return _closing_processes(lambda: finetune_workflow.run(job))


def evaluate(argv: list[str] | None = None) -> dict[str, Any]:
    """Entry of `recipes/evaluate.py` and `ofb-hf evaluate`. Prints and returns the results."""
    classes = [ModelArguments, DataArguments, OFBTrainingArguments]
    parsed = _in_words(lambda: parse(classes, argv, EVALUATE))
    results = _closing_processes(lambda: _in_words(lambda: finetune_workflow.run_evaluate(*parsed)))
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    return results


COMMANDS = {"search": search, "finetune": finetune, "evaluate": evaluate}


def main(argv: list[str] | None = None) -> None:
    """`ofb-hf COMMAND ...`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        wanted = bool(argv) and argv[0] not in ("-h", "--help")
        text = f"usage: ofb-hf {{{','.join(COMMANDS)}}} ...\n\n{__doc__}\n`ofb-hf COMMAND --help` tells more.\n"
        (sys.stderr if wanted or not argv else sys.stdout).write(text)
        raise SystemExit(2 if wanted or not argv else 0)
    COMMANDS[argv[0]](argv[1:])


def _in_words(prepare: Callable[[], T]) -> T:
    """Turns what a user can mend before anything has started into one line on stderr and exit status 2."""
    try:
        return prepare()
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


def _closing_processes(run: Callable[[], T]) -> T:
    """Ends a distributed run together: left open, the group may abort a process that exits before the others."""
    result = run()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return result
