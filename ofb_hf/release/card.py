"""Model cards: the README of a checkpoint, with what was measured on it and how it was made."""

import json
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..cost.latency import threads_text
from ..families.subnet import SubnetSpec

TEMPLATES = Path(__file__).with_name("templates")
# Budget -> its unit, with fields of the latency table's description.
BUDGETS = {
    "target_macs": "MACs",
    "target_params": "parameters",
    "target_latency_ms": "ms for a batch of {batch_size} with {threads} ({device}, "
    "{dtype}), as predicted",
}
# Basis of a cut without training -> what was rewritten before it.
BASES = {
    "equivalent": "its heads and residual streams were rewritten in an equivalent basis, which "
    "changes no output",
    "heads": "its heads were rewritten in an equivalent basis, which changes no output",
    "given": "nothing was rewritten",
}
# Licences of models by the names that the Hub knows; it refuses a card with any other name.
LICENSES = {
    "afl-3.0",
    "agpl-3.0",
    "apache-2.0",
    "artistic-2.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "gpl",
    "gpl-2.0",
    "gpl-3.0",
    "lgpl",
    "lgpl-3.0",
    "mit",
    "mpl-2.0",
    "openrail",
    "other",
    "unknown",
    "unlicense",
}
CLASSIFY = """from transformers import pipeline

classify = pipeline("image-classification", "PATH_OR_REPOSITORY")"""
EXTRACT = """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("PATH_OR_REPOSITORY")
model = AutoModel.from_pretrained("PATH_OR_REPOSITORY")"""
TOKENS_KEPT = "Tokens kept after dropping, and left after merging, class token included:"
# Basis of a subnet -> what its indices count.
COUNTED_IN = {
    "heads": "The indices in `subnet.json` count units of the dense model in an equivalent basis: "
    "its heads were rewritten before the cut, which changes no output.",
    "equivalent": "The indices in `subnet.json` count units of the dense model in an equivalent "
    "basis: its heads, and residual streams where the architecture allows it, were rewritten "
    "before the cut, which changes no output.",
}
OUR_CODE = "import ofb_hf  # registers the model class; or pass trust_remote_code=True instead\n"
# Recipes whose file name alone is the program in the records of version 0.1.
RECIPES = ("search_deit.py", "search_swin.py", "search_tokens.py", "finetune.py")
# Phase in the results -> its name in a sentence.
PHASES = {"dense": "dense training", "search": "search", "finetune": "finetuning"}
# Key of a result -> type and name of the metric on the Hub.
MEASURED = {"top1": ("accuracy", "top-1 %"), "top5": ("top_5_accuracy", "top-5 %")}


def render_card(results: dict[str, Any], subnet: SubnetSpec, table: str) -> str:
    """Return the card of a searched model; every number comes from `results`.

    Args:
        results: content of `eval_results.json`.
        subnet: the kept units, and the token schedule if there is one.
        table: the results as a Markdown table.
    """
    widths = _widths(subnet, results.get("left_out", {}))
    tokens = ""
    if subnet.token_schedule is not None:
        tokens = f"\n{TOKENS_KEPT}\n\n{_table(subnet.token_schedule)}\n"
    return _filled("model_card.md", results, table, widths=widths, tokens=tokens)


def render_token_card(results: dict[str, Any], table: str) -> str:
    """Return the card of a model with a learned token schedule.

    Args:
        results: content of `eval_results.json`, the token schedule included.
        table: the results as a Markdown table.
    """
    weights = "Its weights are those of the parent."
    if results.get("finetuned"):
        weights = "Its weights were finetuned."
    schedule = _table(results["token_schedule"])
    return _filled("token_card.md", results, table, schedule=schedule, weights=weights)


def render_finetuned_card(
    results: dict[str, Any],
    table: str,
    *,
    subnet: SubnetSpec | None = None,
    token_schedule: list[list[int]] | None = None,
    is_stock: bool = False,
) -> str:
    """Return the card of a model that `ofb-hf finetune` made; every number comes from `results`.

    Args:
        results: content of `eval_results.json`, whose `dense` is the model before finetuning.
        table: the results as a Markdown table.
        subnet: the units that the model keeps, where a search made it narrower.
        token_schedule: as in `OFBViTConfig`, where the model drops and merges tokens.
        is_stock: whether the model is of a class of transformers, which needs none of our code.
    """
    # What the model has of a search that came before; nothing for a dense one.
    sections = []
    if subnet is not None:
        sections.append(f"Kept widths:\n\n{_widths(subnet, {})}")
    if token_schedule is not None:
        sections.append(f"{TOKENS_KEPT}\n\n{_table(token_schedule)}")
    final = final_results(results)
    return _filled(
        "finetuned_card.md",
        results,
        table,
        metadata=card_data(results, is_stock=is_stock).to_yaml(),
        lost=_lost(results["lost_classes"], "the model before finetuning", "before")
        + _kept(results),
        code="" if is_stock else OUR_CODE,
        macs=f"{final['macs']:,}",
        params=f"{final['params']:,}",
        architecture="".join(f"\n{section}\n" for section in sections),
    )


def render_compressed_card(results: dict[str, Any], subnet: SubnetSpec, table: str) -> str:
    """Return the card of a model that was compressed without training.

    Args:
        results: content of `eval_results.json`, from which every number comes.
        subnet: the kept units, and the token schedule if there is one.
        table: the results as a Markdown table.
    """
    sections = [f"Kept widths, in the basis of the cut:\n\n{_widths(subnet, {})}"]
    if subnet.token_schedule is not None:
        sections.append(f"{TOKENS_KEPT}\n\n{_table(subnet.token_schedule)}")
    final = final_results(results)
    has_head = "agreement" in final
    if has_head:
        nearness = (
            f"Its first class is that of the given model for {final['agreement']:.2f} % of the "
            f"images, with a divergence (KL) of {final['kl']:.3g} nats"
        )
    else:
        nearness = (
            "There is no classification head: the squared distance of its features from those of "
            f"the given model is {final['feature_error']:.4f} of their variance"
        )
    accuracy = "There were no labels that it knows, so that accuracy is not known."
    count = results["num_images"]
    looked_at = "One image was looked at" if count == 1 else f"{count:,} images were looked at"
    has_top1 = "top1" in final
    if has_top1:
        accuracy = (
            "Labels were used only for measuring: "
            f"{final['top1']:.2f} % top-1 on {final['num_labelled']:,} labelled images."
        )
    return _filled(
        "compressed_card.md",
        results,
        table,
        nearness=nearness,
        accuracy=accuracy,
        basis=BASES[results["basis"]],
        looked_at=looked_at,
        use=CLASSIFY if has_head else EXTRACT,
        lost=_lost(results["lost_classes"], "the dense model", "dense") + "\n" if has_top1 else "",
        measured_on=results["measured_on"],
        architecture="".join(f"\n{section}\n" for section in sections),
    )


def _kept(results: dict[str, Any]) -> str:
    """Return sentences about the weights that each phase kept, empty where it did not compare."""
    sentences = []
    for phase, report in results.get("kept_weights", {}).items():
        figures = ", ".join(f"{name} {top1:.1f} %" for name, top1 in report["top1"].items())
        sentences.append(
            f"Of the weights of the {PHASES[phase]}, those *{report['kept']}* were kept (top-1 on "
            f"{report['images']:,} held-out training images: {figures})."
        )
    return "\n\n" + " ".join(sentences) if sentences else ""


def _table(token_schedule: list[list[int]]) -> str:
    """Return a token schedule as a Markdown table."""
    lines = ["| layer | after dropping | after merging |", "| ---: | ---: | ---: |"]
    for layer, (kept, left) in enumerate(token_schedule):
        lines.append(f"| {layer} | {kept} | {left} |")
    return "\n".join(lines)


def _filled(template: str, results: dict[str, Any], table: str, **more: str) -> str:
    """Fill a template with everything that all cards say, and with `more`, which wins."""
    final = final_results(results)
    source = results["source"]
    origin = source["model"]
    if source["revision"]:
        origin += f" (revision {source['revision']})"
    time = "in several runs"  # a resumed run does not know how long the earlier ones took
    if results["seconds"] is not None:
        time = f"{results['seconds'] / 60:.1f} minutes"
    fraction = final["macs"] / results["dense"]["macs"]
    steps = []
    for phase, count in results["steps"].items():
        noun = "step" if count == 1 else "steps"
        steps.append(f"{count:,} {noun} of {PHASES[phase]}")
    versions = [f"{name} {version}" for name, version in results["versions"].items()]
    values = {
        "metadata": card_data(results).to_yaml(),
        "title": _title(results),
        "source": origin,
        "fraction": f"{100 * fraction:.1f} %",
        "num_examples": f"{final['num_examples']:,}",
        "data": results["data"],
        # as the records of version 0.1 have it
        "hardware": results["hardware"].replace(" 1 threads", " 1 thread"),
        "table": table,
        "lost": _lost(results["lost_classes"], "the dense model", "dense") + _kept(results),
        "budget": _budget(results),
        "command": _command(results["command"]),
        "seed": results["seed"],
        "steps": ", ".join(steps),
        "time": time,
        "commit": results["commit"] or "of a release",
        "versions": ", ".join(versions),
    }
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return Template(text).substitute(values | more)


def _title(results: dict[str, Any]) -> str:
    source = results["source"]["model"]
    cut = results.get("searched") or results.get("compressed")
    return f"OFB {source}" if cut else f"{source}, finetuned"


def _command(recorded: str) -> str:
    """Return the command of a run as one types it, with the launcher of a recipe."""
    program = recorded.partition(" ")[0]
    if program in RECIPES:
        recorded = f"recipes/{recorded}"
    return f"accelerate launch {recorded}" if recorded.startswith("recipes/") else recorded


def _budget(results: dict[str, Any]) -> str:
    """Return the budget of a search as text; nothing for a run that had none."""
    for name, unit in BUDGETS.items():
        if results.get(name) is not None:
            latency = dict(results.get("latency") or {})
            if "num_threads" in latency:
                latency["threads"] = threads_text(latency["num_threads"])
            return f"at most {results[name]:,} {unit.format_map(latency)}"
    return ""


