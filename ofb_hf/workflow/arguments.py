"""Settings of the commands: every field of every dataclass here is a flag of `ofb-hf`.

Values that cannot work are refused when an instance is made, before anything is loaded.
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._moved import refusing_renamed
from ..cost.budget import BUDGETS
from ..families.subnet import BASES
from ..models.shapes import SHAPES
from ..release.export import FORMATS
from ..space.configuration import BiMaskConfig
from ..training.arguments import OFBTrainingArguments
from .output import SEARCH_PHASES
from .timing import CLOCKS

# of names that the module had in version 0.1
__getattr__ = refusing_renamed(__name__)

DTYPES = ("float32", "bfloat16", "float16")
MODEL_OR_SHAPE = (
    f"A Hub name or folder with an image classifier, or a named shape: {', '.join(SHAPES)}."
)
MODEL_IS_MISSING = (
    "--model_name_or_path is missing; give a Hub name, a folder, or one of the named shapes "
    f"{', '.join(SHAPES)}."
)


def _setting(default: Any, help: str) -> Any:
    """Return a dataclass field whose help text the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class MeasuredModelArguments:
    """Which classifier to measure."""

    model_name_or_path: str | None = _setting(
        None,
        "A Hub name or folder with an image classifier, or a shape with random weights: "
        f"{', '.join(SHAPES)}.",
    )
    match_labels_by_number: bool = _setting(
        False,
        "Take label 0 of the data for label 0 of the model, and so on, even if their names have "
        "nothing in common.",
    )


@dataclass
class TrainedModelArguments(MeasuredModelArguments):
    """Which classifier to train, with which teacher, and what to keep of it."""

    teacher_name_or_path: str | None = _setting(
        None,
        "Image classifier to learn from. By default a search learns from the dense model itself, "
        "and `ofb-hf finetune` from labels only.",
    )
    new_classifier: bool = _setting(
        False,
        "Give the model a head with random weights for the labels of the data, in place of its "
        "own. A search needs --dense_epochs then, which train it first.",
    )
    guard_images: int | None = _setting(
        None,
        "Training images to hold out, by which a search or a finetuning decides in the end what to "
        "keep: the weights from before the training, those after it, or their average. By default "
        "a twentieth of the images, at most 1,024, and none where that is fewer than 64; 0 = none. "
        "A stream has none.",
    )
    keep_dense: bool = _setting(False, "Keep the model as it was before, in OUTPUT_DIR/dense.")
    overwrite_output_dir: bool = _setting(
        False, "Start over in a folder that already holds a run; its files are replaced."
    )

    def __post_init__(self):
        _require_at_least(self, {"guard_images": 0})
        if self.new_classifier and self.model_name_or_path in SHAPES:
            raise ValueError(
                f"new_classifier is True, but all weights of {self.model_name_or_path}, a named "
                "shape, are random, and its labels are those of the data; leave it out."
            )


@dataclass
class ModelArguments(TrainedModelArguments):
    """Which classifier a search starts from, and how it is trained before."""

    dense_epochs: float = _setting(
        0.0, "Train the dense model this many epochs first (for random weights)."
    )
    dense_learning_rate: float = _setting(1e-3, "Peak learning rate of that training.")

    def __post_init__(self):
        super().__post_init__()
        _require_at_least(self, {"dense_epochs": 0, "dense_learning_rate": 0})
        if self.new_classifier and not self.dense_epochs > 0:
            raise ValueError(
                f"new_classifier is True and dense_epochs is {self.dense_epochs}: the search would "
                "begin with a head of random weights. Say with --dense_epochs how long to train it "
                "first, or give the result of `ofb-hf finetune --new_classifier`."
            )


