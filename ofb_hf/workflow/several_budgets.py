"""One run, several budgets: each model of the family is searched on from the one before it."""

import json
from dataclasses import replace
from typing import Any

from transformers.utils import logging

from ..cost.counting import count_cost
from ..pictures.plots import plot_accuracy_over_cost
from . import output, search
from .arguments import changed
from .report import family_rows, text_table

logger = logging.get_logger(__name__)


def run(walk: search.Walk) -> dict[str, Any]:
    """Fills one complete output folder per budget below the run's own, the largest budget first.

    A smaller model starts from the larger one as its search left it, learns from the dense model,
    and keeps part of the units that one kept. The epochs of the search are shared out evenly, so
    that a family costs no more than one search; finetuning, where it is wanted, is per model.

    Returns:
        The content of `family.json`: subfolder -> its `eval_results.json`.
    """
    with search.output_of(walk):
        search.train_dense(walk)
        results, member = {}, walk
        for name, target in walk.targets.items():
            member = _member(walk, member, name, target)
            with search.output_of(member):
                results[name], member.start, member.start_subnet = search.meet_budget(member)
            member.steps_before = results[name]["steps"].get("search", 0)
        if walk.is_main:
            _write(walk, results)
    return results


def _member(walk: search.Walk, before: search.Walk, name: str, target: int) -> search.Walk:
    """The walk to one budget, from where the one before it ended."""
    config, shares = walk.config.fitted_to(walk.dense.config), len(walk.targets)
    if before.start is not None:
        budget = walk.config.budget[0]
        cost = walk.config.absolute(count_cost(before.start, walk.config.terms))
        # The last search may have ended below this budget already; then there is nothing left to
        # remove.
        config = walk.config.fitted_to(before.start.config, **{budget: min(target, cost)})
    args = changed(
        walk.args,
        output_dir=str(walk.folder / name),
        num_train_epochs=walk.args.num_train_epochs / shares,
    )
    if args.max_steps > 0:
        args.max_steps = max(1, round(args.max_steps / shares))
    if args.warmup_steps >= 1:  # below 1 it is a share
        args.warmup_steps = round(args.warmup_steps / shares)
    return replace(
        walk,
        args=args,
        config=config,
        settings=walk.settings | {"target": target},
        targets={name: target},
        start=before.start,
        start_subnet=before.start_subnet,
        steps_before=before.steps_before,
        model_args=replace(walk.model_args, keep_dense=False),
    )


def _write(walk: search.Walk, results: dict[str, Any]) -> None:
    """The family as a whole: `family.json`, `family.png`, a table on the screen."""
    if walk.model_args.keep_dense:
        search.save_dense(walk)
    output.write_aside(
        walk.folder / output.FAMILY_PICTURE, lambda path: plot_accuracy_over_cost(results, path)
    )
    output.write_aside(
        walk.folder / output.FAMILY,
        lambda path: path.write_text(json.dumps(results, indent=2) + "\n", "utf-8"),
    )
    logger.warning("\n%s\n\nwritten to %s", text_table(family_rows(results)), walk.folder)
