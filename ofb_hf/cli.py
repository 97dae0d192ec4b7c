"""The commands of `ofb-hf`, as functions of a command line; the recipes call the same functions.

`ofb_hf_command.py` has the list of commands and chooses among them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ofb_hf_command import COMMANDS, main

from .cost.latency import LatencyTable
from .data import AugmentationArguments, DataArguments, ImageArguments
from .families.registry import FAMILIES
from .release import hub
from .release.export import ExportError
from .token_search.learned_counts import TokenSearchConfig
from .training.arguments import OFBTrainingArguments
from .workflow import compress as compress_workflow
from .workflow import export as export_workflow
from .workflow import finetune as finetune_workflow
from .workflow import latency_table as latency_table_workflow
from .workflow import plan as plan_workflow
from .workflow import search as search_workflow
from .workflow import search_tokens as tokens_workflow
from .workflow import several_budgets as several_budgets_workflow
from .workflow import verify as verify_workflow
from .workflow.arguments import (
    CompressArguments,
    ExportArguments,
    FinetuneArguments,
    LatencyTableArguments,
    MeasuredModelArguments,
    ModelArguments,
    PlanArguments,
    PublishArguments,
    SearchArguments,
    TokenPhaseArguments,
    TrainedModelArguments,
)
from .workflow.command_line import parse
from .workflow.compress_inputs import PASSES, prepare
from .workflow.flag_help import TRACEBACK, Command
from .workflow.report import text_table
from .workflow.results import push
from .workflow.run import EndedEarlyError, Run

FIELDS_OF_IMAGES = tuple(field.name for field in fields(ImageArguments))
BUDGET = ("target_macs", "target_params", "target_latency_ms", "latency_table")
DATA = ("dataset_name", "data_dir")
MODEL_TYPES = ", ".join(config.model_type for config in FAMILIES)

SEARCH = Command(
    "search",
    (
        *(ModelArguments, DataArguments, AugmentationArguments),
        *(SearchArguments, FinetuneArguments, OFBTrainingArguments),
    ),
    f"""{COMMANDS["search"].summary}

Models: classifiers of transformers or of this package, of type {MODEL_TYPES}.

Without a model and data this runs the embedded demonstration on handwritten digits (a few minutes
on a CPU). Otherwise name a model, data and a budget:

    accelerate launch recipes/search_deit.py --model_name_or_path facebook/deit-small-patch16-224 \\
        --data_dir PHOTOS --target_macs 0.5 --num_train_epochs 20 --finetune_epochs 30 \\
        --output_dir runs/half

PHOTOS is a folder with one subfolder per class, or with parquet files. If the model knows other
labels than these, add --new_classifier --dense_epochs 10, which train it first. Several budgets
(--target_macs 0.7,0.5,0.35) give one model each, in a folder of its own. A budget may be in
milliseconds (--target_latency_ms 20 --latency_table FILE of `ofb-hf latency-table`).

--num_train_epochs, --learning_rate and all other training flags are for the search; finetuning has
its own --finetune_* flags. --config FILE.yaml reads settings from a file,
--resume_from_checkpoint auto continues an interrupted run.""",
    {
        "model and data": ("model_name_or_path", *DATA),
        "budget": BUDGET,
        "training": ("num_train_epochs", "learning_rate", "per_device_train_batch_size"),
        "finetuning": ("finetune_epochs", "finetune_learning_rate"),
        "output": ("output_dir", "resume_from_checkpoint"),
    },
)

SEARCH_TOKENS = Command(
    "search-tokens",
    (
        *(ModelArguments, DataArguments, AugmentationArguments),
        *(TokenSearchConfig, TokenPhaseArguments, OFBTrainingArguments),
    ),
    f"""{COMMANDS["search-tokens"].summary}

Takes any ViT classifier, also one that `ofb-hf search` made narrower, and learns under a budget
how many patch tokens each layer drops and merges. Without a model and data this runs on handwritten
digits. Otherwise:

    accelerate launch recipes/search_tokens.py --target_macs 0.6 --num_train_epochs 3 \\
        --model_name_or_path facebook/deit-small-patch16-224 --data_dir PHOTOS \\
        --output_dir runs/tokens

