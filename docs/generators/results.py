"""Read recorded figures: `benchmarks/results/*.json` and `model_cards/*/eval_results.json`.

A result file holds one table as it was measured: the command, the commit, the conditions, the
columns and the rows. A column with a `format` holds numbers (null where nothing was measured); a
column without one holds text.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CARDS = ROOT / "model_cards"


@dataclass(frozen=True)
class Result:
    """One recorded table."""

    name: str
    columns: list[dict[str, str]]
    rows: list[list[Any]]

    @classmethod
    def load(cls, name: str) -> "Result":
        """Read `benchmarks/results/NAME.json`."""
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return cls(name, content["columns"], content["rows"])

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries from column name to value."""
        names = [column["name"] for column in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def row(self, **wanted: Any) -> dict[str, Any]:
        """Return the one row with these values.

        Raises:
            LookupError: if no row or several rows have them.
        """
        found = [row for row in self.records() if wanted.items() <= row.items()]
        if len(found) != 1:
            raise LookupError(f"{self.name}: {len(found)} rows have {wanted}; expected one.")
        return found[0]

    def text(self, column: str, **wanted: Any) -> str:
        """Return the formatted cell of a column in the one row with these values."""
        position = [spec["name"] for spec in self.columns].index(column)
        return cell(self.columns[position], self.row(**wanted)[column])

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rules = []
        for column in self.columns:
            right = "format" in column or column.get("align") == "right"
            rules.append("---:" if right else "---")
        lines = [[column["name"] for column in self.columns], rules]
        for row in self.rows:
            lines.append([cell(*pair) for pair in zip(self.columns, row, strict=True)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(column: dict[str, str], value: Any) -> str:
    """Return the text of a cell."""
    if value is None:
        return column["missing"]
    return column["format"].format(value) if "format" in column else value


def card(name: str) -> dict[str, Any]:
    """Return the results that a model card of this repository reports."""
    return json.loads((CARDS / name / "eval_results.json").read_text(encoding="utf-8"))
