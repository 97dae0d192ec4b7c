"""Tables of results, as text for a terminal and as Markdown for a card."""

from collections.abc import Callable
from typing import Any

from .._moved import refusing_renamed

# of names that the module had in version 0.1
__getattr__ = refusing_renamed(__name__)


# How the columns show their values, in the units that papers use.
def _in_thousands(value: float) -> str:
    return f"{value:,.0f}"


def _giga(value: float) -> str:
    return f"{value / 1e9:.4g}"


def _millions(value: float) -> str:
    return f"{value / 1e6:.4g}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.2f}"


# (title, key in `eval_results.json`, function that formats the value)
Column = tuple[str, str, Callable[[float], str]]
COLUMNS: tuple[Column, ...] = (
    ("top-1 %", "top1", "{:.2f}".format),
    ("top-5 %", "top5", "{:.2f}".format),
    ("GMACs", "macs", _giga),
    ("params M", "params", _millions),
    ("MiB", "bytes", _mebibytes),
    ("images/s", "images_per_second", _in_thousands),
)
# Of compression without training: how near the predictions are to those of the given model.
NEARNESS: tuple[Column, ...] = (
    ("agreement %", "agreement", "{:.2f}".format),
    ("KL", "kl", "{:.3g}".format),
    ("feature error", "feature_error", "{:.4f}".format),
)
# Of runs with a latency table.
LATENCY_COLUMNS: tuple[Column, ...] = (
    ("ms", "latency_ms", "{:.3f}".format),
    ("predicted", "predicted_latency_ms", "{:.3f}".format),
)
TITLES = {
    "dense": "dense",
    "searched": "after search",
    "compressed": "compressed",
    "finetuned": "after finetuning",
}


def results_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return a header and one row for each measured model, as text.

    Args:
        results: content of `eval_results.json`.
    """
    columns = COLUMNS
    if results.get("latency"):
        columns += LATENCY_COLUMNS
    titles = TITLES
    compressed = results.get("compressed")
    if compressed:
        # what could be measured: there may be no labels, or no head
        columns = tuple(column for column in (*NEARNESS, *columns) if column[1] in compressed)
    elif not results.get("searched"):
        # Nothing was searched: the first model is that before finetuning, dense or not.
        titles = TITLES | {"dense": "before finetuning"}
    rows = [["model", *(title for title, _, _ in columns)]]
    for stage, title in titles.items():
        values = results.get(stage)
        if values:
            rows.append([title, *_cells(values, columns)])
    return rows


def _cells(values: dict[str, Any], columns: tuple[Column, ...]) -> list[str]:
    """Return the values of one model as text, "-" for what was not measured."""
    cells = []
    for _, key, show in columns:
        value = values.get(key)
        cells.append("-" if value is None else show(value))
    return cells


def budget_rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return a header, the dense model, and the final model of every budget, as text.

    Args:
        results: budget -> its `eval_results.json`, the largest first.
    """
    rows: list[list[str]] = []
    for budget, member in results.items():
        header, dense, *_, final = results_rows(member)
        if not rows:
            # the dense model is the same for all budgets
            rows = [["budget", *header[1:]], dense]
        rows.append([budget, *final[1:]])
    return rows


def text_table(rows: list[list[str]]) -> str:
    """Return aligned columns, the first to the left, with a line under the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table, the first column to the left."""
    header, *others = ["| " + " | ".join(row) + " |" for row in rows]
    alignment = "| --- |" + " ---: |" * (len(rows[0]) - 1)
    return "\n".join([header, alignment, *others])
