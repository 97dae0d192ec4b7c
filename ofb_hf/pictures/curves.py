"""Picture of a compression without training: what each size would cost, and what was chosen."""

import math
from pathlib import Path
from typing import Any

from ..families.subnet import SubnetSpec
from .plots import draw_schedule, draw_widths, drawing

Shape = tuple[int, ...]
# Kind of a submodule -> title of its curves.
TITLES = {
    "attention": "Error of attentions",
    "mlp": "Error of MLPs",
    "embedding": "Error of residual widths",
}


def plot_curves(
    errors: dict[str, dict[Shape, float]],
    kinds: dict[str, str],
    subnet: SubnetSpec,
    dense_sizes: dict[str, Shape],
    path: str | Path,
) -> None:
    """Draw the error of every submodule over its size, with the chosen size, and all that is kept.

    Args:
        errors: submodule -> error of each of its sizes, (U,) or (heads, channels).
        kinds: submodule -> `attention`, `mlp` or `embedding`.
        subnet: the result.
        dense_sizes: submodule -> units of the given model.
        path: PNG file to write.
    """
    shown = [kind for kind in TITLES if any(kinds[name] == kind for name in errors)]
    ratios = [1.0] * len(shown) + [1.6]
    if subnet.token_schedule:
        ratios.append(0.9)
    options = {"figsize": (5.2 * sum(ratios), 4.8), "width_ratios": ratios, "squeeze": False}
    with drawing(path, 1, len(ratios), **options) as grid:
        panels = list(grid[0])
        for kind in shown:
            names = [name for name in errors if kinds[name] == kind]
            _draw_curves(panels.pop(0), TITLES[kind], names, errors, subnet, dense_sizes)
        draw_widths(panels.pop(0), subnet, dense_sizes)
        for axes in panels:  # one, or none
            draw_schedule(axes, subnet.token_schedule)


def _draw_curves(
    axes: Any,
    title: str,
    names: list[str],
    errors: dict[str, dict[Shape, float]],
    subnet: SubnetSpec,
    dense_sizes: dict[str, Shape],
) -> None:
    """Draw the curves of submodules of one kind, the first layer dark and the last one light."""
    from matplotlib import colormaps, lines

    shades = colormaps["viridis"]
    for position, name in enumerate(names):
        color = shades(0.9 * position / max(1, len(names) - 1))
        whole = math.prod(dense_sizes[name])
        points = [(math.prod(size) / whole, error) for size, error in errors[name].items()]
        fractions, heights = zip(*_envelope(points), strict=True)
        axes.plot(fractions, heights, color=color, linewidth=1.2)
        size = subnet.shapes[name]
        # What is left out altogether has one size, however many axes it had.
        chosen = errors[name].get(size if math.prod(size) else (0,) * len(size))
        if chosen is not None:
            fraction = math.prod(size) / whole
            axes.plot(fraction, chosen, "o", color=color, markeredgecolor="black", zorder=3)
    # Square roots show sizes that cost nothing as well as those that cost most.
    axes.set_yscale("function", functions=(_root, _square))
    axes.set(
        title=title,
        xlabel="fraction of the units",
        ylabel="expected change of the loss",
        xlim=(-0.03, 1.03),
        ylim=(0, None),
    )
    axes.locator_params(axis="y", nbins=6)
    handles = [lines.Line2D([], [], marker="o", linestyle="", color="0.7", markeredgecolor="black")]
    labels = ["chosen size"]
    for position in sorted({0, len(names) - 1}):
        color = shades(0.9 * position / max(1, len(names) - 1))
        handles.append(lines.Line2D([], [], color=color))
        labels.append(names[position])
    axes.legend(handles, labels, fontsize=8, loc="upper right")


def _envelope(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that are better than all that are no larger, by size.

    Grids have several sizes of the same cost; only the best ones are worth showing.
    """
    best: list[tuple[float, float]] = []
    for fraction, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((fraction, error))
    return best


def _root(values: Any) -> Any:
    return values.clip(min=0) ** 0.5


def _square(values: Any) -> Any:
    return values**2
