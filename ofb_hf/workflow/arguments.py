"""Arguments of the commands: every field of every class here is a flag of `ofb-hf`."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cost.budget import BUDGETS
from ..models.shapes import SHAPES
from ..release.export import FORMATS
from ..space.configuration import BiMaskConfig
from ..training.arguments import OFBTrainingArguments
from .output import SEARCH_PHASES

DTYPES = ("float32", "bfloat16", "float16")


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
