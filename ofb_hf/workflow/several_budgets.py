"""Search for several budgets in one run: each model is searched on from the next larger one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..cost.counting import count_cost
from ..families.subnet import SubnetSpec
from ..pictures.plots import plot_accuracy_over_cost
from ..space.configuration import BiMaskConfig
from ..training.arguments import OFBTrainingArguments
from ..training.ranks import decided_by_rank_0
from . import output
from .arguments import changed
from .report import budget_rows, text_table
from .results import save_dense
from .run import Run
from .search import meet_budget, search

logger = logging.get_logger(__name__)


def run_several_budgets(run: Run) -> dict[str, Any]:
    """Fill one complete output folder per budget in the run's own, the largest budget first.

    A smaller model starts from the larger one as its search left it, and learns from the dense
    model. Where error curves choose, it is rewritten in a basis of its own first; bi-masks keep
    some of the units that the larger one kept. Each budget gets an equal part of the epochs of the
    search, so that all of them together cost no more than one search; finetuning, where it is
    wanted, is per model.

    Returns:
        The content of `family.json`: subfolder -> its `eval_results.json`.
    """
    results: dict[str, Any] = {}
    with run.unfinished():
        run.train_dense()
        run.rewrite_dense()
        before = run
        for name in run.targets:
            member = _run_for(run, before, name)
            results[name], member.start, member.start_subnet = _meet_or_read(member)
            # all the way from the dense model; none if the history is on another machine
            member.steps_before = results[name]["steps"].get("search", 0)
            before = member
        if run.is_main:
            _write(run, results)
    return results


def _meet_or_read(member: Run) -> tuple[dict[str, Any], PreTrainedModel, SubnetSpec]:
    """Return what `meet_budget` returns; of a member that is finished, as it was written down."""
    results = output.finished_results(member.folder) if member.is_resuming else None
    # Rank 0 looks for all: no rank may train while others do not.
    results = decided_by_rank_0(lambda: results)
    if results is not None:
        return results, *search(member)
    with member.unfinished():
        return meet_budget(member)


def _run_for(run: Run, before: Run, name: str) -> Run:
    """Return the run for one budget, which starts where the run before it ended.

    Args:
        run: the run for all budgets. before: the one before, or `run` itself for the first.
        name: subfolder of the budget.
    """
    target = run.targets[name]
    return replace(
        run,
        args=_part_of_the_epochs(run, name),
        config=_config_for(run, before, target),
        settings=run.settings | {"target": target},
        targets={name: target},
        start=before.start,
        start_subnet=before.start_subnet,
        steps_before=before.steps_before,
        # it is kept once, in the folder of all
        model_args=replace(run.model_args, keep_dense=False),
    )


def _config_for(run: Run, before: Run, target: int | float) -> BiMaskConfig:
    """Return the config of the search for one budget, fitted to the model that it starts with."""
    if before.start is None:
        return run.config.fitted_to(run.dense.config)
    cost = run.config.absolute(count_cost(before.start, run.config.terms))
    # The search before may have ended below this budget already; then nothing is to be removed.
    reachable = min(target, cost)
    config = run.config
    if not config.chooses_first:
        # Bi-masks cut what was cut from the rewritten model as it is: so its units stay those of
        # the dense one.
        config = config.as_given()
    return config.fitted_to(before.start.config, **{config.budget[0]: reachable})


def _part_of_the_epochs(run: Run, name: str) -> OFBTrainingArguments:
    """Return the training arguments for one budget, in its subfolder."""
    count = len(run.targets)
    epochs = run.args.num_train_epochs / count
    args = changed(run.args, output_dir=str(run.folder / name), num_train_epochs=epochs)
    # it wins over the number of epochs, where it is given
    if args.max_steps > 0:
        args.max_steps = max(1, round(args.max_steps / count))
    if args.warmup_steps >= 1:  # below 1 it is a fraction of all steps, here as there
        args.warmup_steps = round(args.warmup_steps / count)
    return args


def _write(run: Run, results: dict[str, Any]) -> None:
    """Write what is about all budgets: `family.json`, `family.png`, a table on the screen."""

    def draw(path: Path) -> None:
        plot_accuracy_over_cost(results, path)

    if run.model_args.keep_dense:
        save_dense(run)
    output.write_aside(run.folder / output.BUDGETS_PICTURE, draw)
    output.write_json(run.folder / output.BUDGETS_RESULTS, results)
    logger.warning("\n%s\n\nwritten to %s", text_table(budget_rows(results)), run.folder)
