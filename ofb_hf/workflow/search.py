"""Search an image classifier for a smaller one, finetune it, and write it down."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from .._moved import refusing_renamed
from ..data import AugmentationArguments, DataArguments
from ..families.registry import describe
from ..families.subnet import SubnetSpec
from ..pictures.plots import plot_search
from ..release.card import render_card
from ..search.rewriting import as_bi_masks
from ..search.supernet import install_bi_masks
from ..search.trainer import OFBTrainer
from ..space.configuration import default_config
from ..training.arguments import OFBTrainingArguments
from . import output
from .arguments import FinetuneArguments, ModelArguments, SearchArguments
from .inputs import load_teacher, load_to_train
from .latency_table import warn_if_elsewhere
from .report import markdown_table, results_rows
from .results import measured, source_of, token_picture, write_output
from .run import Run, require_start, search_settings

# of names that the module had in version 0.1
__getattr__ = refusing_renamed(__name__)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    config: SearchArguments,
    finetune_args: FinetuneArguments,
    args: OFBTrainingArguments,
) -> Run:
    """Load model and data and check that they, and the budgets, go together. Write nothing.

    Raises:
        ValueError: for whatever cannot work, with an explanation.
    """
    if args.push_to_hub and len(config.budgets) > 1:
        raise ValueError(
            "push_to_hub cannot go with several budgets; publish each finished folder (ofb-hf "
            "publish)."
        )
    name = require_start(model_args, args)
    # What decides the result is compared before model and data are loaded, which takes a while.
    settings = search_settings(
        model_args, data_args, config, args, augmentation_args, finetune_args
    )
    if len(config.budgets) > 1:
        # the config holds the first of them only
        settings[config.budget[0]] = config.budgets
    output.check_free(args, settings, model_args.overwrite_output_dir, config.phases)
    dense, inputs = load_to_train(model_args, data_args, args.seed, augmentation_args)
    # subfolder -> the config that a search for its budget has, and that budget as a cost
    configs = {}
    costs = {}
    for folder, fields in config.by_budget().items():
        configs[folder] = default_config(dense.config, **fields)
        # refuses what cannot be searched and budgets that cannot be met, before anything starts
        supernet = install_bi_masks(dense, as_bi_masks(configs[folder], dense.config))
        costs[folder] = configs[folder].absolute(supernet.target)
    # Each model is searched on from the next larger one, so the largest budget comes first.
    targets = dict(sorted(costs.items(), key=lambda item: item[1], reverse=True))
    if len(set(targets.values())) < len(config.budgets):
        raise ValueError(
            f"{config.budget[0]} is {config.budgets}, with the same budget twice; give each once."
        )
    largest = configs[next(iter(targets))]
    warn_if_elsewhere(largest.table, args.device)
    return Run(
        args=args,
        settings=settings,
        model_args=model_args,
        inputs=inputs,
        source=source_of(name, dense),
        dense=dense,
        teacher=load_teacher(
            model_args.teacher_name_or_path, inputs, model_args.match_labels_by_number
        ),
        finetune_args=finetune_args,
        config=largest,
        targets=targets,
    )


def run_search(run: Run) -> dict[str, Any]:
    """Train, search, finetune, measure, and fill the output folder.

    A failure leaves `FAILED.txt` there, and checkpoints to resume from.

    Returns:
        The content of `eval_results.json`.
    """
    with run.unfinished():
        run.train_dense()
        run.rewrite_dense()
        results, _, _ = meet_budget(run)
    return results


def meet_budget(run: Run) -> tuple[dict[str, Any], PreTrainedModel, SubnetSpec]:
    """Search, finetune, measure and write, for the first budget of a run.

    Returns:
        Its results, the model before finetuning, and what that keeps of the dense model.
    """
    searched, subnet = search(run)
    models = {"dense": run.dense, "searched": searched}
    if run.finetune_args.is_wanted:
        models["finetuned"] = run.finetune_searched(searched)
    return finish(run, models, subnet), searched, subnet


def search(run: Run) -> tuple[PreTrainedModel, SubnetSpec]:
    """Search a smaller model, or load the one that a resumed run finds.

    Returns:
        The model, and its units as units of the dense model.
    """
    if run.is_done("search"):
        text = (run.result_folder("search") / output.SUBNET).read_text(encoding="utf-8")
        return run.load_result("search"), SubnetSpec.from_json(text)
    # The same numbers whether or not this process has trained the dense model before.
    set_seed(run.args.seed)
    trainer = _trainer(run)
    run.train(trainer, "search")
    small = trainer.compress()
    subnet = trainer.read_subnet()
    if run.start_subnet is not None and subnet.basis == "given":
        # The trainer counts the units of the model that it began with; of one that was rewritten
        # they are not those of the dense model.
        subnet = subnet.within(run.start_subnet)

    def write(folder: Path) -> None:
        small.save_pretrained(folder)
        (folder / output.SUBNET).write_text(subnet.to_json(), encoding="utf-8")

    run.keep_result("search", write, trainer.guard)
    return small, subnet


def _trainer(run: Run) -> OFBTrainer:
    """Return the trainer of a search that begins with the dense model, or with a smaller one."""
    args = run.phase_arguments("search")
    teacher = run.teacher
    data = run.datasets()
    data |= {"calibration_dataset": run.inputs.train_plain, "guard_dataset": run.inputs.guard}
    if run.start is None and run.config.basis != "given":
        # The dense model is in that basis already.
        supernet = install_bi_masks(run.dense, run.config)
        return OFBTrainer(supernet, args, teacher=teacher, **data)
    start = run.dense
    if run.start is not None:
        start = run.start
        weight = args.distillation_weight
        if weight is None:
            weight = run.config.distillation_weight
        # By default a search learns from the model that it starts with. Here that is a smaller
        # one, and the dense model is the better teacher.
        if teacher is None and weight:
            teacher = run.dense
    return OFBTrainer(start, args, run.config, teacher=teacher, **data)


def finish(run: Run, models: dict[str, PreTrainedModel], subnet: SubnetSpec) -> dict[str, Any]:
    """Measure the models, write the output folder and print the summary."""
    results = measured(run, models)
    if subnet.token_schedule is not None:
        results["token_schedule"] = subnet.token_schedule
    final = models.get("finetuned", models["searched"])

    def draw(path: Path) -> None:
        sizes = describe(run.dense.config).sizes
        plot_search(run.history(), subnet, sizes, run.target, run.config.budget[0], path)

    write_output(
        run,
        final,
        results,
        card=render_card(results, subnet, markdown_table(results_rows(results))),
        subnet=subnet,
        pictures={output.SEARCH_PICTURE: draw, **token_picture(run, final)},
    )
    return results
