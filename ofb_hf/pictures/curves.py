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
# Errors below this fraction of the largest one are drawn on a linear scale, down to 0.
LINEAR = 1e-3
TINY = 1e-30


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
    present = {kinds[name] for name in errors}
    shown = [kind for kind in TITLES if kind in present]
    columns = max(2, len(shown))
    with drawing(path, 2, columns, figsize=(5.2 * columns, 9.0)) as grid:
        for axes, kind in zip(grid[0], shown, strict=False):
            names = [name for name in errors if kinds[name] == kind]
            _draw_curves(axes, TITLES[kind], names, errors, subnet, dense_sizes)
        for axes in grid[0][len(shown) :]:
            axes.set_axis_off()
        # The widths of all submodules need more room than one panel.
        places = grid[0][0].get_gridspec()
        for axes in grid[1]:
            axes.remove()
        figure = grid[0][0].figure
        last = columns
        if subnet.token_schedule:
            last = columns - 1
            draw_schedule(figure.add_subplot(places[1, last]), subnet.token_schedule)
        draw_widths(figure.add_subplot(places[1, :last]), subnet, dense_sizes)


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
    # Full sizes cost nothing, and others may differ by powers of ten.
    largest = max((max(errors[name].values()) for name in names), default=0.0)
    axes.set_yscale("symlog", linthresh=max(largest, TINY) * LINEAR)
    axes.set(
        title=title,
        xlabel="fraction of the units",
        ylabel="expected change of the loss",
        xlim=(-0.03, 1.03),
        ylim=(0, None),
    )
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