@dataclass
class SearchArguments(BiMaskConfig):
    """What to search, for one budget or several of one kind.

    Attributes:
        budgets: the numbers that were given for one of `BUDGETS`; a `BiMaskConfig` has one of them.
    """

    target_macs: list[str] | None = _setting(
        None,
        "Budget in MACs: at most 1 = fraction of the dense model, above 1 = absolute. 0.5 if no "
        "target is given. Several budgets (0.7,0.5,0.35) give a model each: every search starts "
        "from the model before it, and they divide the epochs evenly.",
    )
    target_params: list[str] | None = _setting(
        None, "Budget in parameters instead, given in the same way. One search has one target."
    )
    target_latency_ms: list[str] | None = _setting(
        None,
        "Budget in milliseconds of one batch instead, as --latency_table predicts them; always "
        "absolute. Several budgets are possible, too.",
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
                f"search_tokens is True and {self.budget[0]} is {self.budgets}: with several "
                "budgets every search starts from the model before it, and that one has already "
                "lost tokens. Give one budget at a time."
            )

    def by_budget(self) -> dict[str, dict[str, Any]]:
        """Return for each budget its subfolder of the output, and the fields of a `BiMaskConfig`.

        Raises:
            ValueError: for a budget that is no fraction and no count.
        """
        name = self.budget[0]
        configs = {}
        for budget in self.budgets:
            values = self.to_dict() | {name: budget}
            configs[_budget_folder(name, budget)] = BiMaskConfig(**values).to_dict()
        return configs

    @property
    def phases(self) -> tuple[str, ...]:
        """Subfolders of the output folder with checkpoints."""
        if len(self.budgets) == 1:
            return SEARCH_PHASES
        # the dense model is trained once; every budget has the other phases
        dense, *others = SEARCH_PHASES
        phases = [f"{folder}/{phase}" for folder in self.by_budget() for phase in others]
        return dense, *phases


@dataclass
class FinetuneArguments:
    """How a search is followed by finetuning. All other training settings are the search's."""

    finetune_epochs: float = _setting(10.0, "Epochs after the search; 0 = no finetuning.")
    finetune_max_steps: int = _setting(-1, "Optimizer steps instead of epochs; 0 = none.")
    finetune_learning_rate: float = _setting(2e-4, "Peak learning rate of finetuning.")
    finetune_distillation_weight: float = _setting(
        0.5, "Fraction of the finetuning loss that comes from the teacher, 0 = labels only."
    )
    token_pictures: int = _setting(
        4, "Images of the evaluation split in tokens.png, which shows the tokens that remain."
    )

    def __post_init__(self):
        if self.token_pictures < 0:
            raise ValueError(
                f"token_pictures is {self.token_pictures}; it is a number of images, 0 for no "
                "picture."
            )
        _require_at_least(self, {"finetune_epochs": 0, "finetune_learning_rate": 0})
        if not 0 <= self.finetune_distillation_weight <= 1:
            raise ValueError(
                f"finetune_distillation_weight is {self.finetune_distillation_weight}; it is a "
                "fraction between 0 and 1."
            )

    @property
    def is_wanted(self) -> bool:
        """Whether there is any finetuning to do."""
        if self.finetune_max_steps >= 0:
            return self.finetune_max_steps > 0
        return self.finetune_epochs > 0


@dataclass
class TokenPhaseArguments(FinetuneArguments):
    """How a search for tokens is followed by finetuning: by default nothing is trained."""

    finetune_epochs: float = _setting(0.0, "Epochs after the search; 0 = no finetuning.")


