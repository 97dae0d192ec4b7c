"""Finetune a classifier, searched or not, and write it down; or only evaluate one."""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .._moved import refusing_renamed
from ..data import AugmentationArguments, DataArguments
from ..families.registry import is_ours
from ..families.subnet import SubnetSpec
from ..pictures.plots import plot_finetuning
from ..release.card import render_finetuned_card
from ..training.arguments import OFBTrainingArguments
from . import output
from .arguments import MeasuredModelArguments, TrainedModelArguments
from .inputs import (
    load,
    load_subnet,
    load_teacher,
    load_to_train,
    require_findable,
    require_possible_teacher,
)
from .measure import measure
from .report import markdown_table, results_rows
from .results import measured, source_of, write_output
from .run import Run, require_runnable
from .settings import training_settings

# of names that the module had in version 0.1
__getattr__ = refusing_renamed(__name__)


def prepare(
    model_args: TrainedModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    args: OFBTrainingArguments,
) -> Run:
    """Load model, data and teacher and check that they go together. Write nothing.

    Raises:
        ValueError: for whatever cannot work, with an explanation.
    """
    name = _named_model(model_args)
    require_findable(name)
    _require_teacher(model_args, args)
    require_runnable(args)
    # what decides the result: a resumed run has to agree with it
    settings = {"model_name_or_path": name, "teacher_name_or_path": model_args.teacher_name_or_path}
    settings["new_classifier"] = model_args.new_classifier
    settings["guard_images"] = model_args.guard_images
    settings |= asdict(data_args) | asdict(augmentation_args) | training_settings(args, data_args)
    output.check_free(args, settings, model_args.overwrite_output_dir, phases=("",))
    model, inputs = load_to_train(model_args, data_args, args.seed, augmentation_args)
    # `publish` takes models of this package only; better to say so now than after the training.
    if args.push_to_hub and is_stock(model):
        raise ValueError(
            f"push_to_hub publishes classifiers of this package, and {name} is a "
            f"{type(model).__name__} of transformers; leave --push_to_hub out, and push the "
            "finished folder with the model's own push_to_hub."
        )
    return Run(
        args=args,
        settings=settings,
        model_args=model_args,
        inputs=inputs,
        source=source_of(name, model),
        source_subnet=load_subnet(name, model),
        dense=model,
        teacher=load_teacher(
            model_args.teacher_name_or_path, inputs, model_args.match_labels_by_number
        ),
    )


def _named_model(model_args: MeasuredModelArguments) -> str:
    """Return the name of the model; raise ValueError if none is given."""
    if model_args.model_name_or_path is None:
        raise ValueError(
            "--model_name_or_path is missing; give a Hub name or a folder with an image classifier."
        )
    return model_args.model_name_or_path


def _require_teacher(model_args: TrainedModelArguments, args: OFBTrainingArguments) -> None:
    """Raise ValueError if a teacher is missing, or has a name that nothing can have."""
    if args.distillation_weight and model_args.teacher_name_or_path is None:
        raise ValueError(
            f"distillation_weight is {args.distillation_weight}, but there is no teacher; name "
            "one with --teacher_name_or_path, or leave the weight out."
        )
    require_possible_teacher(model_args.teacher_name_or_path)


def is_stock(model: PreTrainedModel) -> bool:
    """Return whether a model is of a class of transformers, which needs no code of this package."""
    return not is_ours(model)


def run_finetune(run: Run) -> dict[str, Any]:
    """Finetune, measure before and after, and fill the output folder.

    A failure leaves `FAILED.txt` there, and checkpoints to resume from.

    Returns:
        The content of `eval_results.json`: the model before (`dense`) and after (`finetuned`).
    """
    with run.unfinished():
        # `dense` stays as it is: the model after finetuning is compared with it.
        finetuned = run.finetune(copy.deepcopy(run.dense), run.teacher)
        results = finish(run, {"dense": run.dense, "finetuned": finetuned})
        if run.is_main:
            # The output folder holds the same weights now.
            output.remove(run.result_folder("finetune"))
    return results


def finish(run: Run, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """Measure the models, write the output folder and print the summary."""
    results = measured(run, models)
    final = models["finetuned"]
    # only our ViT has one
    schedule = getattr(final.config, "token_schedule", None)
    if schedule is not None:
        results["token_schedule"] = schedule
    card = render_finetuned_card(
        results,
        markdown_table(results_rows(results)),
        subnet=run.source_subnet,
        token_schedule=schedule,
        is_stock=is_stock(final),
    )

    def draw(path: Path) -> None:
        plot_finetuning(run.history(), results, path)

    write_output(
        run,
        final,
        results,
        card=card,
        subnet=_subnet(run.source_subnet, schedule),
        pictures={output.FINETUNE_PICTURE: draw},
    )
    return results


def _subnet(source: SubnetSpec | None, schedule: list[list[int]] | None) -> SubnetSpec | None:
    """Return what the model keeps of the one that it was cut from: finetuning removes nothing."""
    return None if source is None else replace(source, token_schedule=schedule)


def run_evaluate(
    model_args: MeasuredModelArguments, data_args: DataArguments, args: OFBTrainingArguments
) -> dict[str, Any]:
    """Measure a classifier on the evaluation split: accuracy, cost, size, speed. Write nothing.

    Without such a split it is measured on all images, or on those that a training would have held
    out if `data_args.eval_share` asks for them.
    """
    name = _named_model(model_args)
    model, inputs = load(
        name,
        data_args,
        args.seed,
        trains=False,
        match_labels_by_number=model_args.match_labels_by_number,
    )
    results, _ = measure({"model": model}, inputs.eval, args)
    return results["model"]
