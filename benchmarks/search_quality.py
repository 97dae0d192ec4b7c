"""Compare the search with other methods: one checkpoint, one data set, equal epochs, many seeds.

    search            a search with the default preset
    depth             `search` with `search_depth`: it may leave out whole attentions and MLPs
    tokens            `search` with `search_depth` and `search_tokens` (ViT)
    bi_mask           a search with the preset "bi_mask", the default of version 0.1
    equivalent        `bi_mask` of the dense model rewritten in the equivalent basis
    curves            the same, with importance from error curves
    paper             a search with the preset of the paper, then finetuning
    frozen            compression without training (`ofb-hf compress`), and no training after it
    frozen_finetuned  the same, then trained for the remaining epochs
    uniform           the same fraction of every width, units by magnitude
    random            random sizes and units, --num_random draws
    l1, taylor        one-shot pruning by magnitude, and by first-order importance on training data
    taylor_fitted     `taylor` with the least-squares fit of the search
    torch_pruning     torch-pruning's importance and pruner, if it is installed
    scratch           the sizes of `uniform`, trained from random weights
    dense             the dense model, trained for the same extra epochs

All of them start from the same dense checkpoint (except `scratch`), end under the same budget,
train for the same total number of epochs, and learn from the same teacher, the dense checkpoint.
Searches hold out a twentieth of the training images, which choose the weights to keep.
Every finished run is a line of results.jsonl; run the command again to continue after an
interruption.

    python benchmarks/search_quality.py --model vit-cifar10 --data_dir cifar10 \\
        --output_dir runs/quality --quick
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from search_quality_report import write_report
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ofb_hf import (
    OFBTrainer,
    OFBTrainingArguments,
    compress,
    compress_frozen,
    count_macs,
    count_params,
)
from ofb_hf.choice import baselines
from ofb_hf.data import DataArguments
from ofb_hf.families.registry import family_of
from ofb_hf.pruning.fit import fit_
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.configuration import BiMaskConfig, default_config
from ofb_hf.training.distillation import DistillationTrainer
from ofb_hf.training.history import read_history
from ofb_hf.workflow.inputs import Inputs, load
from ofb_hf.workflow.measure import METRICS, evaluate_classifier, images_per_second, provenance

QUICK = {"search_epochs": 0.25, "finetune_epochs": 0.25, "num_random": 8}
TAYLOR_IMAGES, TAYLOR_BATCH = 2048, 128
FROZEN_IMAGES = 512
SPEED_BATCH = 64


@dataclass
class Settings:
    """Settings that all contestants share; a results file belongs to one set of them."""

    model: str
    data_dir: str
    search_epochs: float = 10.0
    finetune_epochs: float = 20.0
    dense_epochs: float = 0.0
    batch_size: int = 128
    learning_rate: float = 5e-4
    dense_learning_rate: float = 1e-3
    teacher_share: float = 1.0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    num_random: int = 8

    @property
    def epochs(self) -> float:
        """Return the total number of training epochs."""
        return self.search_epochs + self.finetune_epochs


@dataclass
class Job:
    """One run of one contestant."""

    settings: Settings
    dense: PreTrainedModel
    inputs: Inputs
    config: BiMaskConfig
    seed: int

    def arguments(self, folder: str, epochs: float, learning_rate: float) -> OFBTrainingArguments:
        """Return training arguments: cosine schedule, 5 % warm-up, no checkpoints."""
        rows = len(self.inputs.train)
        steps = max(1, round(epochs * rows / self.settings.batch_size))
        return OFBTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=self.settings.batch_size,
            per_device_eval_batch_size=250,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.05,
            seed=self.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10**6,
            bf16=torch.cuda.is_available(),
        )

    def top1(self, model: PreTrainedModel) -> float:
        """Return the accuracy on the evaluation images in percent."""
        with tempfile.TemporaryDirectory() as folder:
            return evaluate_classifier(model, self.inputs.eval, self.arguments(folder, 1, 0.0))[0][
                "top1"
            ]

    def finetune(
        self, model: PreTrainedModel, epochs: float, learning_rate: float | None = None
    ) -> None:
        """Train a model in place with the dense checkpoint as teacher."""
        with tempfile.TemporaryDirectory() as folder:
            args = self.arguments(folder, epochs, learning_rate or self.settings.learning_rate)
            teacher = {"teacher": self.dense, "distillation_weight": self.settings.teacher_share}
            trainer = DistillationTrainer(
                model, args, train_dataset=self.inputs.train, **teacher, **METRICS
            )
            trainer.train()

    def images(self, count: int) -> torch.Tensor:
        """Return training images that are not augmented, (count, C, H, W)."""
        rows = self.inputs.train_plain
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(rows), generator=generator)[:count].tolist()
        images = torch.stack([rows[index]["pixel_values"] for index in drawn])
        return images.to(self.dense.device)

    def flexible(self) -> PreTrainedModel:
        """Return the dense checkpoint in the package's own class, which can be sliced."""
        return family_of(self.dense.config).from_dense(self.dense)

    def search(self, epochs: float) -> PreTrainedModel:
        """Return the compressed model after this many epochs of search."""
        with tempfile.TemporaryDirectory() as folder:
            args = self.arguments(folder, epochs, self.settings.learning_rate)
            # a search that ranks units by gradients of this loss needs labels in it
            if self.config.chooses_first:
                args.distillation_weight = self.settings.teacher_share
            trainer = OFBTrainer(
                self.dense,
                args,
                self.config,
                train_dataset=self.inputs.train,
                calibration_dataset=self.inputs.train_plain,
                guard_dataset=self.inputs.guard,
            )
            trainer.train()
            return compress(trainer.supernet)


