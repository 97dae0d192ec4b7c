"""`ofb-hf`: plan, latency-table, search, search-tokens, finetune, evaluate, publish, verify,
export.

The recipes are the same functions."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .cost.latency import LatencyTable
from .data import AugmentationArguments, DataArguments
from .families.registry import FAMILIES
from .release import hub
from .release.export import ExportError
from .token_search.learned_counts import TokenSearchConfig
from .training.arguments import OFBTrainingArguments
from .workflow import export as export_workflow
from .workflow import finetune as finetune_workflow
from .workflow import latency_table as latency_table_workflow
from .workflow import plan as plan_workflow
from .workflow import search as search_workflow
from .workflow import search_tokens as tokens_workflow
from .workflow import several_budgets as several_budgets_workflow
from .workflow import verify as verify_workflow
from .workflow.arguments import (
    ExportArguments,
    FinetuneArguments,
    LatencyTableArguments,
    ModelArguments,
    PlanArguments,
    PublishArguments,
    SearchArguments,
    TokenPhaseArguments,
)
from .workflow.command_line import parse
from .workflow.report import text_table
from .workflow.results import push
from .workflow.run import Run

T = TypeVar("T")

SEARCH = f"""Search an image classifier for a smaller one, prune it on the way, finetune it, and write it down.

Models: classifiers of transformers or of this package, of type {", ".join(c.model_type for c in FAMILIES)}.

Without a model and data this runs the embedded demonstration on handwritten digits (a few minutes on a CPU).
Otherwise name a model and data, and a budget:

    accelerate launch recipes/search_deit.py --model_name_or_path facebook/deit-small-patch16-224 \\
        --data_dir PHOTOS --target_macs 0.5 --num_train_epochs 20 --finetune_epochs 30 --output_dir runs/half

Several budgets (--target_macs 0.7,0.5,0.35) give a family of models from one search, each in a folder of its own.
A budget may be in milliseconds of this machine (--target_latency_ms 20 --latency_table FILE of `ofb-hf latency-table`).

PHOTOS is a folder with one subfolder per class, or with parquet shards. --num_train_epochs, --learning_rate and all
other training flags govern the search; finetuning has its own --finetune_* flags. --config FILE.yaml reads settings
from a file, --resume_from_checkpoint auto continues an interrupted run."""

FINETUNE = """Finetune an image classifier, searched or not, with or without a teacher (--teacher_name_or_path)."""

PUBLISH = """Publish a compressed classifier on the Hub, loadable with and without this package.

    ofb-hf publish runs/half --repo_id OWNER/NAME

One commit holds weights, config, code of the model, image processor, results, picture and card. Files are searched for
tokens, names and folders of this machine before anything is sent; --dry_run shows what would be."""

VERIFY = """Load a checkpoint, count and evaluate it again, and compare with what its card says.

    ofb-hf verify OWNER/NAME --data_dir PHOTOS"""

SEARCH_TOKENS = """Learn how many patch tokens each layer of a ViT drops and merges, under a budget; its weights rest.

Takes any ViT classifier, also one that `ofb-hf search` made narrower. Without a model and data this runs on handwritten
digits. Otherwise:

    accelerate launch recipes/search_tokens.py --model_name_or_path facebook/deit-small-patch16-224 \\
        --data_dir PHOTOS --target_macs 0.6 --num_train_epochs 3 --output_dir runs/tokens

A budget may be in milliseconds of this machine (--target_latency_ms 20 --latency_table FILE of `ofb-hf latency-table`).
Published schedules of DeiT-T/S/B need no search: ofb_hf.tokens.published_schedule. --finetune_epochs trains the weights
afterwards, with the tokens that are left. tokens.png shows what becomes of some images."""

EXPORT = """Write a classifier for another runtime, and compare what that computes with what PyTorch computes.

    ofb-hf export OWNER/NAME --format onnx --output_dir out

The file takes `pixel_values` (B, C, H, W) in float32, for any B, and gives `logits`; the image processor, which says
how pixels are prepared, is written beside it. Nothing is left
behind if logits differ by more than 1e-5 of the largest."""

PLAN = """What a search would cost and come to, within a minute, before there is any data.

    ofb-hf plan deit_small --target_macs 0.7,0.5 --per_device_train_batch_size 64 --num_train_epochs 20

