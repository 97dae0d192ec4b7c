"""Learn how many tokens each layer keeps, finetune if asked to, evaluate, write down: one run."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import httpx
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils import logging

from ..data import AugmentationArguments, DataArguments
from ..families.registry import describe
from ..families.subnet import SubnetSpec
from ..models import OFBViTForImageClassification
from ..models.shapes import SHAPES
from ..pictures.token_maps import plot_token_search
from ..release.card import render_token_card
from ..token_search.learned_counts import TokenSearchConfig, install_learned_counts
from ..token_search.trainer import TokenTrainer
from ..tokens.schedules import full_schedule
from ..training.arguments import OFBTrainingArguments
from ..training.history import HISTORY_FILE, read_history
from . import output, search
from .arguments import ModelArguments, TokenPhaseArguments, phase_arguments
from .inputs import load, load_teacher
from .latency_table import warn_if_elsewhere
from .report import markdown_table, results_rows
from .search import SUBNET_FILE, Walk

logger = logging.get_logger(__name__)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    config: TokenSearchConfig,
    phase_args: TokenPhaseArguments,
    args: OFBTrainingArguments,
) -> Walk:
    """Loads model and data and checks that they, and the budget, go together. Touches nothing.

    Raises:
        ValueError: for whatever cannot work, in words.
    """
    name = search.require_start(model_args, args)
    settings = search.run_settings(model_args, data_args, config, args)
    settings |= asdict(augmentation_args) | asdict(phase_args)
    output.check_free(args, settings, model_args.overwrite_output_dir, output.SEARCH_PHASES)
    dense, inputs = load(name, data_args, args.seed, augmentation_args)
    # refuses what cannot be searched, before anything starts
    install_learned_counts(dense, config.token_granularity)
    if getattr(dense.config, "token_schedule", None):
        # The budget is a share of the model with all its tokens, so that is the one to compare
        # with.
        dense = OFBViTForImageClassification.from_dense(
            dense, token_schedule=full_schedule(dense.config)
        )
    targets = {"": config.absolute(config.target_for(dense.config))}
    warn_if_elsewhere(config.table, args.device)
    teacher, licence = (
        load_teacher(model_args.teacher_name_or_path, inputs),
        search.license_of(name),
    )
    subnet = subnet_of(name, dense)
    return Walk(
        model_args,
        phase_args,
        args,
        config,
        settings,
        inputs,
        dense,
        teacher,
        targets,
        licence,
        None,
        subnet,
    )


def subnet_of(name_or_path: str, model: PreTrainedModel) -> SubnetSpec | None:
    """The `subnet.json` beside a model that a search for widths made; None without one that
    fits."""
    folder = Path(name_or_path)
    if name_or_path in SHAPES:
        return None
    try:
        file = (
            folder / SUBNET_FILE
            if folder.is_dir()
            else Path(hf_hub_download(name_or_path, SUBNET_FILE))
        )
        subnet = SubnetSpec.from_json(file.read_text(encoding="utf-8"))
    except (OSError, httpx.RequestError):  # there is none, or none that could be fetched
        return None
    sizes = {
        name: size if isinstance(size, tuple) else (size,) for name, size in subnet.sizes.items()
    }
    if sizes != describe(model.config).sizes:
        logger.warning(
            f"the {SUBNET_FILE} of {name_or_path} does not fit its widths, so it is left behind."
        )
        return None
    return subnet


def run(walk: Walk) -> dict[str, Any]:
    """Runs the walk and fills its output folder. Returns the content of `eval_results.json`.

    A failure on the way leaves `FAILED.txt` there, and checkpoints to resume from.
    """
    with search.output_of(walk):
        search.train_dense(walk)
        models = {"dense": walk.dense, "searched": search_tokens(walk)}
        if walk.finetune_args.is_wanted:
            models["finetuned"] = search.finetune(walk, models["searched"])
        return finish(walk, models)


def search_tokens(walk: Walk) -> PreTrainedModel:
    """The model with its learned schedule, or with the one that a resumed run finds."""
    done = walk.folder / "search" / output.RESULT
    if walk.resuming and search.is_done(done):
        return AutoModelForImageClassification.from_pretrained(done)
    set_seed(walk.args.seed)
    args = phase_arguments(walk.args, "search")
    trainer = TokenTrainer(
        walk.dense, args, walk.config, teacher=walk.teacher, **search.datasets(walk)
    )
    search.run_phase(trainer, walk, "search")
    scheduled = trainer.scheduled()
    if walk.is_main:
        output.write_aside(done, scheduled.save_pretrained)
    return scheduled


def finish(walk: Walk, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """Evaluates, measures, writes the output folder and prints the summary."""
    results = search.measured(walk, models)
    config = models["searched"].config
    results["token_schedule"] = config.token_schedule or full_schedule(config)
    final = models.get("finetuned", models["searched"])
    search.write_output(
        walk, final, results, lambda folder: _write_extras(walk, final, results, folder)
    )
    return results


def _write_extras(
    walk: Walk, final: PreTrainedModel, results: dict[str, Any], folder: Path
) -> None:
    """Card and pictures, and the units of the parent's parent where these are known."""
    if walk.start_subnet is not None:
        subnet = replace(walk.start_subnet, token_schedule=final.config.token_schedule)
        (folder / SUBNET_FILE).write_text(subnet.to_json(), "utf-8")
    (folder / "README.md").write_text(
        render_token_card(results, markdown_table(results_rows(results))), "utf-8"
    )
    history, (budget, _) = read_history(walk.folder / HISTORY_FILE), walk.config.budget
    plot_token_search(
        history, results["token_schedule"], walk.target, budget, folder / "search.png"
    )
    search.draw_token_pictures(walk, final, folder)