def final_results(results: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured on the checkpoint: after finetuning, or right after the cut."""
    return results.get("finetuned") or results.get("searched") or results["compressed"]


def card_data(results: dict[str, Any], is_stock: bool = False) -> ModelCardData:
    """Return the metadata that the Hub reads, with the measured accuracy as a model-index.

    Args:
        results: content of `eval_results.json`.
        is_stock: whether the model is of a class of transformers and has all of its units.
    """
    final = final_results(results)
    source = results["source"]["model"]
    data = results["data"]
    license = results["source"].get("license")
    # A name that the Hub does not know goes into `license_name`, with "other" as the licence.
    known = license is None or license in LICENSES
    evaluation = {
        "task_type": "image-classification",
        "dataset_type": data,
        "dataset_name": data,
    }
    # Without a head there is nothing that classifies.
    task = "image-feature-extraction" if "feature_error" in final else "image-classification"
    metrics = []
    for key, (kind, name) in MEASURED.items():
        # Compression needs no labels, and images that it held out are no split of the data.
        if key not in final or results.get("held_out"):
            continue
        value = final[key]
        metrics.append(
            EvalResult(metric_type=kind, metric_name=name, metric_value=value, **evaluation)
        )
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["vision-transformer"] if is_stock else ["ofb", "pruning", "vision-transformer"],
        license=license if known else "other",
        license_name=None if known else license,
        # Only what is on the Hub has a name with an owner.
        base_model=source if "/" in source else None,
        datasets=[data] if "/" in data else None,
        model_name=_title(results),
        eval_results=metrics or None,
    )


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of an `eval_results.json`.

    Raises:
        ValueError: for anything else, with the file and what is missing in it.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    final = None
    if isinstance(results, dict):
        final = results.get("finetuned") or results.get("searched") or results.get("compressed")
    if not isinstance(final, dict):
        raise ValueError(
            f"{path} has no results: neither 'finetuned' nor 'searched' nor 'compressed' is in it."
        )
    needed = ["num_examples", "macs", "params"]
    # Compression needs no labels, so that there may be no accuracy.
    if final is not results.get("compressed") or "top1" in final:
        needed += MEASURED
    missing = [key for key in needed if not _is_number(final.get(key))]
    if missing:
        raise ValueError(f"{path} has no numbers for {missing} in its final results.")
    has_data_name = isinstance(results.get("data", ""), str)
    has_source = isinstance(results.get("source", {}), dict)
    if not (has_data_name and has_source):
        raise ValueError(
            f"{path}: 'data' is a name and 'source' is {{'model', 'revision'}}; remove them if "
            "unknown."
        )
    return results


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain_card(macs: int, params: int, token_schedule: list[list[int]] | None = None) -> str:
    """Return the card of a model on which nothing was measured.

    Args:
        macs: exact cost of one image.
        params: number of parameters.
        token_schedule: as in `OFBViTConfig`.
    """
    twin = (
        "If this repository has a branch `stock`, it holds the same model as a checkpoint of\n"
        'transformers\' own ViT class, which needs no further code (`revision="stock"`).'
    )
    if token_schedule is not None:
        twin = (
            "Its layers drop and merge patch tokens, which transformers' own class would not do, "
            f"so there is no\ncheckpoint of that class.\n\n{TOKENS_KEPT}\n\n"
            f"{_table(token_schedule)}"
        )
    template = Template((TEMPLATES / "plain_card.md").read_text(encoding="utf-8"))
    return template.substitute(macs=f"{macs:,}", params=f"{params:,}", twin=twin)


def _lost(classes: dict[str, list[float]], reference: str, column: str) -> str:
    """Return which classes lost much against the reference model, whose column has that title."""
    if not classes:
        return f"No class lost more than 10 points of top-1 against {reference}."
    lines = [
        f"Classes that lost more than 10 points of top-1 against {reference}:",
        "",
        f"| class | {column} | this model |",
        "| --- | ---: | ---: |",
    ]
    for name, (was, now) in classes.items():
        # a name may hold what separates the columns of a Markdown table
        escaped = name.replace("|", "\\|")
        lines.append(f"| {escaped} | {was:.1f} | {now:.1f} |")
    return "\n".join(lines)


def _widths(subnet: SubnetSpec, left_out: dict[str, int]) -> str:
    """Return a list of the kept widths, and in which basis they were cut.

    Args:
        subnet: the kept units.
        left_out: submodule -> step of the search by which it was removed.
    """
    lines = []
    for name, size in subnet.sizes.items():
        lines.append(f"- `{name}`: {_width(size, left_out.get(name))}")
    if subnet.basis in COUNTED_IN:
        lines += ["", COUNTED_IN[subnet.basis]]
    return "\n".join(lines)


def _width(size: int | tuple[int, int], removed_by: int | None) -> str:
    if size in (0, (0, 0)):
        return (
            "removed" if removed_by is None else f"removed (by step {removed_by:,} of the search)"
        )
    if isinstance(size, tuple):
        heads, channels = size
        return f"{heads} heads x {channels} channels"
    return str(size)