def search(job: Job) -> tuple[PreTrainedModel, float]:
    """Search for all epochs: the choice is made early, and the remaining steps train the result."""
    # images that curves are measured on count as training
    read = FROZEN_IMAGES / len(job.inputs.train) if job.config.chooses_first else 0
    return job.search(job.settings.epochs - read), 0


def paper(job: Job) -> tuple[PreTrainedModel, float]:
    """Search for a part of the epochs: the choice is made at the end, and finetuning follows."""
    return job.search(job.settings.search_epochs), job.settings.finetune_epochs


def one_shot(
    choose: Callable[[Job], Any], looks_at: int = 0
) -> Callable[[Job], tuple[PreTrainedModel, float]]:
    """Return a contestant that prunes first and trains for the remaining epochs.

    Args:
        choose: returns the subnet.
        looks_at: number of images that the choice needs; they count as training.
    """

    def prune(job: Job) -> tuple[PreTrainedModel, float]:
        small = slice_model(job.flexible(), choose(job))
        return small, job.settings.epochs - looks_at / len(job.inputs.train)

    return prune


def taylor(job: Job) -> Any:
    """Choose a subnet by first-order importance."""
    loader = DataLoader(job.inputs.train, TAYLOR_BATCH, shuffle=True)
    batches = (
        batch for batch, _ in zip(loader, range(TAYLOR_IMAGES // TAYLOR_BATCH), strict=False)
    )
    return baselines.pruned_subnet(
        job.dense, job.config, baselines.taylor_scores(job.dense, batches)
    )


def uniform(job: Job) -> Any:
    """Choose the same fraction of every width."""
    return baselines.uniform_subnet(job.dense, job.config, baselines.magnitude_scores(job.dense))


def taylor_fitted(job: Job) -> tuple[PreTrainedModel, float]:
    """Prune by first-order importance, and fit what is left as a search does."""
    dense = job.flexible().float().eval()
    subnet = taylor(job)
    small = slice_model(dense, subnet).eval()
    fit_(small, dense, subnet, job.images(FROZEN_IMAGES).split(SPEED_BATCH))
    return small, job.settings.epochs - (TAYLOR_IMAGES + FROZEN_IMAGES) / len(job.inputs.train)


def scratch(job: Job) -> tuple[PreTrainedModel, float]:
    """Return a uniform subnet with random weights."""
    small, epochs = one_shot(uniform)(job)
    set_seed(job.seed)
    return type(small)(small.config).to(small.device), epochs


def frozen(job: Job) -> tuple[PreTrainedModel, float]:
    """Compress without training, as `ofb-hf compress` does."""
    images = job.images(FROZEN_IMAGES)
    return compress_frozen(job.dense, images, target_macs=job.config.target_macs).model, 0


def frozen_finetuned(job: Job) -> tuple[PreTrainedModel, float]:
    """Compress without training, then train for the remaining epochs."""
    return frozen(job)[0], job.settings.epochs - FROZEN_IMAGES / len(job.inputs.train)


def torch_pruning(job: Job) -> tuple[PreTrainedModel, float]:
    """Prune with torch-pruning."""
    from torch_pruning_contestant import prune

    return prune(job.dense, job.config), job.settings.epochs


CONTESTANTS: dict[str, Callable[[Job], tuple[PreTrainedModel, float]]] = {
    "search": search,
    "uniform": one_shot(uniform),
    "l1": one_shot(
        lambda job: baselines.pruned_subnet(
            job.dense, job.config, baselines.magnitude_scores(job.dense)
        )
    ),
    "taylor": one_shot(taylor, TAYLOR_IMAGES),
    "taylor_fitted": taylor_fitted,
    "bi_mask": search,
    "random": one_shot(lambda job: baselines.random_subnet(job.dense, job.config, job.seed)),
    "equivalent": search,
    "curves": search,
    "depth": search,
    "tokens": search,
    "frozen": frozen,
    "frozen_finetuned": frozen_finetuned,
    "paper": paper,
    "torch_pruning": torch_pruning,
    "scratch": scratch,
}
# Contestant -> what is set for it besides the budget.
CHANGES: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "bi_mask": {"preset": "bi_mask"},
    "equivalent": {"preset": "bi_mask", "basis": "equivalent"},
    "curves": {
        "preset": "bi_mask",
        "basis": "equivalent",
        "importance_source": "error_curves",
    },
    "depth": {"search_depth": True},
    "tokens": {"search_depth": True, "search_tokens": True},
}


def run(name: str, job: Job) -> dict[str, Any]:
    """Train one contestant and measure it."""
    began = time.time()
    set_seed(job.seed)
    if name == "dense":
        small = job.flexible()
        epochs = job.settings.epochs
    else:
        small, epochs = CONTESTANTS[name](job)
    cut = job.top1(small) if epochs else None  # None: it was cut during its training
    if epochs:
        job.finetune(small, epochs, job.settings.dense_learning_rate if name == "scratch" else None)
    sizes = {
        s.name: list(s.shape) for s in family_of(small.config).describe(small.config).submodules
    }
    return {
        "top1": job.top1(small),
        "top1_cut": cut,
        "macs": count_macs(small),
        "share": round(count_macs(small) / count_macs(job.dense), 4),
        "params": count_params(small),
        **speeds(job, small),
        "seconds": round(time.time() - began),
        "sizes": sizes,
    }


def speeds(job: Job, small: PreTrainedModel) -> dict[str, float]:
    """Return images per second of a model and of the dense one, which take turns."""
    rows = job.inputs.eval
    images = torch.stack(
        [rows[index]["pixel_values"] for index in range(min(len(rows), SPEED_BATCH))]
    )
    return images_per_second(
        {"images_per_second": small, "dense_images_per_second": job.dense}, images
    )


def available(names: list[str], dense: PreTrainedModel) -> list[str]:
    """Return the contestants that can run with this model and the installed packages."""
    is_vit = dense.config.model_type == "vit"
    can_run = {"tokens": is_vit, "torch_pruning": is_vit and find_spec("torch_pruning") is not None}
    return [name for name in names if can_run.get(name, True)]


def plan(
    settings: Settings, budgets: list[float], seeds: list[int], names: list[str]
) -> list[tuple[str, float, int]]:
    """Return every (contestant, budget, seed), the most informative runs first."""
    runs = [("dense", 1.0, seed) for seed in seeds if "dense" in names]
    for budget in budgets:
        for seed in seeds:
            runs += [
                (name, budget, seed) for name in CONTESTANTS if name in names and name != "random"
            ]
        if "random" in names:
            runs += [("random", budget, seed) for seed in range(settings.num_random)]
    return runs


def dense_model(settings: Settings, folder: Path) -> tuple[PreTrainedModel, Inputs]:
    """Return the initial checkpoint; train it on this data first if --dense_epochs says so."""
    data = DataArguments(data_dir=settings.data_dir, max_train_samples=settings.max_train_samples)
    data.max_eval_samples = settings.max_eval_samples
    trained = folder / "dense"
    name = str(trained) if trained.is_dir() else settings.model
    model, inputs = load(name, data, seed=0, guard_images=None)
    if settings.dense_epochs and not trained.is_dir():
        job = Job(settings, model, inputs, default_config(model.config), seed=0)
        with tempfile.TemporaryDirectory() as scratch:
            args = job.arguments(scratch, settings.dense_epochs, settings.dense_learning_rate)
            DistillationTrainer(model, args, train_dataset=inputs.train, **METRICS).train()
        # Renamed when complete: an interrupted run must not leave half a checkpoint behind.
        aside = trained.with_name("dense.incomplete")
        model.save_pretrained(aside)
        inputs.processor.save_pretrained(aside)
        aside.rename(trained)
    return model.eval(), inputs


def main() -> None:
    """Run the missing contestants and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, field in Settings.__dataclass_fields__.items():
        required = name in ("model", "data_dir")
        kind = {"str": str, "float": float}.get(
            str(getattr(field.type, "__name__", field.type)), int
        )
        parser.add_argument(f"--{name}", type=kind, required=required, default=None)
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[0.5, 0.3], help="fractions of the dense MACs"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--contestants", nargs="+", choices=["dense", *CONTESTANTS], default=["dense", *CONTESTANTS]
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help=f"settings for a CPU: {QUICK}")
    wanted = parser.parse_args()
    given = {
        name: getattr(wanted, name)
        for name in Settings.__dataclass_fields__
        if getattr(wanted, name) is not None
    }
    settings = Settings(**((QUICK if wanted.quick else {}) | given))
    logging.set_verbosity_error()
    wanted.output_dir.mkdir(parents=True, exist_ok=True)
    about, results = wanted.output_dir / "settings.json", wanted.output_dir / "results.jsonl"
    if about.is_file() and json.loads(about.read_text()) != asdict(settings):
        parser.error(
            f"{wanted.output_dir} holds results of other settings; give another --output_dir."
        )
    about.write_text(json.dumps(asdict(settings), indent=2) + "\n")
    dense, inputs = dense_model(settings, wanted.output_dir)
    rows = read_history(results) if results.is_file() else []
    if results.is_file():  # drops an incomplete last line of an interrupted run
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {(row["contestant"], row["budget"], row["seed"]) for row in rows}
    for name, budget, seed in plan(
        settings, wanted.budgets, wanted.seeds, available(wanted.contestants, dense)
    ):
        if (name, budget, seed) in done:
            continue
        fields = {"target_macs": budget, **CHANGES.get(name, {})}
        job = Job(settings, dense, inputs, default_config(dense.config, **fields), seed)
        row = {"contestant": name, "budget": budget, "seed": seed} | run(name, job)
        row |= provenance(seed, dense.device)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stdout.write(f"{name:14} {budget:.2f} seed {seed}: {row['top1']:.2f}\n")
        sys.stdout.flush()
        write_report(wanted.output_dir)
    sys.stdout.write(write_report(wanted.output_dir))


if __name__ == "__main__":
    main()
