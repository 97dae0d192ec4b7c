"""Plots of a run: cost and candidates during a search, kept widths, accuracy over cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..families.subnet import SubnetSpec

# A row of `search_history.jsonl`, or a part of `eval_results.json`.
Row = dict[str, Any]
# Of what is measured after a phase.
COLORS = {"searched": "tab:orange", "compressed": "tab:green", "finetuned": "tab:blue"}


def rows_of(history: list[Row], phase: str) -> list[Row]:
    """Return the rows of one phase: `search`, `finetune`, ..."""
    return [row for row in history if row["phase"] == phase]


def column(rows: list[Row], name: str, scale: float = 1) -> list[float]:
    """Return the entries of that name, divided by a scale."""
    return [row[name] / scale for row in rows]


@contextmanager
def drawing(path: str | Path, *shape: int, **options: Any) -> Iterator[Any]:
    """Yield the axes of a new figure; write it to a PNG file at the end of the block.

    No display is needed.

    Args:
        path: PNG file to write.
        shape: rows and columns, as for `pyplot.subplots`.
        options: more arguments of `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options["layout"] = "constrained"
    figure, axes = pyplot.subplots(*shape, **options)
    yield axes
    # Without the version of matplotlib the same run gives the same file.
    metadata = {"Software": None}
    figure.savefig(path, dpi=110, format="png", metadata=metadata)
    pyplot.close(figure)


def plot_search(
    history: list[Row],
    subnet: SubnetSpec,
    dense_sizes: dict[str, tuple[int, ...]],
    target: float,
    budget: str,
    path: str | Path,
) -> None:
    """Draw a search: cost against the budget, active candidates, kept widths, kept tokens.

    Args:
        history: rows of `search_history.jsonl`.
        subnet: the result.
        dense_sizes: submodule name -> units of the dense model, (U,) or (heads, channels).
        target: the budget, in MACs, parameters or milliseconds.
        budget: `target_macs`, `target_params` or `target_latency_ms`.
        path: PNG file to write.
    """
    rows = rows_of(history, "search")
    width = 17.0
    ratios = [1, 0.8, 1.5]
    if subnet.token_schedule:
        width += 4
        ratios.append(0.8)
    options = {"figsize": (width, 4.6), "width_ratios": ratios}
    with drawing(path, 1, len(ratios), **options) as (cost, candidates, widths, *tokens):
        _draw_cost(cost, rows, target, budget)
        _draw_candidates(candidates, rows)
        draw_widths(widths, subnet, dense_sizes)
        for axes in tokens:  # one, or none
            draw_schedule(axes, subnet.token_schedule)


def draw_schedule(axes: Any, schedule: list[list[int]]) -> None:
    """Draw how many tokens of every layer are dropped, merged, and remain.

    Args:
        axes: of matplotlib.
        schedule: token schedule, as in `OFBViTConfig.token_schedule`.
    """
    layers = range(len(schedule))
    kept = [kept for kept, _ in schedule]
    left = [left for _, left in schedule]
    entering = [kept[0], *left[:-1]]
    # Each bar covers the lower part of the one before it.
    axes.bar(layers, entering, color="0.9", label="dropped")
    axes.bar(layers, kept, color="tab:purple", alpha=0.5, label="merged")
    axes.bar(layers, left, color="tab:blue", label="remaining")
    axes.set(title="Tokens between attention and MLP", xlabel="layer", xticks=layers)
    axes.legend()


def plot_accuracy_over_cost(results: dict[str, Row], path: str | Path) -> None:
    """Draw accuracy over MACs: the dense model, and those of several budgets.

    Args:
        results: budget -> content of its `eval_results.json`, the largest first.
        path: PNG file to write.
    """
    of_budgets = list(results.values())
    dense = of_budgets[0]["dense"]
    # Without labels, how near the predictions, or else the features, are to those of the model.
    measures = {
        "top1": ("Accuracy", "top-1 (%)", dense.get("top1")),
        "agreement": ("Agreement with the dense model", "same first class (%)", 100.0),
        "feature_error": ("Error of the features", "of their variance", 0.0),
    }
    final = of_budgets[0].get("compressed") or dense
    key = next(key for key in measures if key in final)
    title, label, of_dense = measures[key]
    with drawing(path, figsize=(6.5, 4.6)) as axes:
        for phase, color in COLORS.items():
            rows = [content[phase] for content in of_budgets if content.get(phase)]
            if rows:
                macs = column(rows, "macs", 1e6)
                axes.plot(macs, column(rows, key), marker="o", label=phase, color=color)
        axes.plot(
            dense["macs"] / 1e6,
            of_dense,
            marker="s",
            label="dense",
            color="0.3",
            linestyle="",
        )
        axes.set(
            title=f"{title} over cost",
            xlabel="MACs of one image (M)",
            ylabel=label,
            xlim=(0, None),
        )
        axes.legend()


def plot_finetuning(history: list[Row], results: Row, path: str | Path) -> None:
    """Draw the loss during finetuning, and accuracy before and after it.

    Args:
        history: rows of `search_history.jsonl`.
        results: content of `eval_results.json`, with `dense` (before) and `finetuned`.
        path: PNG to write.
    """
    rows = rows_of(history, "finetune")
    steps = column(rows, "step")
    losses = column(rows, "loss")
    with drawing(path, 1, 2, figsize=(9, 4.2), width_ratios=[1.6, 1]) as (loss, accuracy):
        loss.plot(steps, losses, color="tab:blue", marker=".")
        loss.set(title="Training loss", xlabel="step of finetuning")
        for shift, stage, label in ((-0.2, "dense", "before"), (0.2, "finetuned", "after")):
            heights = [results[stage]["top1"], results[stage]["top5"]]
            bars = accuracy.bar([shift, 1 + shift], heights, width=0.38, label=label)
            accuracy.bar_label(bars, fmt="%.2f", fontsize=8)
        # room for the legend above the bars
        accuracy.set(title="Accuracy (%)", ylim=(0, 125))
        accuracy.set_xticks([0, 1], ["top-1", "top-5"])
        accuracy.legend(loc="upper center", ncols=2)


def cost_axis(budget: str, largest: float) -> tuple[float, str]:
    """Return what to divide costs by, and the label of their axis.

    Args:
        budget: `target_macs`, `target_params` or `target_latency_ms`.
        largest: cost on the axis.
    """
    if budget == "target_latency_ms":
        return 1.0, "predicted latency (ms)"
    name = "MACs" if budget == "target_macs" else "parameters"
    if largest >= 1e9:
        return 1e9, f"{name} (G)"
    return 1e6, f"{name} (M)"


def draw_budget(axes: Any, target: float, label: str) -> None:
    """Draw the budget as a line, and finish a plot of cost over the steps of a search.

    Args:
        axes: of matplotlib.
        target: the budget, in the unit of the axis.
        label: of the axis.
    """
    axes.axhline(
        target,
        label="budget",
        color="tab:red",
        linestyle="--",
        linewidth=1,
    )
    axes.set(
        title="Cost of the network",
        xlabel="search step",
        ylabel=label,
        ylim=(0, None),
    )
    axes.legend()


def _draw_cost(axes: Any, rows: list[Row], target: float, budget: str) -> None:
    steps = column(rows, "step")
    name = budget.removeprefix("target_")
    largest = max(column(rows, name), default=0)
    scale, label = cost_axis(budget, largest)
    if name == "macs":  # the only cost whose expectation is in the history
        expected = column(rows, "expected_macs", scale)
        axes.plot(steps, expected, label="expected", color="tab:blue")
    axes.step(
        steps,
        column(rows, name, scale),
        where="post",
        label="current network",
        color="tab:orange",
    )
    draw_budget(axes, target / scale, label)


def _draw_candidates(axes: Any, rows: list[Row]) -> None:
    steps = column(rows, "step")
    active = column(rows, "active_candidates")
    axes.step(steps, active, where="post", color="tab:green")
    axes.set(
        title="Active candidates",
        xlabel="search step",
        ylim=(0, None),
    )


def draw_widths(
    axes: Any,
    subnet: SubnetSpec,
    dense_sizes: dict[str, tuple[int, ...]],
) -> None:
    """Draw how many units every submodule keeps, of those that it had.

    Args:
        axes: of matplotlib.
        subnet: the kept units.
        dense_sizes: submodule name -> units of the dense model, (U,) or (heads, channels).
    """
    names = list(dense_sizes)
    shapes = subnet.shapes
    for position, name in enumerate(names):
        kept = shapes[name]
        fraction = 1.0
        for units, dense_units in zip(kept, dense_sizes[name], strict=True):
            # 0 units if the submodule was removed before this search
            fraction *= units / dense_units if dense_units else 0.0
        color = "tab:blue" if len(dense_sizes[name]) == 1 else "tab:purple"
        axes.bar(position, 1, color="0.9")
        axes.bar(position, fraction, color=color)
        label = "removed"
        if all(kept):
            label = " x ".join(str(units) for units in kept)
        axes.text(
            position,
            fraction + 0.01,
            label,
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=7,
        )
    title = "Kept units (fraction of the dense width; purple: heads x channels)"
    axes.set(title=title, ylim=(0, 1.25))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
