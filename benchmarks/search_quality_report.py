"""Write the table and the plot of `search_quality.py` from its results.jsonl.

python benchmarks/search_quality_report.py runs/quality
"""

import argparse
import math
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
    """Write table.md and quality.png; return the table."""
    rows = read_history(folder / "results.jsonl")
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in table_rows(rows)) + "\n"
    (folder / "table.md").write_text(table)
    plot(rows, folder / "quality.png")
    return table


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    """Group runs by budget and contestant, the largest budget and the best contestant first."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["budget"], row["contestant"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][0], -mean(item[1], "top1"))))


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Return the mean of a figure over the runs of a contestant."""
    return statistics.fmean(row[key] for row in rows)


def table_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table: mean, spread (highest - lowest), best, and how much widths differ."""
    lines: list[tuple[str, ...]] = [HEAD, ("---:", "---", *["---:"] * (len(HEAD) - 2))]
    for (budget, name), runs in grouped(rows).items():
        top1 = [row["top1"] for row in runs]
        several = len(runs) > 1
        cells = (
            f"{budget:.2f}",
            name,
            str(len(runs)),
            f"{mean(runs, 'top1'):.2f}",
            f"{max(top1) - min(top1):.2f}" if several else "-",
            f"{max(top1):.2f}",
            after_cut(runs),
            f"{mean(runs, 'share'):.3f}",
            f"{mean(runs, 'params') / 1e6:.3f}",
            f"{100 * width_spread(runs):.0f} %" if several else "-",
            speed(runs),
        )
        lines.append(cells)
    return lines


def after_cut(runs: list[dict[str, Any]]) -> str:
    """Return the accuracy before finetuning; "-" if one run included both."""
    return "-" if runs[0]["top1_cut"] is None else f"{mean(runs, 'top1_cut'):.2f}"


def speed(runs: list[dict[str, Any]]) -> str:
    """Return images per second as a multiple of the dense model's; "-" if not measured."""
    if not all("images_per_second" in row for row in runs):
        return "-"
    ratios = [row["images_per_second"] / row["dense_images_per_second"] for row in runs]
    return f"{statistics.fmean(ratios):.2f} x"


def width_spread(runs: list[dict[str, Any]]) -> float:
    """Return the mean over submodules of (largest - smallest number of kept units) / largest."""
    spreads = []
    for name in runs[0]["sizes"]:
        units = [math.prod(row["sizes"][name]) for row in runs]
        spreads.append((max(units) - min(units)) / max(*units, 1))
    return statistics.fmean(spreads)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot top-1 over MACs: a dot for every run, a line through the means of a contestant."""
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
        xlabel="fraction of the dense model's MACs",
        ylabel="top-1 %",
        title="Equal epochs, equal teacher",
    )
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Write the report of a folder and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="output folder of search_quality.py")
    sys.stdout.write(write_report(parser.parse_args().folder))


if __name__ == "__main__":
    main()
