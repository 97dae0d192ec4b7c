"""Does a published checkpoint keep what its card promises? Loaded, counted and evaluated again."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..data import DataArguments
from ..model_card import MEASURED, final_results
from ..training_args import OFBTrainingArguments
from .arguments import ModelArguments
from .finetune import run_evaluate

# Points of top-1 and top-5 by which another machine may come out differently.
TOLERANCE = 0.1


def run_verify(
    model_args: ModelArguments, data_args: DataArguments, args: OFBTrainingArguments
) -> tuple[bool, list[list[str]]]:
    """Compares a checkpoint with its card and its `eval_results.json`.

    Returns:
        Whether everything agrees, and a table: what, where it is said, what is said there, what was found.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or has no card with results.
    """
    found = run_evaluate(model_args, data_args, args)
    rows, agrees = [["", "said in", "said", "found", ""]], True
    for place, said in _promises(model_args.model_name_or_path).items():
        for key, value in said.items():
            allowed = TOLERANCE if key in MEASURED else 0
            same = abs(found[key] - value) <= allowed
            agrees &= same
            rows.append([key, place, f"{value:,}", f"{found[key]:,}", "" if same else "differs"])
    return agrees, rows


def _promises(name_or_path: str) -> dict[str, dict[str, float]]:
    """What is said about the checkpoint, by file."""
    card, results = (_read(name_or_path, name) for name in ("README.md", "eval_results.json"))
    metadata = ModelCard(card, ignore_metadata_errors=True).data
    names = {kind: key for key, (kind, _) in MEASURED.items()}
    in_card = {names[r.metric_type]: r.metric_value for r in metadata.eval_results or [] if r.metric_type in names}
    if not in_card:
        raise ValueError(f"the card of {name_or_path} has no results in its metadata; there is nothing to verify.")
    final = final_results(json.loads(results))
    return {"README.md": in_card, "eval_results.json": {key: final[key] for key in (*MEASURED, "macs", "params")}}


def _read(name_or_path: str, name: str) -> str:
    """A text file of a checkpoint, in a folder or on the Hub."""
    folder = Path(name_or_path)
    try:
        path = folder / name if folder.is_dir() else hf_hub_download(name_or_path, name)
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, EntryNotFoundError) as error:
        raise ValueError(f"{name_or_path} has no {name}, so there is nothing to compare with.") from error


def summary(rows: list[list[str]], agrees: bool) -> str:
    """The verdict in one sentence."""
    differing = sum(row[-1] == "differs" for row in rows)
    return "Everything is as the card says." if agrees else f"{differing} of {len(rows) - 1} statements do not hold."
