"""Pictures of a search, for people who would rather look than read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..families.subnet import SubnetSpec


@contextmanager
def drawing(path: str | Path, *shape: int, **options: Any) -> Iterator[Any]:
    """Yields the axes of a new figure, and writes it as PNG afterwards, without a display.

    Args:
        path: file to write. shape, options: rows, columns and more, as for `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
    yield axes
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)


def plot_search(
    history: list[dict[str, Any]],
    subnet: SubnetSpec,
    dense_sizes: dict[str, tuple[int, ...]],
    target: float,
    budget: str,
    path: str | Path,
) -> None:
    """Draws a search: cost against the budget, candidates in the race, what is left of every layer,
    and of its tokens where these were searched.

    Args:
        history: rows of `search_history.jsonl`.
        subnet: the result.
        dense_sizes: submodule name -> units of the dense model, (U,) or (heads, channels).
        target: the budget, in MACs, parameters or milliseconds.
        budget: `target_macs`, `target_params` or `target_latency_ms`.
        path: PNG to write.
    """
    rows = [row for row in history if row["phase"] == "search"]
    tokens = [0.8] if subnet.token_schedule else []
    with drawing(
        path,
        1,
        3 + len(tokens),
        figsize=(17 + 4 * len(tokens), 4.6),
        width_ratios=[1, 0.8, 1.5, *tokens],
    ) as (
        cost,
        race,
        widths,
        *counts,
    ):
        _draw_cost(cost, rows, target, budget)
        _draw_race(race, rows)
        _draw_widths(widths, subnet, dense_sizes)
        for axes in counts:
            draw_schedule(axes, subnet.token_schedule)


def draw_schedule(axes: Any, schedule: list[list[int]]) -> None:
    """Draws what is dropped, merged and left of the tokens of every layer.

    Args:
        axes: of matplotlib. schedule: as in `OFBViTConfig.token_schedule`.
    """
    layers, before = (
        range(len(schedule)),
        [schedule[0][0], *(merged for _, merged in schedule[:-1])],
    )
    axes.bar(layers, before, color="0.9", label="dropped")
    axes.bar(layers, [kept for kept, _ in schedule], color="tab:purple", alpha=0.5, label="merged")
    axes.bar(layers, [merged for _, merged in schedule], color="tab:blue", label="left")
    axes.set(title="Tokens between attention and MLP", xlabel="layer", xticks=layers)
    axes.legend()


def plot_accuracy_over_cost(results: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Draws accuracy over MACs of the models of a family, right after the search and finetuned, and
    of the dense one.

    Args:
        results: budget -> content of its `eval_results.json`, the largest first.
        path: PNG to write.
    """
    members = list(results.values())
    dense = members[0]["dense"]
    with drawing(path, figsize=(6.5, 4.6)) as axes:
        for stage, color in (("searched", "tab:orange"), ("finetuned", "tab:blue")):
            rows = [member[stage] for member in members if member.get(stage)]
            if rows:
                macs, top1 = [row["macs"] / 1e6 for row in rows], [row["top1"] for row in rows]
                axes.plot(macs, top1, marker="o", label=stage, color=color)
        axes.plot(
            dense["macs"] / 1e6, dense["top1"], marker="s", label="dense", color="0.3", linestyle=""
        )
        axes.set(
            title="Accuracy over cost",
            xlabel="MMACs of one image",
            ylabel="top-1 (%)",
            xlim=(0, None),
        )
        axes.legend()


def plot_finetuning(
    history: list[dict[str, Any]], results: dict[str, Any], path: str | Path
) -> None:
    """Draw the loss during finetuning, and accuracy before and after it.

    Args:
        history: rows of `search_history.jsonl`.
        results: content of `eval_results.json`, with `dense` (before) and `finetuned`.
        path: PNG to write.
    """
    rows = [row for row in history if row["phase"] == "finetune"]
    steps = [row["step"] for row in rows]
    with drawing(path, 1, 2, figsize=(9, 4.2), width_ratios=[1.6, 1]) as (loss, accuracy):
        loss.plot(steps, [row["loss"] for row in rows], color="tab:blue", marker=".")
        loss.set(title="Training loss", xlabel="step of finetuning")
        for shift, stage, label in ((-0.2, "dense", "before"), (0.2, "finetuned", "after")):
            heights = [results[stage]["top1"], results[stage]["top5"]]
            bars = accuracy.bar([shift, 1 + shift], heights, width=0.38, label=label)
            accuracy.bar_label(bars, fmt="%.2f", fontsize=8)
        # room for the legend above the bars
        accuracy.set(title="Accuracy (%)", ylim=(0, 125))
        accuracy.set_xticks([0, 1], ["top-1", "top-5"])
        accuracy.legend(loc="upper center", ncols=2)


def _draw_cost(axes: Any, rows: list[dict[str, Any]], target: float, budget: str) -> None:
    steps = [row["step"] for row in rows]
    name = budget.removeprefix("target_")
    scale, unit = (1e9, "G ") if max([row[name] for row in rows], default=0) >= 1e9 else (1e6, "M ")
    if name == "latency_ms":
        scale, unit = 1, "predicted "
    if name == "macs":
        axes.plot(
            steps,
            [row["expected_macs"] / scale for row in rows],
            label="expected",
            color="tab:blue",
        )
    axes.step(
        steps,
        [row[name] / scale for row in rows],
        where="post",
        label="network as it is",
        color="tab:orange",
    )
    axes.axhline(target / scale, label="budget", color="tab:red", linestyle="--", linewidth=1)
    axes.set(
        title="Cost of the network", xlabel="search step", ylabel=f"{unit}{name}", ylim=(0, None)
    )
    axes.legend()


def _draw_race(axes: Any, rows: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    axes.step(steps, [row["active_candidates"] for row in rows], where="post", color="tab:green")
    axes.set(title="Candidates still in the race", xlabel="search step", ylim=(0, None))


def _draw_widths(axes: Any, subnet: SubnetSpec, dense_sizes: dict[str, tuple[int, ...]]) -> None:
    names = list(dense_sizes)
    for position, name in enumerate(names):
        size, dense = subnet.size(name), dense_sizes[name]
        kept = size if isinstance(size, tuple) else (size,)
        share = 1.0
        for left, full in zip(kept, dense, strict=True):
            share *= left / full if full else 0.0  # it may have been left out before this search
        axes.bar(position, 1, color="0.9")
        axes.bar(position, share, color={1: "tab:blue", 2: "tab:purple"}[len(dense)])
        label = " x ".join(map(str, kept)) if all(kept) else "left out"
        axes.text(position, share + 0.01, label, rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set(
        title="Kept units (share of the dense width; heads x channels in purple)", ylim=(0, 1.25)
    )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
