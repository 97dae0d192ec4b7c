"""The README of a checkpoint: what it is, what was measured on it, how it was made."""

from pathlib import Path
from string import Template
from typing import Any

from .search_space import SubnetSpec

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
PLAIN_TEMPLATE = TEMPLATE.with_name("plain_card.md")


def render_card(results: dict[str, Any], subnet: SubnetSpec, table: str, source: str, data: str, hardware: str) -> str:
    """Fills the card template; every number comes from `results`.

    Args:
        results: content of `eval_results.json`.
        subnet: what was kept.
        table: results as a Markdown table.
        source: the dense parent; data: name of the data set; hardware: where the speed was measured.
    """
    final = results.get("finetuned") or results["searched"]
    budget = "target_macs" if results["target_macs"] is not None else "target_params"
    unit = "MACs" if budget == "target_macs" else "parameters"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"OFB {source}",
        source=source,
        share=f"{100 * final['macs'] / results['dense']['macs']:.1f} %",
        num_examples=f"{final['num_examples']:,}",
        data=data,
        hardware=hardware,
        table=table,
        budget=f"at most {results[budget]:,} {unit}",
        command=results["command"],
        seed=results["seed"],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        widths="\n".join(f"- `{name}`: {_width(size)}" for name, size in subnet.sizes.items()),
    )


def plain_card(macs: int, params: int) -> str:
    """The card of a model that nothing was measured on.

    Args:
        macs, params: its exact cost and size.
    """
    return Template(PLAIN_TEMPLATE.read_text(encoding="utf-8")).substitute(macs=f"{macs:,}", params=f"{params:,}")


def _width(size: int | tuple[int, int]) -> str:
    return f"{size[0]} heads x {size[1]} channels" if isinstance(size, tuple) else str(size)
