"""Draw the pictures of the documentation from recorded figures.

A PNG depends on the version of matplotlib, so a picture carries a fingerprint of the figures and of
the code that drew it; `--check` compares fingerprints, not pixels.
"""

import hashlib
import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from .results import Result

FINGERPRINT = "Fingerprint"
DPI = 120

# Method -> (label, colour, marker); the order is that of the legend, best first.
METHODS = {
    "search": ("this package: widths", "#0b5fa5", "o"),
    "depth": ("this package: widths and depth", "#3d9be0", "s"),
    "tokens": ("this package: widths and tokens", "#12355b", "^"),
    "taylor": ("one-shot, first order", "#c44e1c", "D"),
    "l1": ("one-shot, magnitude", "#e0952b", "v"),
    "uniform": ("uniform scaling", "#7a7a7a", "P"),
    "torch_pruning": ("torch-pruning", "#a06cb0", "X"),
    "paper": ("published recipe", "#4f8f4f", "d"),
    "random": ("random subnets (mean of 8)", "#b5b5b5", "."),
}
TOKEN_METHODS = {
    "learned": ("learned counts", "#0b5fa5", "o"),
    "joint search": ("joint search", "#12355b", "^"),
    "search": ("search for widths", "#3d9be0", "s"),
    "both": ("widths, then tokens", "#7fb8e6", "*"),
    "widths": ("one-shot widths", "#c44e1c", "D"),
    "fixed merging": ("fixed merging", "#4f8f4f", "v"),
    "random dropping": ("random dropping", "#a06cb0", "X"),
    "fixed dropping": ("fixed dropping", "#7a7a7a", "P"),
    "ranked dropping": ("ranked dropping", "#b5b5b5", "d"),
}


def draw_accuracy(data: list[dict[str, Any]]) -> Any:
    """Draw top-1 over MACs for every method of search_quality.json."""
    figure, axes = _axes("Accuracy after equal training: ViT on a CIFAR-10 subset")
    dense = next(row for row in data if row["method"] == "dense")
    for method, (label, color, marker) in METHODS.items():
        rows = [row for row in data if row["method"] == method]
        strong = method in ("search", "depth", "tokens")
        axes.plot(
            [row["MACs"] for row in rows],
            [row["top-1 %"] for row in rows],
            label=label,
            color=color,
            marker=marker,
            linewidth=2.2 if strong else 1.4,
            markersize=7,
            zorder=3 if strong else 2,
        )
    _dense(axes, dense["top-1 %"], "dense, same extra training")
    axes.set(xlim=(0.17, 1.04), xlabel="MACs, fraction of the dense model")
    axes.legend(loc="lower right", frameon=False)
    return figure


def draw_tokens(data: list[dict[str, Any]]) -> Any:
    """Draw top-1 over MACs for every method of token_reduction.json."""
    figure, axes = _axes("Fewer tokens or widths, no weight trained")
    name = "model, fraction of the MACs"
    dense = next(row for row in data if row[name] == "dense")
    for method, (label, color, marker) in TOKEN_METHODS.items():
        rows = [row for row in data if row[name].rpartition(",")[0] == method]
        axes.plot(
            [row["of dense"] for row in rows],
            [row["top-1 %"] for row in rows],
            label=label,
            color=color,
            marker=marker,
            markersize=7,
        )
    _dense(axes, dense["top-1 %"], "dense")
    axes.set(xlim=(0.33, 1.04), xlabel="MACs, fraction of the dense model")
    axes.legend(loc="lower right", frameon=False)
    return figure


def _axes(title: str) -> tuple[Any, Any]:
    """Return an empty figure in the style of the documentation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained", facecolor="white")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel("top-1 %")
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _dense(axes: Any, top1: float, label: str) -> None:
    """Mark the dense model by a star and a dotted line."""
    axes.axhline(top1, color="#333333", linewidth=1, linestyle=":")
    axes.plot([1.0], [top1], color="#333333", marker="*", markersize=13, linestyle="none")
    axes.annotate(
        f"{label}: {top1:.2f} %", (1.0, top1), (0, -16), textcoords="offset points", ha="right"
    )


# File -> (result, how it is drawn).
PICTURES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], Any]]] = {
    "docs/pictures/accuracy.png": ("search_quality", draw_accuracy),
    "docs/pictures/tokens.png": ("token_reduction", draw_tokens),
}


def fingerprint(file: str) -> str:
    """Return a hash over the figures in a picture and over this module."""
    result, _ = PICTURES[file]
    data = json.dumps(Result.load(result).records(), sort_keys=True)
    source = inspect.getsource(inspect.getmodule(fingerprint))
    return hashlib.sha256(f"{data}\n{source}".encode()).hexdigest()


def is_current(file: str, path: Path) -> bool:
    """Return whether the picture at `path` was drawn from the present figures and code."""
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get(FINGERPRINT) == fingerprint(file)


def draw(file: str) -> bytes:
    """Return a picture as PNG."""
    result, draw_figure = PICTURES[file]
    from matplotlib import pyplot

    figure = draw_figure(Result.load(result).records())
    buffer = io.BytesIO()
    metadata = {"Software": None, FINGERPRINT: fingerprint(file)}
    figure.savefig(buffer, dpi=DPI, metadata=metadata)
    pyplot.close(figure)
    return buffer.getvalue()