A budget may be in milliseconds (--target_latency_ms 20 --latency_table FILE of
`ofb-hf latency-table`). Published schedules of DeiT-T/S/B need no search:
ofb_hf.tokens.published_schedule. --finetune_epochs trains the weights afterwards, with the tokens
that remain. tokens.png shows for some images which tokens these are.""",
    {
        "model and data": ("model_name_or_path", *DATA),
        "budget": ("target_macs", "target_latency_ms", "latency_table"),
        "training": ("num_train_epochs", "token_learning_rate", "per_device_train_batch_size"),
        "finetuning": ("finetune_epochs", "finetune_learning_rate"),
        "output": ("output_dir", "resume_from_checkpoint"),
    },
)

FINETUNE = Command(
    "finetune",
    (TrainedModelArguments, DataArguments, AugmentationArguments, OFBTrainingArguments),
    f"""{COMMANDS["finetune"].summary}

    ofb-hf finetune --model_name_or_path runs/half --teacher_name_or_path \\
        facebook/deit-small-patch16-224 --data_dir PHOTOS --num_train_epochs 30 \\
        --output_dir runs/longer

A model for other labels than those of PHOTOS gets a head for these with --new_classifier.""",
    {
        "model and data": (
            *("model_name_or_path", "new_classifier", "teacher_name_or_path", *DATA),
            "augmentation",
        ),
        "training": (
            *("num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps"),
            *("weight_decay", "per_device_train_batch_size"),
        ),
        "output": ("output_dir", "resume_from_checkpoint"),
    },
)

COMPRESS = Command(
    "compress",
    (CompressArguments, ImageArguments),
    f"""{COMMANDS["compress"].summary}

    ofb-hf compress MODEL IMAGES --target_macs 0.5

MODEL is a classifier of transformers or of this package, of type {MODEL_TYPES}.
IMAGES are some hundred photos of the kind that the model is for: a folder of any layout, parquet
files, or a data set of the Hub. They need no labels; where there are labels that the model knows,
its accuracy is reported as well.

It takes about as long as the model takes for {PASSES} x --num_images images. The result agrees as
nearly with the given model as the budget allows. Several budgets (--target_macs 0.7,0.5,0.35) are
met from one measuring. For more accuracy under a strong budget, train afterwards (`ofb-hf
finetune`) or search (`ofb-hf search`).""",
    {
        "model and images": (
            *("model_name_or_path", "data_dir", "dataset_name", "num_images", "eval_split"),
        ),
        "budget": ("target_macs", "target_params", "target_latency_ms", "latency_table"),
        "how it is computed": ("basis", "use_cpu"),
        "output": ("output_dir", "overwrite_output_dir", "keep_dense"),
    },
    {
        "model and images": ("config", "model_name_or_path", *FIELDS_OF_IMAGES),
        "budget": (*BUDGET, "budgets"),
        "what may be cut": ("basis", "search_*", "multiple_of"),
        "how it is computed": ("batch_size", "seed", "use_cpu", "disable_tqdm"),
        "output": ("output_dir", "overwrite_output_dir", "keep_dense", TRACEBACK),
    },
)

MEASURING = {
    "model and data": ("model_name_or_path", *DATA, "eval_split", "max_eval_samples"),
    "speed": ("per_device_eval_batch_size", "dataloader_num_workers", "bf16", "use_cpu"),
}

EVALUATE = Command(
    "evaluate",
    (MeasuredModelArguments, DataArguments, OFBTrainingArguments),
    f"""{COMMANDS["evaluate"].summary}

    ofb-hf evaluate --model_name_or_path runs/half --data_dir PHOTOS

Prints JSON and writes no file.""",
    MEASURING,
)

VERIFY = Command(
    "verify",
    (MeasuredModelArguments, DataArguments, OFBTrainingArguments),
    f"""{COMMANDS["verify"].summary}

    ofb-hf verify OWNER/NAME --data_dir PHOTOS

The exit status is 1 if anything differs.""",
    MEASURING,
)

PUBLISH = Command(
    "publish",
    (PublishArguments,),
    f"""{COMMANDS["publish"].summary}

    ofb-hf publish runs/half --repo_id OWNER/NAME

One commit holds weights, config, code of the model, image processor, results, picture and card;
the result loads with and without this package. Before anything is sent, files are searched for
access tokens, names and folders of this machine. --dry_run shows what would be sent.""",
)

EXPORT = Command(
    "export",
    (ExportArguments,),
    f"""{COMMANDS["export"].summary}

    ofb-hf export OWNER/NAME --format onnx --output_dir out

The file takes `pixel_values` (B, C, H, W) in float32, for any B, and returns `logits`; the image
processor, which prepares the pixels, is written next to it. If logits differ from those of PyTorch
by more than 1e-5 of the largest, no file remains.""",
)

PLAN = Command(
    "plan",
    (PlanArguments, SearchArguments, OFBTrainingArguments),
    f"""{COMMANDS["plan"].summary}

    ofb-hf plan deit_small --target_macs 0.7,0.5 --per_device_train_batch_size 64 \\
        --num_train_epochs 20

