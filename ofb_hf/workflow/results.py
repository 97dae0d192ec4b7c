"""What a run leaves: measured results, the output folder with card and pictures, a publication."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.utils import httpx
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cost.latency import LatencyTable, count_latency, milliseconds
from ..data.processors import GRAY_LEVELS, pixel_statistics
from ..families.registry import describe
from ..families.subnet import SubnetSpec
from ..models.shapes import SHAPES
from ..pictures.token_maps import draw_tokens
from ..release.hub import publish
from ..training.checkpoints import ASIDE
from ..training.full_precision import of_type
from ..training.history import left_out_at
from . import output
from .arguments import changed
from .latency_table import measured_latency
from .measure import NOT_ROUNDED, lost_classes, measure, provenance
from .report import results_rows, text_table
from .run import Run

logger = logging.get_logger(__name__)

Draw = Callable[[Path], None]


def measured(run: Run, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """Return what `eval_results.json` says of any run: the budget, the models, what made them.

    Args:
        models: stage -> model: `dense`, then `searched`, `finetuned` or both.
    """
    results: dict[str, Any] = {}
    if run.config is not None:
        results |= {"target_macs": None, "target_params": None}
        results[run.config.budget[0]] = run.target
    # as they are stored, whatever the evaluations of the training were
    args = changed(run.args, push_to_hub=False, **NOT_ROUNDED)
    stored = {name: of_type(model, run.stored_type) for name, model in models.items()}
    of_models, by_class = measure(stored, run.inputs.eval, args)
    results |= of_models
    results |= provenance(run.args.seed, run.args.device)
    # A resumed run does not know how long the earlier ones took.
    results["seconds"] = None if run.is_resuming else round(time.monotonic() - run.began)
    results["steps"] = _steps(run)
    results["left_out"] = _left_out(run)
    results["kept_weights"] = run.guard_reports()
    results["source"] = run.source
    results["data"] = run.inputs.data.name
    # the one that is kept, whose classes are compared with those of the dense model
    final = list(models)[-1]
    names = run.inputs.data.label_names
    results["lost_classes"] = lost_classes(by_class["dense"], by_class[final], names)
    # With a latency table milliseconds are reported for every budget, not only for one in
    # milliseconds.
    if run.config is not None and run.config.table is not None:
        add_latency(results, models, run.config.table)
    return results


def _steps(run: Run) -> dict[str, int]:
    """Return how many optimizer steps each phase took; for a search, from the dense model on."""
    # Rows are in order, so that the last one of a phase wins.
    steps = {row["phase"]: row["step"] for row in run.history()}
    if "search" in steps:
        steps["search"] += run.steps_before
    return steps


def _left_out(run: Run) -> dict[str, int]:
    """Return which attentions and MLPs this search left out, and by which step."""
    # The history names everything that is missing, also what was missing before this search.
    start = run.dense if run.start is None else run.start
    gone_before = describe(start.config).left_out
    steps = {}
    for name, step in left_out_at(run.history()).items():
        if name not in gone_before:
            steps[name] = step + run.steps_before
    return steps


def add_latency(
    results: dict[str, Any], models: dict[str, PreTrainedModel], table: LatencyTable
) -> None:
    """Add what the table predicts for every model, and what it takes under the same settings.

    Args:
        results: content of `eval_results.json`, with an entry for every model.
        models: by the names of these entries.
        table: of this machine.
    """
    results["latency"] = {"hardware": table.hardware, **table.settings}
    for name, model in models.items():
        results[name]["predicted_latency_ms"] = milliseconds(count_latency(model, table))
    for name, elapsed in measured_latency(models, table).items():
        results[name]["latency_ms"] = elapsed


# --------------------------------------------------------------------------------- output folder


def write_output(
    run: Run,
    model: PreTrainedModel,
    results: dict[str, Any],
    *,
    card: str,
    subnet: SubnetSpec | None = None,
    pictures: dict[str, Draw],
) -> None:
    """Write the product of a run into its output folder, and print the summary.

    All files are written next to their places first and then renamed.

    Args:
        model: the model to keep.
        results: content of `eval_results.json`.
        card: content of `README.md`.
        subnet: content of `subnet.json`, if the kept units are known.
        pictures: file name -> function that draws the picture into a file.
    """
    if not run.is_main:
        return
    folder = run.folder
    aside = folder / f"{ASIDE}-output"
    output.remove(aside)
    fill_folder(
        aside,
        of_type(model, run.stored_type),
        run.inputs.processor,
        results,
        card=card,
        subnet=subnet,
        pictures=pictures,
    )
    if run.model_args.keep_dense:
        save_dense(run)
    # A kill here leaves whole files of one run or the other, and FAILED.txt, which goes last.
    output.move_all(aside, folder)
    logger.warning("\n%s\n\nwritten to %s", text_table(results_rows(results)), folder)


def fill_folder(
    folder: Path,
    model: PreTrainedModel,
    processor: Any,
    results: dict[str, Any],
    *,
    card: str,
    subnet: SubnetSpec | None = None,
    pictures: dict[str, Draw],
) -> None:
    """Write a model and everything that is known about it; arguments as for `write_output`."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    text = json.dumps(results, indent=2) + "\n"
    (folder / output.RESULTS_FILE).write_text(text, encoding="utf-8")
    if subnet is not None:
        (folder / output.SUBNET).write_text(subnet.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name, draw in pictures.items():
        draw(folder / name)


def save_dense(run: Run) -> None:
    """Keep the dense model, with its image processor, in the subfolder `dense`."""

    def write(folder: Path) -> None:
        of_type(run.dense, run.stored_type).save_pretrained(folder)
        run.inputs.processor.save_pretrained(folder)

    output.write_aside(run.folder / "dense", write)


def token_picture(run: Run, model: PreTrainedModel) -> dict[str, Draw]:
    """Return the picture of some evaluation images as the tokens of a model see them.

    Returns:
        For `pictures` of `write_output`; nothing for a model that keeps all tokens, and if no
        images are wanted.
    """
    images = run.inputs.eval
    count = min(run.finetune_args.token_pictures, len(images))
    if not count or getattr(model.config, "token_schedule", None) is None:
        return {}

    def draw(path: Path) -> None:
        # evenly over the split, which may be sorted by class
        chosen = [images[index * len(images) // count] for index in range(count)]
        pixels = torch.stack([row["pixel_values"] for row in chosen])  # (count, 3, H, W)
        # in gray levels, of which the picture has numbers from 0 to 1
        levels = torch.tensor(pixel_statistics(run.inputs.processor))  # (2, 3)
        mean, std = (levels / (GRAY_LEVELS - 1)).tolist()
        draw_tokens(model, pixels, mean, std, path)

    return {output.TOKEN_PICTURE: draw}


def push(run: Run) -> None:
    """Publish the output folder of a finished run.

    Raises:
        LeakError, PublishError: as `ofb_hf.publish`; the folder is complete, and `ofb-hf publish`
            takes it later.
    """
    # One process of all machines, although each machine may have a folder of its own.
    if run.args.process_index != 0:
        return
    commit = publish(
        run.folder,
        run.args.hub_model_id,
        token=run.args.hub_token,
        private=run.args.hub_private_repo,
        revision=run.args.hub_revision,
    )
    logger.warning(f"published: {commit.commit_url}")


# ---------------------------------------------------------------------------------------- source


def source_of(name_or_path: str, model: PreTrainedModel) -> dict[str, str | None]:
    """Return where a model comes from, without folders of this machine.

    Returns:
        {"model": its name, "revision": its commit on the Hub, "license": as its card names it}.
    """
    path = Path(name_or_path)
    return {
        # of a folder only its name: the card is published
        "model": path.resolve().name if path.exists() else name_or_path,
        # set by transformers for what it loaded from the Hub
        "revision": getattr(model.config, "_commit_hash", None),
        "license": license_of(name_or_path),
    }


def license_of(name_or_path: str) -> str | None:
    """Return the licence that the card of a model names; None without one that can be read."""
    if name_or_path in SHAPES:
        return None
    folder = Path(name_or_path)
    try:
        if folder.is_dir():
            file = folder / "README.md"
        else:
            file = Path(hf_hub_download(name_or_path, "README.md"))
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        stated = card.data.license
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, yaml.YAMLError, httpx.RequestError) as error:
        logger.warning(
            f"the card of {name_or_path} cannot be read, so the new card will name no licence: "
            f"{error}"
        )
        return None
    # a card may hold anything there, such as a mapping
    return stated if isinstance(stated, str) else None
