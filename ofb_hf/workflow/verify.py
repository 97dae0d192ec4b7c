"""Load a published checkpoint, measure it again, and compare it with what its card says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..data import EVAL_SHARE, DataArguments
from ..release.card import MEASURED, final_results, read_results
from ..release.folder import CARD, RESULTS
from ..training.arguments import OFBTrainingArguments
from .arguments import MeasuredModelArguments
from .finetune import run_evaluate
from .inputs import require_findable
from .report import results_rows

# Points of top-1 and top-5 by which another machine may come out differently.
TOLERANCE = 0.1
COMPARED = (*MEASURED, "num_examples", "macs", "params")
DIFFERS = "differs"


def run_verify(
    model_args: MeasuredModelArguments, data_args: DataArguments, args: OFBTrainingArguments
) -> tuple[bool, list[list[str]]]:
    """Compare a checkpoint with its card and its `eval_results.json`.

    Accuracy is measured again, cost is counted again. The text of the card has to agree with its
    metadata and with `eval_results.json`.

    Returns:
        Whether everything agrees, and a table of text: what is compared, the file that states it,
        the stated value, the value found, and "differs" where they disagree.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or has no card with results.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError(
            "--model_name_or_path is missing; give a repository or a folder with a card."
        )
    require_findable(name)
    card = _file(name, CARD).read_text(encoding="utf-8")
    results = read_results(_file(name, RESULTS))
    in_card = _metadata(name, card)
    final = final_results(results)
    in_results = {key: final[key] for key in COMPARED if key in final}
    # The card was written after a training, which holds images out if it must.
    held_out = data_args.eval_share or EVAL_SHARE
    found = run_evaluate(model_args, replace(data_args, eval_share=held_out), args)
    rows = [["", "stated in", "stated", "found", ""]]
    rows += _measured_rows(CARD, in_card, found)
    rows += _measured_rows(RESULTS, in_results, found)
    # the metadata, which the Hub shows, has to be what was written down
    for key, value in in_card.items():
        verdict = "" if value == final[key] else DIFFERS
        rows.append([f"{key}, metadata", CARD, f"{value}", f"{final[key]}", verdict])
    # the table of the card, row by row, without its header
    for cells in results_rows(results)[1:]:
        if f"| {' | '.join(cells)} |" in card:
            rows.append([f"row {cells[0]!r}", CARD, "as in the results", "", ""])
        else:
            rows.append([f"row {cells[0]!r}", CARD, "something else", "", DIFFERS])
    agrees = all(row[-1] != DIFFERS for row in rows)
    return agrees, rows


def _measured_rows(file: str, stated: dict[str, Any], found: dict[str, Any]) -> list[list[str]]:
    """Return one row per value that a file states, next to the value that was measured here."""
    rows = []
    for key, value in stated.items():
        # accuracy depends a little on the machine; costs are exact
        tolerance = TOLERANCE if key in MEASURED else 0
        verdict = "" if abs(found[key] - value) <= tolerance else DIFFERS
        rows.append([key, file, f"{value:,}", f"{found[key]:,}", verdict])
    return rows


def _metadata(name: str, card: str) -> dict[str, float]:
    """Return the accuracy that the metadata of a card states.

    Raises:
        ValueError: for metadata that cannot be read, without results, or with values that are no
            numbers.
    """
    try:
        stated = ModelCard(card, ignore_metadata_errors=True).data.eval_results or []
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of the card of {name} cannot be read: {error}") from error
    # the card names metrics as `evaluate` does: accuracy, top_5_accuracy
    keys = {metric: key for key, (metric, _) in MEASURED.items()}
    values = {}
    for result in stated:
        if result.metric_type in keys:
            values[keys[result.metric_type]] = result.metric_value
    if not values:
        raise ValueError(
            f"the card of {name} has no results in its metadata; there is nothing to verify."
        )
    wrong = {key: value for key, value in values.items() if not isinstance(value, int | float)}
    if wrong:
        raise ValueError(f"the metadata of the card of {name} has no numbers for {wrong}.")
    return values


def _file(name_or_path: str, name: str) -> Path:
    """Return a file of a checkpoint, in a folder or on the Hub.

    Raises:
        ValueError: if the checkpoint does not have it.
    """
    missing = f"{name_or_path} has no {name}, so there is nothing to compare with."
    folder = Path(name_or_path)
    if folder.is_dir():
        path = folder / name
    else:
        try:
            path = Path(hf_hub_download(name_or_path, name))
        except EntryNotFoundError as error:
            raise ValueError(missing) from error
    if not path.is_file():
        raise ValueError(missing)
    return path


def summary(rows: list[list[str]], agrees: bool) -> str:
    """Return the verdict in one sentence."""
    if agrees:
        return "Everything is as the card says."
    differing = sum(row[-1] == DIFFERS for row in rows)
    return f"{differing} of {len(rows) - 1} statements do not hold."