@dataclass
class CompressArguments:
    """Which classifier to compress without training, and what the result may cost.

    Attributes:
        given: the numbers that were given for one of `BUDGETS`.
    """

    model_name_or_path: str | None = _setting(
        None, "A Hub name or folder with an image classifier, or with a model without a head."
    )
    target_macs: list[str] | None = _setting(
        None,
        "Budget in MACs: at most 1 = fraction of the given model, above 1 = absolute. 0.5 if no "
        "target is given. Several budgets (0.7,0.5,0.35) give a model each, in a subfolder of its "
        "own.",
    )
    target_params: list[str] | None = _setting(
        None, "Budget in parameters instead, given in the same way."
    )
    target_latency_ms: list[str] | None = _setting(
        None,
        "Budget in milliseconds of one batch instead, as --latency_table predicts them; always "
        "absolute.",
    )
    latency_table: str | None = _setting(
        None, "File of `ofb-hf latency-table`, which measures this machine for this model."
    )
    budgets: list[str] | None = _setting(None, "The same as --target_macs with several budgets.")
    basis: str | None = _setting(
        None,
        "What may be rewritten before the cut: 'equivalent' (heads, and residual streams where the "
        "architecture allows it), 'heads', or 'given' (nothing). By default all that is allowed.",
    )
    search_embedding: bool | None = _setting(
        None, "Cut the width of the residual stream (of every stage). By default true."
    )
    search_attention: bool | None = _setting(None, "Cut heads and their channels. By default true.")
    search_mlp: bool | None = _setting(None, "Cut MLP channels. By default true.")
    search_depth: bool | None = _setting(
        None, "Leave whole attentions and MLPs out. By default true."
    )
    search_tokens: bool | None = _setting(
        None, "Drop and merge tokens as well. By default where the architecture can do it."
    )
    multiple_of: int | None = _setting(
        None, "Channel counts are multiples of this where the given size is. By default 8."
    )
    batch_size: int = _setting(8, "Images that are computed together.")
    seed: int = _setting(0, "Decides which images are drawn.")
    use_cpu: bool = _setting(False, "Compute on the CPU, even if there is a GPU.")
    disable_tqdm: bool = _setting(False, "Show no progress bars.")
    output_dir: str | None = _setting(
        None, "A new folder for model, results and picture; by default runs/MODEL-compressed."
    )
    overwrite_output_dir: bool = _setting(
        False, "Replace the run that OUTPUT_DIR holds; not before the new one is complete."
    )
    keep_dense: bool = _setting(
        False,
        "Keep the given model, in the basis that subnet.json counts in, in OUTPUT_DIR/dense.",
    )

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError(
                "no model is named; give a Hub name or a folder with an image classifier as the "
                "first word, or with --model_name_or_path."
            )
        if self.model_name_or_path in SHAPES:
            raise ValueError(
                f"{self.model_name_or_path} is a named shape, whose weights are random: there is "
                "nothing in it to keep. Give a trained model."
            )
        if self.basis is not None and self.basis not in BASES:
            raise ValueError(
                f"--basis is {self.basis!r}; allowed are {', '.join(map(repr, BASES))}."
            )
        _require_at_least(self, {"batch_size": 1, "multiple_of": 1, "seed": 0})
        if self.output_dir is None:
            name = Path(self.model_name_or_path).resolve().name
            self.output_dir = f"runs/{name}-compressed"
        self._read_budgets()
        self.by_budget()  # refuses each budget that is none

    def _read_budgets(self) -> None:
        flags = [name for name in (*BUDGETS, "budgets") if getattr(self, name) is not None]
        if len(flags) > 1:
            raise ValueError(
                f"{' and '.join(f'--{name}' for name in flags)} are given together; give one of "
                "them, with several numbers for several budgets."
            )
        name = flags[0] if flags else "target_macs"
        numbers = _numbers(name, getattr(self, name))
        self.given = (name if name in BUDGETS else "target_macs", numbers or [0.5])
        if name != "target_latency_ms" and 1.0 in numbers:
            raise ValueError(
                f"--{name} is {numbers}: 1 is the whole model, of which nothing would be removed. "
                "Give a fraction below 1, or a count above it."
            )
        if len(set(self.given[1])) < len(self.given[1]):
            raise ValueError(f"--{name} is {self.given[1]}, with a budget twice; give each once.")

    def by_budget(self) -> dict[str, dict[str, Any]]:
        """Return for each budget its subfolder of the output, and fields of a `BiMaskConfig`.

        Raises:
            ValueError: for a budget that is no fraction and no count.
        """
        names = ("search_embedding", "search_attention", "search_mlp", "search_depth")
        names += ("search_tokens", "multiple_of", "latency_table")
        values = {name: getattr(self, name) for name in names}
        values = {name: value for name, value in values.items() if value is not None}
        kind, numbers = self.given
        configs = {}
        for budget in numbers:
            configs[_budget_folder(kind, budget)] = values | {kind: budget}
            BiMaskConfig(**configs[_budget_folder(kind, budget)])
        return configs


@dataclass
class PublishArguments:
    """What to publish, and where."""

    model_dir: str | None = _setting(
        None, "Output folder of a search, or of save_pretrained of a compressed model."
    )
    repo_id: str | None = _setting(
        None, "Where on the Hub: OWNER/NAME. Created if it does not exist."
    )
    private: bool = _setting(False, "Make a new repository private.")
    revision: str | None = _setting(None, "Branch to commit to, created if it does not exist.")
    commit_message: str | None = _setting(None, "Message of the commit.")
    create_pr: bool = _setting(False, "Open a pull request instead of committing.")
    no_stock: bool = _setting(
        False, "Do not also publish a ViT as a padded stock checkpoint, on the branch `stock`."
    )
    allow_words: list[str] | None = _setting(
        None, "Words that may be published although this account or machine is called so."
    )
    output_dir: str | None = _setting(None, "Also write what is published to this new folder.")
    dry_run: bool = _setting(False, "Only write output_dir, and list what would be sent.")

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

    model_name_or_path: str | None = _setting(
        None, "A Hub name or folder with an image classifier, stock or compressed."
    )
    format: str = _setting("onnx", "onnx: model.onnx; torch: model.pt2 of torch.export.")
    output_dir: str | None = _setting(None, "A new folder for the exported file.")

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
    """For which model and how many images a search is planned; the rest is as in the search."""

    model_name_or_path: str | None = _setting(None, MODEL_OR_SHAPE)
    # ImageNet-1k's training split
    num_images: int = _setting(1_281_167, "Training images of an epoch; ImageNet-1k's by default.")
    num_labels: int = _setting(1000, "Labels of a named shape; a checkpoint has its own.")

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError(MODEL_IS_MISSING)
        _require_at_least(self, {"num_images": 1, "num_labels": 1})


