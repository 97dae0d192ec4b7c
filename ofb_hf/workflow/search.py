"""Search, finetune, evaluate, write down: the whole walk in one run."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.utils import httpx
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils import logging

from ..cost.latency import LATENCY_TABLE_FILE, LatencyTable, count_latency, milliseconds
from ..data import AugmentationArguments, DataArguments
from ..families.registry import describe
from ..families.subnet import SubnetSpec
from ..models.shapes import SHAPES
from ..pictures.plots import plot_search
from ..pictures.token_maps import draw_tokens
from ..release.card import render_card
from ..release.hub import publish, require_write_access
from ..search.supernet import install_bi_masks
from ..search.trainer import OFBTrainer
from ..space.configuration import BiMaskConfig, default_config
from ..token_search.learned_counts import TokenSearchConfig
from ..training.arguments import OFBTrainingArguments, check_search_arguments
from ..training.checkpoints import ASIDE
from ..training.distillation import DistillationTrainer
from ..training.history import HISTORY_FILE, HistoryCallback, left_out_at, read_history
from ..training.ranks import decided_by_rank_0
from . import output
from .arguments import (
    FinetuneArguments,
    ModelArguments,
    SearchArguments,
    changed,
    phase_arguments,
)
from .inputs import Inputs, load, load_teacher
from .latency_table import measured_latency, warn_if_elsewhere
from .measure import METRICS, lost_classes, measure, provenance
from .report import markdown_table, results_rows, text_table
from .settings import training_settings

logger = logging.get_logger(__name__)

SUBNET_FILE = "subnet.json"


@dataclass
class Walk:
    """Everything the phases of one run share.

    Attributes:
        dense: the model to make smaller, the reference of all measurements.
        targets: subfolder -> budget in MACs, parameters or milliseconds, the largest first;
            `config` asks for the first one.
        start, start_subnet: what the search begins with where that is not `dense`, and its units as
            units of `dense`. In a search for tokens, the units of `dense` as those of the model it
            was cut from, where they are known.
        steps_before: of search, that `start` has behind it.
    """

    model_args: ModelArguments
    finetune_args: FinetuneArguments
    args: OFBTrainingArguments
    config: BiMaskConfig | TokenSearchConfig
    settings: dict[str, Any]
    inputs: Inputs
    dense: PreTrainedModel
    teacher: PreTrainedModel | None
    targets: dict[str, int | float]
    license: str | None
    start: PreTrainedModel | None = None
    start_subnet: SubnetSpec | None = None
    steps_before: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @property
    def target(self) -> int | float:
        """The largest budget."""
        return next(iter(self.targets.values()))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files: one, or one per machine with `save_on_each_node`."""
        return self.args.should_save

    @property
    def resuming(self) -> bool:
        """Whether an earlier run in the same folder is to be continued."""
        return self.args.resume_from_checkpoint is not None


def run(walk: Walk) -> dict[str, Any]:
    """Runs the walk and fills its output folder. Returns the content of `eval_results.json`.

    A failure on the way leaves `FAILED.txt` there, and checkpoints to resume from.
    """
    with output_of(walk):
        train_dense(walk)
        results, _, _ = meet_budget(walk)
    return results


@contextmanager
def output_of(walk: Walk) -> Iterator[None]:
    """The output folder is that of an unfinished run until the block ends well."""
    # all ranks have looked at the folder before one of them writes to it
    PartialState().wait_for_everyone()
    if walk.is_main:
        output.begin(walk.args, walk.settings)
        # the one that was given may be gone when the run is resumed
        if walk.settings.get("latency_table"):
            output.write_json(walk.folder / LATENCY_TABLE_FILE, walk.settings["latency_table"])
    with output.marked_if_failed(walk.folder, walk.is_main):
        yield


def meet_budget(walk: Walk) -> tuple[dict[str, Any], PreTrainedModel, SubnetSpec]:
    """Searches, finetunes, measures, writes. Returns results, the model before finetuning, and its
    units."""
    searched, subnet = search(walk)
    models = {"dense": walk.dense, "searched": searched}
    if walk.finetune_args.is_wanted:
        models["finetuned"] = finetune(walk, searched)
    return finish(walk, models, subnet), searched, subnet


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    config: SearchArguments,
    finetune_args: FinetuneArguments,
    args: OFBTrainingArguments,
) -> Walk:
    """Loads model and data and checks that they, and the budget, go together. Touches nothing.

    Raises:
        ValueError: for whatever cannot work, in words.
    """
    if args.push_to_hub and len(config.budgets) > 1:
        raise ValueError(
            "push_to_hub cannot go with several budgets; publish each finished folder (ofb-hf "
            "publish)."
        )
    name = require_start(model_args, args)
    settings = (
        run_settings(model_args, data_args, config, args)
        | asdict(augmentation_args)
        | asdict(finetune_args)
    )
    if len(config.budgets) > 1:
        settings |= {config.budget[0]: config.budgets}
    output.check_free(args, settings, model_args.overwrite_output_dir, config.phases)
    dense, inputs = load(name, data_args, args.seed, augmentation_args)
    configs = {
        folder: default_config(dense.config, **values)
        for folder, values in config.by_budget().items()
    }
    costs = {
        folder: one.absolute(install_bi_masks(dense, one).target) for folder, one in configs.items()
    }
    targets = dict(sorted(costs.items(), key=lambda item: -item[1]))
    if len(set(targets.values())) < len(config.budgets):
        raise ValueError(
            f"{config.budget[0]} is {config.budgets}, with the same budget twice; give each once."
        )
    first = configs[next(iter(targets))]
    warn_if_elsewhere(first.table, args.device)
    teacher = load_teacher(model_args.teacher_name_or_path, inputs)
    shared = model_args, finetune_args, args, first, settings, inputs, dense, teacher, targets
    return Walk(*shared, license_of(name))


def require_start(model_args: ModelArguments, args: OFBTrainingArguments) -> str:
    """The name of the model to search, after the checks that need neither model nor data.

    Raises:
        ValueError: for whatever cannot work, in words.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError(
            f"--model_name_or_path is missing; give a Hub name, a folder, or one of "
            f"{sorted(SHAPES)}."
        )
    # it is the finished folder that is pushed
    check_search_arguments(changed(args, push_to_hub=False))
    if args.push_to_hub:
        decided_by_rank_0(lambda: require_write_access(args.hub_model_id, args.hub_token))
    return name


def run_settings(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: BiMaskConfig | TokenSearchConfig,
    args: OFBTrainingArguments,
) -> dict[str, Any]:
    """What defines the result of a search; a resumed run must agree with it."""
    settings = asdict(data_args) | config.to_dict()
    settings |= {
        name: getattr(model_args, name) for name in ("model_name_or_path", "teacher_name_or_path")
    }
    settings |= {
        name: getattr(model_args, name) for name in ("dense_epochs", "dense_learning_rate")
    }
    return settings | training_settings(args, data_args)


def train_dense(walk: Walk) -> None:
    """Trains the dense model where it starts from random weights; keeps it for a resumed run."""
    if not walk.model_args.dense_epochs:
        return
    done = walk.folder / "dense_training" / output.RESULT
    if walk.resuming and is_done(done):
        walk.dense = type(walk.dense).from_pretrained(done)
        return
    args = phase_arguments(
        walk.args,
        "dense_training",
        num_train_epochs=walk.model_args.dense_epochs,
        max_steps=-1,
        learning_rate=walk.model_args.dense_learning_rate,
        distillation_weight=None,
    )
    run_phase(DistillationTrainer(walk.dense, args, **datasets(walk)), walk, "dense")
    if walk.is_main:
        output.write_aside(done, walk.dense.save_pretrained)


def search(walk: Walk) -> tuple[PreTrainedModel, SubnetSpec]:
    """The search itself, or its result where a resumed run finds it done."""
    done = walk.folder / "search" / output.RESULT
    if walk.resuming and is_done(done):
        subnet = SubnetSpec.from_json((done / SUBNET_FILE).read_text(encoding="utf-8"))
        return AutoModelForImageClassification.from_pretrained(done), subnet
    set_seed(walk.args.seed)
    start, teacher, args = walk.dense, walk.teacher, phase_arguments(walk.args, "search")
    if walk.start is not None:
        share = (
            walk.config.distillation_weight
            if args.distillation_weight is None
            else args.distillation_weight
        )
        start, teacher = walk.start, teacher or (walk.dense if share else None)
    trainer = OFBTrainer(start, args, walk.config, teacher=teacher, **datasets(walk))
    run_phase(trainer, walk, "search")
    small, subnet = trainer.compress(), trainer.read_subnet()
    if walk.start_subnet is not None:
        subnet = subnet.within(walk.start_subnet)

    def write(folder: Path) -> None:
        small.save_pretrained(folder)
        (folder / SUBNET_FILE).write_text(subnet.to_json(), encoding="utf-8")

    if walk.is_main:
        output.write_aside(done, write)
    return small, subnet


def finetune(walk: Walk, searched: PreTrainedModel) -> PreTrainedModel:
    """Finetunes a copy of the searched model with the dense model, or the given one, as teacher."""
    done = walk.folder / "finetune" / output.RESULT
    if walk.resuming and is_done(done):
        return AutoModelForImageClassification.from_pretrained(done)
    wanted = walk.finetune_args
    args = phase_arguments(
        walk.args,
        "finetune",
        num_train_epochs=wanted.finetune_epochs,
        max_steps=wanted.finetune_max_steps,
        learning_rate=wanted.finetune_learning_rate,
        distillation_weight=wanted.finetune_distillation_weight,
    )
    set_seed(walk.args.seed)
    model = type(searched)(searched.config)
    model.load_state_dict(searched.state_dict())
    teacher = walk.teacher or walk.dense
    trainer = DistillationTrainer(model.train(), args, teacher=teacher, **datasets(walk))
    run_phase(trainer, walk, "finetune")
    if walk.is_main:
        output.write_aside(done, model.save_pretrained)
    return model


def finish(walk: Walk, models: dict[str, PreTrainedModel], subnet: SubnetSpec) -> dict[str, Any]:
    """Evaluates, measures, writes the output folder and prints the summary."""
    results = measured(walk, models)
    if subnet.token_schedule is not None:
        results["token_schedule"] = subnet.token_schedule
    final = models.get("finetuned", models["searched"])
    write_output(
        walk, final, results, lambda folder: _write_extras(walk, final, subnet, results, folder)
    )
    return results


def _add_latency(
    results: dict[str, Any], models: dict[str, PreTrainedModel], table: LatencyTable
) -> None:
    """What the table predicts for every model, and what it really takes under the table's
    settings."""
    results["latency"] = {"hardware": table.hardware, **table.settings}
    for name, model in models.items():
        results[name]["predicted_latency_ms"] = milliseconds(count_latency(model, table))
    for name, elapsed in measured_latency(models, table).items():
        results[name]["latency_ms"] = elapsed


def measured(walk: Walk, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """What `eval_results.json` says of any run: the budget, the models, and what made them."""
    results: dict[str, Any] = {
        "target_macs": None,
        "target_params": None,
        walk.config.budget[0]: walk.target,
    }
    of_models, by_class = measure(models, walk.inputs.eval, phase_arguments(walk.args, "search"))
    results |= of_models | provenance(walk.args.seed, walk.args.device)
    results["seconds"] = None if walk.resuming else round(time.monotonic() - walk.began)
    history = read_history(walk.folder / HISTORY_FILE)
    results["steps"] = {row["phase"]: row["step"] for row in history}
    if "search" in results["steps"]:
        results["steps"]["search"] += walk.steps_before
    gone = describe((walk.dense if walk.start is None else walk.start).config).left_out
    results["left_out"] = {
        name: step + walk.steps_before
        for name, step in left_out_at(history).items()
        if name not in gone
    }
    results |= {"source": _source(walk), "data": walk.inputs.data.name}
    results["lost_classes"] = lost_classes(
        by_class["dense"], [*by_class.values()][-1], walk.inputs.data.label_names
    )
    if walk.config.table is not None:
        _add_latency(results, models, walk.config.table)
    return results


def push(walk: Walk) -> None:
    """Publishes the output folder of a finished walk.

    Raises:
        LeakError, PublishError: as `ofb_hf.publish`; the folder is complete, and `ofb-hf publish`
        takes it later.
    """
    if walk.args.process_index == 0:
        settings = {"private": walk.args.hub_private_repo, "revision": walk.args.hub_revision}
        commit = publish(walk.folder, walk.args.hub_model_id, token=walk.args.hub_token, **settings)
        logger.warning(f"published: {commit.commit_url}")


def write_output(
    walk: Walk,
    final: PreTrainedModel,
    results: dict[str, Any],
    write_extras: Callable[[Path], None],
) -> None:
    """Puts the product into the output folder, each file written aside and renamed, and prints the
    summary.

    Args:
        final: the model to keep.
        results: content of `eval_results.json`.
        write_extras: writes what else belongs to the product into a folder.
    """
    if not walk.is_main:
        return
    folder = walk.folder
    aside = folder / f"{ASIDE}-output"
    output.remove(aside)
    final.save_pretrained(aside)
    walk.inputs.processor.save_pretrained(aside)
    (aside / "eval_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_extras(aside)
    if walk.model_args.keep_dense:
        save_dense(walk)
    for path in aside.iterdir():
        path.replace(folder / path.name)
    aside.rmdir()
    logger.warning("\n%s\n\nwritten to %s", text_table(results_rows(results)), folder)


def _write_extras(
    walk: Walk, final: PreTrainedModel, subnet: SubnetSpec, results: dict[str, Any], folder: Path
) -> None:
    """Kept units, card and pictures."""
    (folder / SUBNET_FILE).write_text(subnet.to_json(), encoding="utf-8")
    card = render_card(results, subnet, markdown_table(results_rows(results)))
    (folder / "README.md").write_text(card, encoding="utf-8")
    history, sizes = read_history(walk.folder / HISTORY_FILE), describe(walk.dense.config).sizes
    plot_search(history, subnet, sizes, walk.target, walk.config.budget[0], folder / "search.png")
    draw_token_pictures(walk, final, folder)


def draw_token_pictures(walk: Walk, final: PreTrainedModel, folder: Path) -> None:
    """What becomes of some images of the evaluation split, if the model reduces its tokens."""
    images, processor = walk.inputs.eval, walk.inputs.processor
    count = min(walk.finetune_args.token_pictures, len(images))
    if count and getattr(final.config, "token_schedule", None) is not None:
        pixels = torch.stack(
            [images[index * len(images) // count]["pixel_values"] for index in range(count)]
        )
        draw_tokens(
            final, pixels, processor.image_mean, processor.image_std, folder / output.TOKEN_PICTURE
        )


def _source(walk: Walk) -> dict[str, str | None]:
    """The dense parent: its name, without folders of this machine, its commit on the Hub, and its
    licence."""
    name = walk.model_args.model_name_or_path
    revision = getattr(walk.dense.config, "_commit_hash", None)
    is_local = Path(name).exists()
    return {
        "model": Path(name).resolve().name if is_local else name,
        "revision": revision,
        "license": walk.license,
    }


def license_of(name_or_path: str) -> str | None:
    """The licence in the card of a model; None without a card, and where none can be read from
    it."""
    if name_or_path in SHAPES:
        return None
    folder = Path(name_or_path)
    try:
        card = (
            folder / "README.md"
            if folder.is_dir()
            else Path(hf_hub_download(name_or_path, "README.md"))
        )
        stated = ModelCard(
            card.read_text(encoding="utf-8"), ignore_metadata_errors=True
        ).data.license
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, yaml.YAMLError, httpx.RequestError) as error:
        logger.warning(
            f"the card of {name_or_path} cannot be read, so ours will name no licence: {error}"
        )
        return None
    return stated if isinstance(stated, str) else None


def save_dense(walk: Walk) -> None:
    """Keeps the dense model, with its image processor, in the folder `dense`."""

    def write(folder: Path) -> None:
        walk.dense.save_pretrained(folder)
        walk.inputs.processor.save_pretrained(folder)

    output.write_aside(walk.folder / "dense", write)


def datasets(walk: Walk) -> dict[str, Any]:
    """What every trainer of a walk gets besides model and arguments."""
    inputs = walk.inputs
    datasets = {"train_dataset": inputs.train, "eval_dataset": inputs.eval}
    return datasets | {"batch_augmentation": inputs.batch_augmentation} | METRICS


def run_phase(trainer: DistillationTrainer, walk: Walk, phase: str) -> None:
    """Trains from the start, or from where an interrupted run was, and keeps the history."""
    trainer.add_callback(HistoryCallback(walk.folder / HISTORY_FILE, phase))
    wanted = walk.args.resume_from_checkpoint
    if (
        wanted not in (None, "auto")
        and Path(wanted).resolve().parent != Path(trainer.args.output_dir).resolve()
    ):
        wanted = None  # a checkpoint of an earlier phase
    trainer.train(resume_from_checkpoint=wanted)


def is_done(result: Path) -> bool:
    """Whether the result of a phase is there, as rank 0 sees it: no rank may train while others do
    not."""
    return decided_by_rank_0(result.is_dir)