Counts the subnets of the search space and what each budget leaves of the model; runs some steps on
random images, and predicts the time for --num_images. With --latency_table it predicts
milliseconds, too. Flags of the search that decide what is searched, or what a step costs, may be
given as well. Nothing is written.""",
    {
        "model and data": ("model_name_or_path", "num_images", "num_labels"),
        "budget": BUDGET,
        "training": (
            *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
            *("bf16", "use_cpu"),
        ),
    },
)

LATENCY_TABLE = Command(
    "latency-table",
    (LatencyTableArguments,),
    f"""{COMMANDS["latency-table"].summary}

    ofb-hf latency-table deit_small --batch_size 1 --num_threads 2 --output deit_small.json
    ofb-hf search ... --latency_table deit_small.json --target_latency_ms 25
    ofb-hf search-tokens ... --latency_table deit_small.json --target_latency_ms 25

Takes some minutes. Networks of random sizes from the model's search space, and for a ViT with
random token schedules, take turns; the time of each half of a block is fitted as a sum over its
widths and tokens. The table, in JSON, holds measurements, fit and settings, and how well it
predicts whole networks that were not used for the fit. It is valid for this model, this machine,
this number of threads and this batch size: measure again for others, on an idle machine if you can.
""".rstrip(),
)

# The demonstration of `ofb-hf search` learns from labels only. Here the dense model is the teacher,
# with the weight that it has by default.
TOKEN_DEMO = {
    "output_dir": "runs/demo_tokens",
    "num_train_epochs": 10,
    "finetune_epochs": 0,
    "distillation_weight": None,
}


def plan(argv: list[str] | None = None) -> dict[str, Any]:
    """Run `ofb-hf plan`: print and return the plan."""
    with exit_with_message(argv):
        parsed = parse(PLAN, _leading("--model_name_or_path", argv))
        planned = plan_workflow.run_plan(*parsed)
    _end_together()
    sys.stdout.write(f"{plan_workflow.plan_text(planned)}\n")
    return planned


def latency_table(argv: list[str] | None = None) -> LatencyTable:
    """Run `ofb-hf latency-table`: print what was measured, and return the table."""
    with exit_with_message(argv):
        (wanted,) = parse(LATENCY_TABLE, _leading("--model_name_or_path", argv))
        table = latency_table_workflow.run_latency_table(wanted)
    sys.stdout.write(f"{latency_table_workflow.table_text(table)}\nwritten to {wanted.output}\n")
    return table


def search(argv: list[str] | None = None, **demo: Any) -> dict[str, Any]:
    """Run `ofb-hf search` or a search recipe, and return the results.

    Args:
        argv: words of the command line, None for the process's own.
        demo: settings of the demonstration, which runs when neither model nor data are named.
    """
    with exit_with_message(argv):
        run = search_workflow.prepare(*parse(SEARCH, argv, demo))
    if len(run.targets) == 1:
        return _finish(run, search_workflow.run_search, argv)
    return _finish(run, several_budgets_workflow.run_several_budgets, argv)


def search_tokens(argv: list[str] | None = None) -> dict[str, Any]:
    """Run `ofb-hf search-tokens` or `recipes/search_tokens.py`, and return the results."""
    with exit_with_message(argv):
        run = tokens_workflow.prepare(*parse(SEARCH_TOKENS, argv, TOKEN_DEMO))
    return _finish(run, tokens_workflow.run_search_tokens, argv)


def compress(argv: list[str] | None = None) -> dict[str, Any]:
    """Run `ofb-hf compress` or `recipes/compress.py`, and return the results."""
    # Nothing is written before everything is there, so that no error leaves a half of it.
    with exit_with_message(argv):
        parsed = parse(COMPRESS, _leading(("--model_name_or_path", "--images"), argv))
        results = compress_workflow.run_compress(prepare(*parsed))
    _end_together()
    return results


def finetune(argv: list[str] | None = None) -> dict[str, Any]:
    """Run `ofb-hf finetune` or `recipes/finetune.py`, and return the results."""
    with exit_with_message(argv):
        run = finetune_workflow.prepare(*parse(FINETUNE, argv))
    return _finish(run, finetune_workflow.run_finetune, argv)


def evaluate(argv: list[str] | None = None) -> dict[str, Any]:
    """Run `ofb-hf evaluate` or `recipes/evaluate.py`: print and return the results."""
    with exit_with_message(argv):
        results = finetune_workflow.run_evaluate(*parse(EVALUATE, argv))
    _end_together()
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    return results


def verify(argv: list[str] | None = None) -> None:
    """Run `ofb-hf verify`: print a table, and exit with status 1 if anything differs."""
    with exit_with_message(argv):
        parsed = parse(VERIFY, _leading("--model_name_or_path", argv))
        agrees, rows = verify_workflow.run_verify(*parsed)
    _end_together()
    sys.stdout.write(f"{text_table(rows)}\n\n{verify_workflow.summary(rows, agrees)}\n")
    if not agrees:
        raise SystemExit(1)


def export(argv: list[str] | None = None) -> None:
    """Run `ofb-hf export`: print what was written and how well it agrees."""
    with exit_with_message(argv):
        (wanted,) = parse(EXPORT, _leading("--model_name_or_path", argv))
        done = export_workflow.run_export(wanted)
    sys.stdout.write(
        f"exported: {done.path} ({done.size:,} bytes); logits differ by at most "
        f"{done.difference:.1e}\n"
    )


def publish(argv: list[str] | None = None) -> None:
    """Run `ofb-hf publish` or `recipes/publish.py`: print what was sent, and where it is now."""
    with exit_with_message(argv):
        (wanted,) = parse(PUBLISH, _leading("--model_dir", argv))
        done = hub.publish(
            wanted.model_dir,
            None if wanted.dry_run else wanted.repo_id,
            output_dir=wanted.output_dir,
            revision=wanted.revision,
            commit_message=wanted.commit_message,
            create_pr=wanted.create_pr,
            # without the flag, the Hub's default for the owner of the repository holds
            private=wanted.private or None,
            stock=not wanted.no_stock,
            allow_words=wanted.allow_words or (),
        )
    if not isinstance(done, Path):
        sys.stdout.write(f"published: {done.pr_url or done.commit_url}\n")
        return
    repository = wanted.repo_id or "a repository"
    lines = [
        f"would be published to {repository} (what is in {hub.STOCK_REVISION}/, to the branch of "
        "that name):"
    ]
    for path in sorted(done.rglob("*")):
        if path.is_file():
            name = path.relative_to(done).as_posix()
            lines.append(f"{path.stat().st_size:>12,}  {name}")
    sys.stdout.write("\n".join([*lines, ""]))


def _leading(flags: str | tuple[str, ...], argv: list[str] | None) -> list[str]:
    """Return the words of a command line; first words that are no flags are values of `flags`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = (flags,) if isinstance(flags, str) else flags
    named: list[str] = []
    for flag in flags:
        if not argv or argv[0].startswith("-"):
            break
        named += [flag, argv.pop(0)]
    return named + argv