@dataclass
class LatencyTableArguments:
    """What to measure, and how."""

    model_name_or_path: str | None = _setting(None, MODEL_OR_SHAPE)
    output: str = _setting("latency_table.json", "JSON file to write; an existing one is replaced.")
    num_labels: int = _setting(1000, "Labels of a named shape; a checkpoint has its own.")
    batch_size: int = _setting(1, "Images that are computed together.")
    num_threads: int | None = _setting(None, "Threads on a CPU; by default those of torch.")
    device: str | None = _setting(None, "cpu or cuda; by default a GPU where there is one.")
    dtype: str = _setting("float32", f"Of weights and images: {', '.join(DTYPES)}.")
    multiple_of: int | None = _setting(
        None, "Measured channel counts are multiples of this; by default as in a search."
    )
    networks: int = _setting(24, "Networks to fit to, the dense one among them.")
    rounds: int = _setting(8, "How often each network is measured; more on a busy machine.")
    clock: str = _setting(
        "wall",
        "wall, or cpu: CPU time of a single thread, which other work on the machine hardly "
        "lengthens.",
    )
    seed: int = _setting(0, "Seed of the networks' sizes.")
    disable_tqdm: bool = _setting(False, "Show no progress bar.")

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError(MODEL_IS_MISSING)
        if self.num_threads is None:
            self.num_threads = torch.get_num_threads()
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        lowest = dict.fromkeys(("num_labels", "batch_size", "num_threads", "rounds"), 1)
        _require_at_least(self, lowest | {"multiple_of": 1, "networks": 8})
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}; allowed are cpu and cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device is cuda, but there is no GPU that torch can use here; give cpu."
            )
        if self.clock not in CLOCKS:
            raise ValueError(f"--clock is {self.clock!r}; allowed are {' and '.join(CLOCKS)}.")
        if self.clock == "cpu" and (self.device, self.num_threads) != ("cpu", 1):
            raise ValueError(
                f"--clock is cpu, with --device {self.device} and --num_threads "
                f"{self.num_threads}; CPU time says how long something takes with one thread on a "
                "CPU only. Give --num_threads 1 there, or --clock wall."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}.")


def _require_at_least(arguments: Any, lowest: dict[str, int]) -> None:
    """Raise ValueError for fields below their lowest value; None is left to its default."""
    for name, least in lowest.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:  # not so for NaN
            raise ValueError(f"--{name} is {value}; it must be finite and at least {least}.")


def _numbers(name: str, words: list[Any] | float | None) -> list[float]:
    """Return the budgets in the words of a flag, which commas or spaces separate."""
    if words is None:
        return []
    if not isinstance(words, list):
        words = [words]
    numbers = []
    for word in words:
        numbers += [number for number in str(word).split(",") if number.strip()]
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        shown = ", ".join(numbers) or ", ".join(map(str, words))
        raise ValueError(f"{name} is {shown}; give numbers, as 0.5 or 0.7,0.5,0.35.")
    return values


def _budget_folder(name: str, budget: float) -> str:
    """Return the subfolder for one of several budgets."""
    # MACs and parameters are whole numbers: the folder is target_macs-1100000000
    is_count = name != "target_latency_ms" and budget > 1
    return f"{name}-{int(budget) if is_count else budget}"


def changed(args: OFBTrainingArguments, **changes: Any) -> OFBTrainingArguments:
    """Return a copy of training arguments with some fields set.

    It is no `dataclasses.replace`: that would run their checks, and set up devices, once more.
    """
    copied = copy.copy(args)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied
