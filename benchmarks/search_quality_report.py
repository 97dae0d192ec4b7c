"""The table and the picture of `search_quality.py`, from its results.jsonl alone.

python benchmarks/search_quality_report.py runs/quality
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from ofb_hf.training.history import read_history

HEAD = (
    "budget",
    "contestant",
    "runs",
    "top-1 %",
    "spread",
    "best",
    "right after the cut %",
    "MACs",
    "params M",
    "widths",
    "speed",
)


def write_report(folder: Path) -> str:
    """Writes table.md and quality.png; returns the table."""
    rows = read_history(folder / "results.jsonl")
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in table_rows(rows)) + "\n"
    (folder / "table.md").write_text(table)
    plot(rows, folder / "quality.png")
    return table


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    """Runs by budget and contestant, the largest budget and the best contestant first."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["budget"], row["contestant"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][0], -mean(item[1], "top1"))))


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Over the runs of a contestant."""
    return statistics.fmean(row[key] for row in rows)


def table_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Mean, spread (highest - lowest) and best of every contestant, and how much its widths differ
    between seeds."""
    lines: list[tuple[str, ...]] = [HEAD, ("---:", "---", *["---:"] * (len(HEAD) - 2))]
    for (budget, name), runs in grouped(rows).items():
        top1 = [row["top1"] for row in runs]
        spreads = f"{max(top1) - min(top1):.2f}", f"{100 * width_spread(runs):.0f} %"
        spread, widths = spreads if len(runs) > 1 else ("-", "-")
        cells = [
            f"{budget:.2f}",
            name,
            str(len(runs)),
            f"{mean(runs, 'top1'):.2f}",
            spread,
            f"{max(top1):.2f}",
        ]
        cells += [
            after_cut(runs),
            f"{mean(runs, 'share'):.3f}",
            f"{mean(runs, 'params') / 1e6:.3f}",
        ]
        lines.append((*cells, widths, speed(runs)))
    return lines


def after_cut(runs: list[dict[str, Any]]) -> str:
    """Accuracy before the finetuning; "-" where one run was both."""
    return "-" if runs[0]["top1_cut"] is None else f"{mean(runs, 'top1_cut'):.2f}"


def speed(runs: list[dict[str, Any]]) -> str:
    """Images per second as a multiple of the dense model's, measured beside it; "-" where they were
    not."""
    if not all("images_per_second" in row for row in runs):
        return "-"
    return f"{statistics.fmean(row['images_per_second'] / row['dense_images_per_second'] for row in runs):.2f} x"


def width_spread(runs: list[dict[str, Any]]) -> float:
    """Mean over submodules of (largest - smallest kept number of units) / largest, between the
    runs."""
    spreads = []
    for name in runs[0]["sizes"]:
        units = [_product(row["sizes"][name]) for row in runs]
        spreads.append((max(units) - min(units)) / max(*units, 1))
    return statistics.fmean(spreads)


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Top-1 over MACs: every run a dot, the means of a contestant joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    by_name: dict[str, list[tuple[float, list[dict[str, Any]]]]] = defaultdict(list)
    for (_, name), runs in grouped(rows).items():
        by_name[name].append((mean(runs, "share"), runs))
    for name, points in by_name.items():
        line = axes.plot(
            [x for x, _ in points], [mean(r, "top1") for _, r in points], marker="o", label=name
        )[0]
        for _, runs in points:
            axes.scatter(
                [r["share"] for r in runs],
                [r["top1"] for r in runs],
                s=8,
                alpha=0.4,
                color=line.get_color(),
            )
    axes.set(
        xlabel="share of the dense model's MACs",
        ylabel="top-1 %",
        title="Equal epochs, equal teacher",
    )
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.stdout.write(write_report(Path(sys.argv[1])))