# What a user can repair: a setting, the data, a folder, a missing package, too little memory.
REPAIRABLE = (
    *(ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError),
    *(hub.PublishError, ExportError, EndedEarlyError),
)


@contextmanager
def exit_with_message(argv: list[str] | None, status: int = 2, more: str = "") -> Iterator[None]:
    """Turn an error that the user can repair into one line on stderr and an exit status.

    Other errors, and with `--traceback` all of them, keep their traceback.

    Args:
        argv: words of the command line, None for the process's own.
        status: 2 before anything has changed, 1 in the middle of a run.
        more: what to say behind the error.
    """
    try:
        yield
    except REPAIRABLE as error:
        if f"--{TRACEBACK}" in (sys.argv[1:] if argv is None else argv):
            raise
        sys.stderr.write(f"error: {_sentence(error)}{more}\n")
        raise SystemExit(status) from error


def _sentence(error: Exception) -> str:
    """Return what an error says, without the traceback that a loader's worker puts before it."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text


def _finish(
    run: Run, start: Callable[[Run], dict[str, Any]], argv: list[str] | None
) -> dict[str, Any]:
    """Start a run, publish its output folder if that is asked for, and return its results."""
    more = f" ({run.folder} is marked by FAILED.txt; --{TRACEBACK} shows where this was raised.)"
    with exit_with_message(argv, status=1, more=more):
        results = start(run)
    _end_together()
    if run.args.push_to_hub:
        with exit_with_message(argv):
            push(run)
    return results


def _end_together() -> None:
    """End a distributed run on all processes at once.

    A process that exits while the group is open may be aborted before the others are done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


__all__ = [
    "compress",
    "evaluate",
    "export",
    "finetune",
    "latency_table",
    "main",
    "plan",
    "publish",
    "search",
    "search_tokens",
    "verify",
]