Counts what the space holds and what each budget comes to; takes some steps on random images, and says what they
make for --num_images. With --latency_table it predicts milliseconds, too. All other flags are those of the search.
Nothing is written."""

LATENCY_TABLE = """Measure how long the parts of a model take on this machine, for budgets in milliseconds; in minutes.

    ofb-hf latency-table deit_small --batch_size 1 --num_threads 2 --output deit_small.json
    ofb-hf search ... --latency_table deit_small.json --target_latency_ms 25
    ofb-hf search-tokens ... --latency_table deit_small.json --target_latency_ms 25

Networks of random sizes from the model's search space, and for a ViT with random token schedules, take turns; what each
half of a block took is fitted as a sum over its widths and tokens. The table, in JSON, holds measurements, fit and
settings, and how well it predicts whole networks that the fit did not see. It is of this model, this machine, these
threads and this batch size: measure again for others,
with nothing else running if you can."""

# Numbers of tokens are learned from the dense model, so its weight is what it always is.
TOKEN_DEMO = {
    "output_dir": "runs/demo_tokens",
    "num_train_epochs": 10,
    "finetune_epochs": 0,
    "distillation_weight": None,
}

EVALUATE = """Measure an image classifier: top-1, top-5, MACs, parameters, file size, images per second. Prints JSON."""


def plan(argv: list[str] | None = None) -> dict[str, Any]:
    """Entry of `ofb-hf plan`. Prints and returns the plan."""
    classes = [PlanArguments, SearchArguments, OFBTrainingArguments]
    parsed = _in_words(lambda: parse(classes, _leading("--model_name_or_path", argv), PLAN))
    planned = _closing_processes(lambda: _in_words(lambda: plan_workflow.run_plan(*parsed)))
    sys.stdout.write(f"{plan_workflow.plan_text(planned)}\n")
    return planned


def latency_table(argv: list[str] | None = None) -> LatencyTable:
    """Entry of `ofb-hf latency-table`. Prints what was measured; returns the table."""
    parsed = _in_words(
        lambda: parse(
            [LatencyTableArguments], _leading("--model_name_or_path", argv), LATENCY_TABLE
        )
    )
    table = _in_words(lambda: latency_table_workflow.run_latency_table(*parsed))
    sys.stdout.write(f"{latency_table_workflow.table_text(table)}\nwritten to {parsed[0].output}\n")
    return table


def search(argv: list[str] | None = None, **demo: Any) -> dict[str, Any]:
    """Entry of the search recipes and `ofb-hf search`. Returns the results.

    Args:
        argv: words of the command line, None for the process's own.
        demo: settings of the demonstration, which runs when neither model nor data are named.
    """
    classes = [ModelArguments, DataArguments, AugmentationArguments]
    classes += [SearchArguments, FinetuneArguments, OFBTrainingArguments]
    run = _in_words(lambda: search_workflow.prepare(*parse(classes, argv, SEARCH, demo)))
    if len(run.targets) == 1:
        start = search_workflow.run_search
    else:
        start = several_budgets_workflow.run_several_budgets
    return _finish(run, start)


def search_tokens(argv: list[str] | None = None) -> dict[str, Any]:
    """Entry of `recipes/search_tokens.py` and `ofb-hf search-tokens`. Returns the results."""
    classes = [ModelArguments, DataArguments, AugmentationArguments]
    classes += [TokenSearchConfig, TokenPhaseArguments, OFBTrainingArguments]
    run = _in_words(
        lambda: tokens_workflow.prepare(*parse(classes, argv, SEARCH_TOKENS, TOKEN_DEMO))
    )
    return _finish(run, tokens_workflow.run_search_tokens)


def finetune(argv: list[str] | None = None) -> dict[str, Any]:
    """Entry of `recipes/finetune.py` and `ofb-hf finetune`. Returns the results."""
    classes = [ModelArguments, DataArguments, AugmentationArguments, OFBTrainingArguments]
    run = _in_words(lambda: finetune_workflow.prepare(*parse(classes, argv, FINETUNE)))
    return _finish(run, finetune_workflow.run_finetune)


def evaluate(argv: list[str] | None = None) -> dict[str, Any]:
    """Entry of `recipes/evaluate.py` and `ofb-hf evaluate`. Prints and returns the results."""
    classes = [ModelArguments, DataArguments, OFBTrainingArguments]
    parsed = _in_words(lambda: parse(classes, argv, EVALUATE))
    results = _closing_processes(lambda: _in_words(lambda: finetune_workflow.run_evaluate(*parsed)))
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    return results


def publish(argv: list[str] | None = None) -> None:
    """Entry of `recipes/publish.py` and `ofb-hf publish`. Prints what was sent, and where it is
    now."""
    (wanted,) = _in_words(lambda: parse([PublishArguments], _leading("--model_dir", argv), PUBLISH))
    options = {
        name: getattr(wanted, name)
        for name in ("output_dir", "revision", "commit_message", "create_pr")
    }
    options |= {"private": wanted.private or None, "stock": not wanted.no_stock}
    repo_id = None if wanted.dry_run else wanted.repo_id
    done = _in_words(lambda: hub.publish(wanted.model_dir, repo_id, **options))
    if isinstance(done, Path):
        files = sorted(path for path in done.rglob("*") if path.is_file())
        lines = [
            f"{path.stat().st_size:>12,}  {path.relative_to(done).as_posix()}" for path in files
        ]
        where = f"{wanted.repo_id or 'a repository'} (what is in {hub.STOCK_REVISION}/, to the branch of that name)"
        sys.stdout.write("\n".join([f"would be published to {where}:", *lines, ""]))
    else:
        sys.stdout.write(f"published: {done.pr_url or done.commit_url}\n")


def verify(argv: list[str] | None = None) -> None:
    """Entry of `ofb-hf verify`. Prints a table; the exit status is 1 if something differs."""
    classes = [ModelArguments, DataArguments, OFBTrainingArguments]
    parsed = _in_words(lambda: parse(classes, _leading("--model_name_or_path", argv), VERIFY))
    agrees, rows = _closing_processes(
        lambda: _in_words(lambda: verify_workflow.run_verify(*parsed))
    )
    sys.stdout.write(f"{text_table(rows)}\n\n{verify_workflow.summary(rows, agrees)}\n")
    if not agrees:
        raise SystemExit(1)


def export(argv: list[str] | None = None) -> None:
    """Entry of `ofb-hf export`. Prints what was written and how well it agrees."""
    (wanted,) = _in_words(
        lambda: parse([ExportArguments], _leading("--model_name_or_path", argv), EXPORT)
    )
    done = _in_words(lambda: export_workflow.run_export(wanted))
    sys.stdout.write(
        f"exported: {done.path} ({done.size:,} bytes); logits differ by {done.difference:.1e} at "
        f"most\n"
    )


COMMANDS = {
    "plan": plan,
    "latency-table": latency_table,
    "search": search,
    "search-tokens": search_tokens,
    "finetune": finetune,
    "evaluate": evaluate,
    "publish": publish,
    "verify": verify,
    "export": export,
}


def main(argv: list[str] | None = None) -> None:
    """`ofb-hf COMMAND ...`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        wanted = bool(argv) and argv[0] not in ("-h", "--help")
        text = f"usage: ofb-hf {{{','.join(COMMANDS)}}} ...\n\n{__doc__}\n`ofb-hf COMMAND --help` tells more.\n"
        (sys.stderr if wanted or not argv else sys.stdout).write(text)
        raise SystemExit(2 if wanted or not argv else 0)
    COMMANDS[argv[0]](argv[1:])


def _leading(flag: str, argv: list[str] | None) -> list[str]:
    """The words of a command line; a first one that is no flag is the value of `flag`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return [flag, *argv] if argv and not argv[0].startswith("-") else argv


def _in_words(prepare: Callable[[], T]) -> T:
    """Turns what a user can mend before anything has started into one line on stderr and exit
    status 2."""
    try:
        return prepare()
    except (ValueError, OSError, ImportError, hub.PublishError, ExportError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


def _finish(run: Run, start: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """Start a run, publish its output folder if that is asked for, and return its results."""
    results = _closing_processes(lambda: start(run))
    if run.args.push_to_hub:
        _in_words(lambda: push(run))
    return results


def _closing_processes(run: Callable[[], T]) -> T:
    """Ends a distributed run together: left open, the group may abort a process that exits before
    the others."""
    result = run()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return result
