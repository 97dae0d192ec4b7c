"""Does a published checkpoint keep what its card promises? Loaded, counted and evaluated again."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..data import DataArguments
from ..release.card import MEASURED, final_results, read_results
from ..release.folder import CARD, RESULTS
from ..training.arguments import OFBTrainingArguments
from .arguments import ModelArguments
from .finetune import run_evaluate
from .report import results_rows

# Points of top-1 and top-5 by which another machine may come out differently.
TOLERANCE = 0.1
COMPARED = (*MEASURED, "num_examples", "macs", "params")


def run_verify(
    model_args: ModelArguments, data_args: DataArguments, args: OFBTrainingArguments
) -> tuple[bool, list[list[str]]]:
    """Compares a checkpoint with its card and its `eval_results.json`.

    Accuracy is measured again, cost counted again. What the card shows to people has to be what its
    metadata and `eval_results.json` say.

    Returns:
        Whether everything agrees, and a table: what, where it is said, what is said there, what was
        found.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or has no card with results.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError(
            "--model_name_or_path is missing; give a repository or a folder with a card."
        )
    card, results = (
        _file(name, CARD).read_text(encoding="utf-8"),
        read_results(_file(name, RESULTS)),
    )
    in_card = _metadata(name, card)
    final, found = final_results(results), run_evaluate(model_args, data_args, args)
    rows = [["", "said in", "said", "found", ""]]
    for place, said in ((CARD, in_card), (RESULTS, {key: final[key] for key in COMPARED})):
        for key, value in said.items():
            same = abs(found[key] - value) <= (TOLERANCE if key in MEASURED else 0)
            rows.append([key, place, f"{value:,}", f"{found[key]:,}", "" if same else "differs"])
    for key, value in in_card.items():
        rows.append(
            [
                f"{key}, metadata",
                CARD,
                f"{value}",
                f"{final[key]}",
                "" if value == final[key] else "differs",
            ]
        )
    for cells in results_rows(results)[1:]:
        shown = f"| {' | '.join(cells)} |" in card
        rows.append(
            [f"row {cells[0]!r}", CARD, "as in the results" if shown else "something else", "", ""]
        )
        rows[-1][-1] = "" if shown else "differs"
    return all(row[-1] != "differs" for row in rows), rows


def _metadata(name: str, card: str) -> dict[str, float]:
    """Accuracy as the metadata of a card states it."""
    try:
        stated = ModelCard(card, ignore_metadata_errors=True).data.eval_results or []
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of the card of {name} cannot be read: {error}") from error
    names = {kind: key for key, (kind, _) in MEASURED.items()}
    values = {
        names[result.metric_type]: result.metric_value
        for result in stated
        if result.metric_type in names
    }
    if not values:
        raise ValueError(
            f"the card of {name} has no results in its metadata; there is nothing to verify."
        )
    if wrong := {key: value for key, value in values.items() if not isinstance(value, int | float)}:
        raise ValueError(f"the metadata of the card of {name} has no numbers for {wrong}.")
    return values


def _file(name_or_path: str, name: str) -> Path:
    """A file of a checkpoint, in a folder or on the Hub."""
    folder = Path(name_or_path)
    try:
        path = folder / name if folder.is_dir() else Path(hf_hub_download(name_or_path, name))
    except EntryNotFoundError as error:
        raise ValueError(
            f"{name_or_path} has no {name}, so there is nothing to compare with."
        ) from error
    if not path.is_file():
        raise ValueError(f"{name_or_path} has no {name}, so there is nothing to compare with.")
    return path


def summary(rows: list[list[str]], agrees: bool) -> str:
    """The verdict in one sentence."""
    differing = sum(row[-1] == "differs" for row in rows)
    return (
        "Everything is as the card says."
        if agrees
        else f"{differing} of {len(rows) - 1} statements do not hold."
    )
