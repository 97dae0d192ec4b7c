"""Command line and YAML: every field of every argument class is a flag; a file gives defaults, the
line wins."""

import argparse
import copy
import json
import os
import shlex
import sys
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from ..cost.budget import BUDGETS
from ..data import DataArguments
from ..models.shapes import SHAPES
from ..release.export import FORMATS
from ..space.configuration import BiMaskConfig
from ..training.arguments import OFBTrainingArguments
from .output import SEARCH_PHASES

# Training arguments that decide the result of a run, beside batch sizes and precision. Those that
# only say how it is watched, saved or fed may change when it is resumed.
DECISIVE = (
    *(
        "seed",
        "data_seed",
        "max_steps",
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler_kwargs",
        "warmup_steps",
    ),
    *(
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "label_smoothing_factor",
    ),
    *("distillation_weight", "distillation_type", "distillation_temperature", "ema_decay"),
)
DTYPES = ("float32", "bfloat16", "float16")
DEMO_CONFIG = Path(__file__).with_name("demo.yaml")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelArguments:
    """Which classifier to start from, and what to keep of it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata=_help(
            f"A Hub name or folder with an image classifier, or a shape with random weights: "
            f"{', '.join(SHAPES)}."
        ),
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata=_help("Image classifier to learn from; by default the dense model itself."),
    )
    dense_epochs: float = field(
        default=0.0,
        metadata=_help("Train the dense model this many epochs first (for random weights)."),
    )
    dense_learning_rate: float = field(
        default=1e-3, metadata=_help("Learning rate of that training.")
    )
    keep_dense: bool = field(
        default=False, metadata=_help("Keep the dense model in OUTPUT_DIR/dense.")
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=_help("Start over in a folder that already holds a run; its files are replaced."),
    )


@dataclass
class SearchArguments(BiMaskConfig):
    """What to search, for one budget or several of one kind.

    Attributes:
        budgets: the numbers that were given for one of `BUDGETS`; a `BiMaskConfig` has one of them.
    """

    target_macs: list[str] | None = field(
        default=None,
        metadata=_help(
            "Budget in MACs: at most 1 = share of the dense model, above 1 = absolute. 0.5 if no "
            "target is given. "
            "Several (0.7,0.5,0.35) give a family: each model is searched on from the one before, "
            "and the epochs of "
            "the search are shared out evenly."
        ),
    )
    target_params: list[str] | None = field(
        default=None,
        metadata=_help("Budget in parameters instead, likewise. Give one target, not both."),
    )
    target_latency_ms: list[str] | None = field(
        default=None,
        metadata=_help(
            "Budget in milliseconds of one batch instead, as --latency_table predicts them; "
            "always absolute. Several "
            "give a family."
        ),
    )

    def __post_init__(self):
        given = {name: _numbers(name, getattr(self, name)) for name in BUDGETS}
        for name, budgets in given.items():
            setattr(self, name, budgets[0] if budgets else None)
        super().__post_init__()
        self.budgets = given[self.budget[0]] or [self.budget[1]]
        self.by_budget()  # refuses each budget that is none
        if self.search_tokens and len(self.budgets) > 1:
            raise ValueError(
                f"search_tokens is True and {self.budget[0]} is {self.budgets}: a family is "
                f"searched on from model to "
                "model, and the first one's tokens would be gone already. Give one budget at a "
                "time."
            )

    def by_budget(self) -> dict[str, dict[str, Any]]:
        """For each budget its subfolder of the output, and the fields of a `BiMaskConfig`.

        Raises:
            ValueError: for a budget that is no share and no count.
        """
        name = self.budget[0]
        is_count = name != "target_latency_ms"
        return {
            f"{name}-{int(b) if is_count and b > 1 else b}": BiMaskConfig(
                **self.to_dict() | {name: b}
            ).to_dict()
            for b in self.budgets
        }

    @property
    def phases(self) -> tuple[str, ...]:
        """Subfolders of the output folder with checkpoints."""
        if len(self.budgets) == 1:
            return SEARCH_PHASES
        return SEARCH_PHASES[0], *(
            f"{folder}/{phase}" for folder in self.by_budget() for phase in SEARCH_PHASES[1:]
        )


@dataclass
class FinetuneArguments:
    """What follows the search. All other settings of the training are those of the search."""

    finetune_epochs: float = field(
        default=10.0, metadata=_help("Epochs after the search; 0 = no finetuning.")
    )
    finetune_max_steps: int = field(
        default=-1, metadata=_help("Optimizer steps instead of epochs; 0 = none.")
    )
    finetune_learning_rate: float = field(
        default=2e-4, metadata=_help("Peak learning rate of finetuning.")
    )
    finetune_distillation_weight: float = field(
        default=0.5, metadata=_help("Share of the teacher in the finetuning loss, 0 = labels only.")
    )
    token_pictures: int = field(
        default=4,
        metadata=_help(
            "Images of the evaluation split in tokens.png, which shows what fewer tokens make of "
            "them."
        ),
    )

    def __post_init__(self):
        if self.token_pictures < 0:
            raise ValueError(
                f"token_pictures is {self.token_pictures}; it is a number of images, 0 for no "
                f"picture."
            )
        if not 0 <= self.finetune_distillation_weight <= 1:
            raise ValueError(
                f"finetune_distillation_weight is {self.finetune_distillation_weight}; it is a "
                f"share between 0 and 1."
            )

    @property
    def is_wanted(self) -> bool:
        """Whether there is any finetuning to do."""
        return self.finetune_max_steps > 0 or (
            self.finetune_max_steps < 0 and self.finetune_epochs > 0
        )


@dataclass
class TokenPhaseArguments(FinetuneArguments):
    """What follows the search for tokens: by default nothing is trained."""

    finetune_epochs: float = field(
        default=0.0, metadata=_help("Epochs after the search; 0 = no finetuning.")
    )


@dataclass
class PublishArguments:
    """What to publish, and where."""

    model_dir: str | None = field(
        default=None,
        metadata=_help("Output folder of a search, or of save_pretrained of one of our models."),
    )
    repo_id: str | None = field(
        default=None, metadata=_help("Where on the Hub: OWNER/NAME. Made if it is not there.")
    )
    private: bool = field(
        default=False, metadata=_help("A repository that is made now is private.")
    )
    revision: str | None = field(
        default=None, metadata=_help("Branch to commit to, made if it is not there.")
    )
    commit_message: str | None = field(default=None, metadata=_help("Message of the commit."))
    create_pr: bool = field(
        default=False, metadata=_help("Open a pull request instead of committing.")
    )
    no_stock: bool = field(
        default=False,
        metadata=_help(
            "Do not also publish a ViT as a padded stock checkpoint, on the branch `stock`."
        ),
    )
    output_dir: str | None = field(
        default=None, metadata=_help("Also write what is published to this new folder.")
    )
    dry_run: bool = field(
        default=False, metadata=_help("Only write output_dir, and list what would be sent.")
    )

    def __post_init__(self):
        if self.model_dir is None:
            raise ValueError("--model_dir is missing; give the output folder of a search.")
        if self.dry_run and self.output_dir is None:
            raise ValueError(
                "--dry_run writes what would be published; say where with --output_dir."
            )
        if self.repo_id is None and not self.dry_run:
            raise ValueError("--repo_id is missing; give OWNER/NAME, or --dry_run.")


@dataclass
class ExportArguments:
    """What to export, how, and where to."""

    model_name_or_path: str | None = field(
        default=None,
        metadata=_help("A Hub name or folder with an image classifier, stock or ours."),
    )
    format: str = field(
        default="onnx", metadata=_help("onnx: model.onnx; torch: model.pt2 of torch.export.")
    )
    output_dir: str | None = field(
        default=None, metadata=_help("A new folder for the exported file.")
    )

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError(
                "--model_name_or_path is missing; give a Hub name or a folder with an image "
                "classifier."
            )
        if self.format not in FORMATS:
            raise ValueError(
                f"--format is {self.format!r}; known formats are {', '.join(FORMATS)}."
            )
        if self.output_dir is None:
            raise ValueError("--output_dir is missing; give a folder for the exported file.")


@dataclass
class PlanArguments:
    """For which model and how many images a search is planned. Budgets and training are those of
    the search."""

    model_name_or_path: str | None = field(
        default=None,
        metadata=_help(
            f"A Hub name or folder with an image classifier, or a shape: {', '.join(SHAPES)}."
        ),
    )
    num_images: int = field(
        default=1_281_167, metadata=_help("Training images of an epoch; by default ImageNet-1k's.")
    )
    num_labels: int = field(
        default=1000, metadata=_help("Labels of a named shape; a checkpoint has its own.")
    )

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError(
                f"--model_name_or_path is missing; give a Hub name, a folder, or one of "
                f"{', '.join(SHAPES)}."
            )
        for name in ("num_images", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass
class LatencyTableArguments:
    """What to measure, and how."""

    model_name_or_path: str | None = field(
        default=None,
        metadata=_help(
            f"A Hub name or folder with an image classifier, or a shape: {', '.join(SHAPES)}."
        ),
    )
    output: str = field(
        default="latency_table.json", metadata=_help("JSON file to write; replaced if it is there.")
    )
    num_labels: int = field(
        default=1000, metadata=_help("Labels of a named shape; a checkpoint has its own.")
    )
    batch_size: int = field(default=1, metadata=_help("Images that are computed together."))
    num_threads: int | None = field(
        default=None, metadata=_help("Threads on a CPU; by default as many as torch takes.")
    )
    device: str | None = field(
        default=None, metadata=_help("cpu or cuda; by default a GPU where there is one.")
    )
    dtype: str = field(
        default="float32", metadata=_help(f"Of weights and images: {', '.join(DTYPES)}.")
    )
    multiple_of: int | None = field(
        default=None,
        metadata=_help("Measured channel counts are multiples of this; by default as in a search."),
    )
    networks: int = field(
        default=24, metadata=_help("Networks to fit to, the dense one among them.")
    )
    rounds: int = field(
        default=8, metadata=_help("How often each has its turn; more on a busy machine.")
    )
    clock: str = field(
        default="wall",
        metadata=_help(
            "wall, or cpu: CPU time of a single thread, which other work on the machine hardly "
            "adds to."
        ),
    )
    seed: int = field(default=0, metadata=_help("Of their sizes."))
    disable_tqdm: bool = field(default=False, metadata=_help("No progress bar."))

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError(
                f"--model_name_or_path is missing; give a Hub name, a folder, or one of "
                f"{', '.join(SHAPES)}."
            )
        self.num_threads = torch.get_num_threads() if self.num_threads is None else self.num_threads
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        least = {
            "num_labels": 1,
            "batch_size": 1,
            "num_threads": 1,
            "networks": 8,
            "rounds": 1,
            "multiple_of": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"--{name} is {value}; it must be at least {lowest}.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}; allowed are cpu and cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device is cuda, but there is no GPU that torch can use here; give cpu."
            )
        if self.clock not in ("wall", "cpu"):
            raise ValueError(f"--clock is {self.clock!r}; allowed are wall and cpu.")
        if self.clock == "cpu" and (self.device, self.num_threads) != ("cpu", 1):
            raise ValueError(
                f"--clock is cpu, with --device {self.device} and --num_threads "
                f"{self.num_threads}; CPU time says how "
                "long something takes with one thread on a CPU only. Give --num_threads 1 there, "
                "or --clock wall."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}.")


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


def _numbers(name: str, words: list[Any] | float | None) -> list[float]:
    """The budgets in the words of a flag: apart from each other by commas or spaces."""
    words = words if isinstance(words, list) else [] if words is None else [words]
    numbers = [number for word in words for number in str(word).split(",") if number.strip()]
    try:
        return [float(number) for number in numbers]
    except ValueError:
        raise ValueError(
            f"{name} is {', '.join(numbers)}; give numbers, as 0.5 or 0.7,0.5,0.35."
        ) from None


def training_settings(args: OFBTrainingArguments, data_args: DataArguments) -> dict[str, Any]:
    """What of the training arguments decides the result; a resumed run must agree with it."""
    settings = {name: getattr(args, name) for name in DECISIVE}
    settings |= {
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "optim": str(getattr(args.optim, "value", args.optim)),
    }
    # A launcher's configuration sets the precision where no flag does.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    settings["mixed_precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else launched
    batch_size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    settings["total_train_batch_size"] = batch_size * accumulated * args.world_size
    settings |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulated,
    }
    settings["num_processes"] = args.world_size
    if data_args.streaming:  # whose order is dealt out to the workers
        settings["dataloader_num_workers"] = args.dataloader_num_workers
    return settings


def phase_arguments(args: OFBTrainingArguments, phase: str, **changes: Any) -> OFBTrainingArguments:
    """A copy of the training arguments for one phase, which checkpoints into its own subfolder of
    the output."""
    return changed(
        args, output_dir=str(Path(args.output_dir) / phase), push_to_hub=False, **changes
    )


def changed(args: OFBTrainingArguments, **changes: Any) -> OFBTrainingArguments:
    """A copy of the training arguments with some fields set."""
    copied = copy.copy(args)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


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
