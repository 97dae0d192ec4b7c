"""Learn how many tokens each layer of a classifier keeps, finetune it, and write it down."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from ..data import AugmentationArguments, DataArguments
from ..families.registry import family_of
from ..pictures.token_maps import plot_token_search
from ..release.card import render_token_card
from ..token_search.learned_counts import TokenSearchConfig, install_learned_counts
from ..token_search.trainer import TokenTrainer
from ..tokens.schedules import full_schedule
from ..training.arguments import OFBTrainingArguments
from . import output
from .arguments import ModelArguments, TokenPhaseArguments
from .inputs import load_subnet, load_teacher, load_to_train
from .latency_table import warn_if_elsewhere
from .report import markdown_table, results_rows
from .results import measured, source_of, token_picture, write_output
from .run import Run, require_start, search_settings


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    config: TokenSearchConfig,
    phase_args: TokenPhaseArguments,
    args: OFBTrainingArguments,
) -> Run:
    """Load model and data and check that they, and the budget, go together. Write nothing.

    Raises:
        ValueError: for whatever cannot work, with an explanation.
    """
    name = require_start(model_args, args)
    settings = search_settings(model_args, data_args, config, args, augmentation_args, phase_args)
    output.check_free(args, settings, model_args.overwrite_output_dir, output.SEARCH_PHASES)
    loaded, inputs = load_to_train(model_args, data_args, args.seed, augmentation_args)
    # Refuses what cannot be searched, before anything starts
    install_learned_counts(loaded, config.token_granularity)
    dense = loaded
    if getattr(loaded.config, "token_schedule", None):
        # The budget is a fraction of the cost with all tokens: that is the model to compare with.
        everything = full_schedule(loaded.config)
        dense = family_of(loaded.config).from_dense(loaded, token_schedule=everything)
    # one budget, in the output folder itself
    targets = {"": config.absolute(config.target_for(dense.config))}
    warn_if_elsewhere(config.table, args.device)
    return Run(
        args=args,
        settings=settings,
        model_args=model_args,
        inputs=inputs,
        source=source_of(name, loaded),
        source_subnet=load_subnet(name, dense),
        dense=dense,
        teacher=load_teacher(
            model_args.teacher_name_or_path, inputs, model_args.match_labels_by_number
        ),
        finetune_args=phase_args,
        config=config,
        targets=targets,
    )


def run_search_tokens(run: Run) -> dict[str, Any]:
    """Train, search, finetune, measure, and fill the output folder.

    A failure leaves `FAILED.txt` there, and checkpoints to resume from.

    Returns:
        The content of `eval_results.json`.
    """
    with run.unfinished():
        run.train_dense()
        searched = search_tokens(run)
        models = {"dense": run.dense, "searched": searched}
        if run.finetune_args.is_wanted:
            models["finetuned"] = run.finetune_searched(searched)
        return finish(run, models)


def search_tokens(run: Run) -> PreTrainedModel:
    """Return the model with its learned schedule, or load the one that a resumed run finds."""
    if run.is_done("search"):
        return run.load_result("search")
    set_seed(run.args.seed)
    args = run.phase_arguments("search")
    trainer = TokenTrainer(run.dense, args, run.config, teacher=run.teacher, **run.datasets())
    run.train(trainer, "search")
    # the weights of the dense model, with the counts that were learned
    scheduled = trainer.scheduled()
    run.keep_result("search", scheduled.save_pretrained)
    return scheduled


def finish(run: Run, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """Measure the models, write the output folder and print the summary."""
    results = measured(run, models)
    # None in the config of a model that keeps all its tokens
    config = models["searched"].config
    schedule = config.token_schedule or full_schedule(config)
    results["token_schedule"] = schedule
    final = models.get("finetuned", models["searched"])
    subnet = run.source_subnet
    if subnet is not None:
        # the units are still those of an earlier search, the tokens are those of this one
        subnet = replace(subnet, token_schedule=final.config.token_schedule)

    def draw(path: Path) -> None:
        plot_token_search(run.history(), schedule, run.target, run.config.budget[0], path)

    write_output(
        run,
        final,
        results,
        card=render_token_card(results, markdown_table(results_rows(results))),
        subnet=subnet,
        pictures={output.SEARCH_PICTURE: draw, **token_picture(run, final)},
    )
    return results
