"""The summary that a run prints."""

from typing import Any

COLUMNS = (
    ("top-1 %", "top1", lambda value: f"{value:.2f}"),
    ("top-5 %", "top5", lambda value: f"{value:.2f}"),
    ("GMACs", "macs", lambda value: f"{value / 1e9:.4g}"),
    ("params M", "params", lambda value: f"{value / 1e6:.4g}"),
    ("MiB", "bytes", lambda value: f"{value / 2**20:.2f}"),
    ("images/s", "images_per_second", lambda value: f"{value:,.0f}"),
)
# Of runs with a latency table.
LATENCY = (
    ("ms", "latency_ms", lambda value: f"{value:.3f}"),
    ("predicted", "predicted_latency_ms", "{:.3f}".format),
)
TITLES = {"dense": "dense", "searched": "after search", "finetuned": "after finetuning"}


def results_rows(results: dict[str, Any]) -> list[list[str]]:
    """Header and one row per stage of `eval_results.json`, as text."""
    columns = COLUMNS + (LATENCY if results.get("latency") else ())
    rows = [["model", *(title for title, _, _ in columns)]]
    for stage, title in TITLES.items():
        if results.get(stage):
            values = results[stage]
            rows.append(
                [
                    title,
                    *(
                        show(values[key]) if values.get(key) is not None else "-"
                        for _, key, show in columns
                    ),
                ]
            )
    return rows


def family_rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Header, the dense model, and the final stage of every budget, as text.

    Args:
        results: budget -> its `eval_results.json`, the largest first.
    """
    rows: list[list[str]] = []
    for budget, member in results.items():
        header, dense, *_, last = results_rows(member)
        rows = rows or [["budget", *header[1:]], dense]
        rows.append([budget, *last[1:]])
    return rows


def text_table(rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(cells)
        )
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: list[list[str]]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])
