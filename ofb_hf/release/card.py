"""The README of a checkpoint: what it is, what was measured on it, how it was made."""

import json
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..families.subnet import SubnetSpec

TEMPLATES = Path(__file__).with_name("templates")
BUDGETS = {
    "target_macs": "MACs",
    "target_params": "parameters",
    "target_latency_ms": "ms for a batch of {batch_size} with {num_threads} threads ({device}, "
    "{dtype}), as predicted",
}
# Names of licences that the Hub knows, of those that models come under; it refuses a card with any
# other.
LICENSES = {
    *(
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "mpl-2.0",
        "unlicense",
        "artistic-2.0",
        "afl-3.0",
    ),
    *(
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-3.0",
        "agpl-3.0",
        "cc",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
    ),
    *(
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-4.0",
        "openrail",
        "other",
        "unknown",
    ),
}
MEASURED = {"top1": ("accuracy", "top-1 %"), "top5": ("top_5_accuracy", "top-5 %")}


def render_card(results: dict[str, Any], subnet: SubnetSpec, table: str) -> str:
    """Fills the card template; every number comes from `results`.

    Args:
        results: content of `eval_results.json`.
        subnet: what was kept.
        table: results as a Markdown table.
    """
    left_out = results.get("left_out", {})
    widths = "\n".join(
        f"- `{name}`: {_width(size, left_out.get(name))}" for name, size in subnet.sizes.items()
    )
    tokens = ""
    if subnet.token_schedule is not None:
        said = "Tokens kept after dropping, and after merging, class token included:"
        tokens = f"\n{said}\n\n{_table(subnet.token_schedule)}\n"
    return _filled("model_card.md", results, table, widths=widths, tokens=tokens)


def render_token_card(results: dict[str, Any], table: str) -> str:
    """The card of a model with a learned token schedule, which is in `results`; arguments as for
    `render_card`."""
    schedule = _table(results["token_schedule"])
    tuned = (
        "Its weights were finetuned."
        if results.get("finetuned")
        else "Its weights are those of the parent."
    )
    return _filled("token_card.md", results, table, schedule=schedule, weights=tuned)


def _table(token_schedule: list[list[int]]) -> str:
    rows = [
        f"| {layer} | {kept} | {merged} |" for layer, (kept, merged) in enumerate(token_schedule)
    ]
    return "\n".join(
        ["| layer | after dropping | after merging |", "| ---: | ---: | ---: |", *rows]
    )


def _filled(template: str, results: dict[str, Any], table: str, **more: str) -> str:
    """A template with everything in it that all cards say."""
    final, source = final_results(results), results["source"]
    budget = next(name for name in BUDGETS if results.get(name) is not None)
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(
        metadata=card_data(results).to_yaml(),
        title=f"OFB {source['model']}",
        source=source["model"]
        + (f" (revision {source['revision']})" if source["revision"] else ""),
        share=f"{100 * final['macs'] / results['dense']['macs']:.1f} %",
        num_examples=f"{final['num_examples']:,}",
        data=results["data"],
        hardware=results["hardware"],
        table=table,
        lost=_lost(results["lost_classes"]),
        budget=f"at most {results[budget]:,} "
        f"{BUDGETS[budget].format_map(results.get('latency', {}))}",
        command=results["command"],
        seed=results["seed"],
        steps=", ".join(f"{count:,} steps of {phase}" for phase, count in results["steps"].items()),
        time="in several sittings"
        if results["seconds"] is None
        else f"{results['seconds'] / 60:.1f} minutes",
        commit=results["commit"] or "of a release",
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        **more,
    )


def final_results(results: dict[str, Any]) -> dict[str, Any]:
    """What was measured on the checkpoint itself: after finetuning, or right after the search."""
    return results.get("finetuned") or results["searched"]


def card_data(results: dict[str, Any]) -> ModelCardData:
    """The metadata that the Hub reads, measured accuracy as a model-index included."""
    final, source, data = final_results(results), results["source"]["model"], results["data"]
    license = results["source"].get("license")
    known = license is None or license in LICENSES
    on_hub = {"dataset_type": data, "dataset_name": data, "task_type": "image-classification"}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["ofb", "pruning", "vision-transformer"],
        license=license if known else "other",
        license_name=None if known else license,
        base_model=source if "/" in source else None,
        datasets=[data] if "/" in data else None,
        model_name=f"OFB {source}",
        eval_results=[
            EvalResult(metric_type=kind, metric_name=name, metric_value=final[key], **on_hub)
            for key, (kind, name) in MEASURED.items()
        ],
    )


def read_results(path: Path) -> dict[str, Any]:
    """The content of an `eval_results.json`.

    Raises:
        ValueError: for anything else, naming the file and what is missing in it.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    final = (
        (results.get("finetuned") or results.get("searched")) if isinstance(results, dict) else None
    )
    if not isinstance(final, dict):
        raise ValueError(f"{path} has no results: neither 'finetuned' nor 'searched' is in it.")
    if missing := [
        key
        for key in (*MEASURED, "num_examples", "macs", "params")
        if not _is_number(final.get(key))
    ]:
        raise ValueError(f"{path} has no numbers for {missing} in its final results.")
    if not isinstance(results.get("data", ""), str) or not isinstance(
        results.get("source", {}), dict
    ):
        raise ValueError(
            f"{path}: 'data' is a name and 'source' is {{'model', 'revision'}}; remove them if "
            f"unknown."
        )
    return results


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain_card(macs: int, params: int, token_schedule: list[list[int]] | None = None) -> str:
    """The card of a model that nothing was measured on.

    Args:
        macs, params: its exact cost and size.
        token_schedule: as in `OFBViTConfig`.
    """
    template = Template((TEMPLATES / "plain_card.md").read_text(encoding="utf-8"))
    twin = (
        "Where this repository has a branch `stock`, that is the same model as a checkpoint of "
        "transformers' own class"
        ', which needs no\ncode at all (`revision="stock"`).'
    )
    if token_schedule is not None:
        twin = (
            "Its layers drop and merge patch tokens, which transformers' own class would not do: "
            "there is no "
            f"checkpoint of that class.\nTokens kept, class token "
            f"included:\n\n{_table(token_schedule)}"
        )
    return template.substitute(macs=f"{macs:,}", params=f"{params:,}", twin=twin)


def _lost(classes: dict[str, list[float]]) -> str:
    if not classes:
        return "No class lost more than 10 points of top-1 against the dense model."
    escaped = {name.replace("|", "\\|"): tops for name, tops in classes.items()}
    rows = [f"| {name} | {before:.1f} | {after:.1f} |" for name, (before, after) in escaped.items()]
    head = "Classes that lost more than 10 points of top-1 against the dense model:"
    return "\n".join([head, "", "| class | dense | this model |", "| --- | ---: | ---: |", *rows])


def _width(size: int | tuple[int, int], gone_by: int | None) -> str:
    if size in (0, (0, 0)):
        return "left out" + (f" (by step {gone_by:,} of the search)" if gone_by is not None else "")
    return f"{size[0]} heads x {size[1]} channels" if isinstance(size, tuple) else str(size)
