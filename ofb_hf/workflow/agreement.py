"""Compare compressed models with the given one: predictions, features, and accuracy if known."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..families.evaluation import evaluating, total_distance
from ..pruning.sums import Sums

# Of the model that the others are compared with.
DENSE = "dense"
TOP = 5
# Where all features are equal.
TINY = 1e-12
# A class with fewer images says nothing about what it lost.
FEWEST_OF_A_CLASS = 10


@torch.no_grad()
def compare(
    models: dict[str, PreTrainedModel],
    batches: Iterable[tuple[Tensor, list[int | None]]],
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Measure models on the same images, over all processes.

    Args:
        models: by name; `dense` is the one to compare with. Without a head features are compared.
        batches: of this process: images (B, C, H, W) and their classes, None where unknown.

    Returns:
        By name: {"num_examples"}, for those that are compared {"agreement" in percent, "kl" in
        nats}, or {"feature_error" as a fraction of the variance}; with labels {"top1", "top5" in
        percent, "num_labelled"}. And top-1 of every class in percent, NaN with few images.
    """
    sums = Sums()
    dense = models[DENSE]
    num_labels = dense.config.num_labels
    # A process without any image has to add up the same sums as the others.
    _add_zeros(sums, models, dense.config.hidden_size)
    with evaluating(*models.values()):
        for pixel_values, labels in batches:
            pixel_values = pixel_values.to(dense.device, dense.dtype)
            wanted = dense(pixel_values=pixel_values).logits.float()
            sums.add(("images",), len(wanted))
            for name, model in models.items():
                found = wanted
                if name != DENSE:
                    found = model(pixel_values=pixel_values).logits.float()
                    _add_distance(sums, name, wanted, found, num_labels)
                if num_labels:
                    _add_hits(sums, name, found, labels)
            if not num_labels:
                sums.add(("features",), wanted.sum(0))
                sums.add(("energy",), wanted.square().sum())
    sums.reduce_()
    return _summary(sums, models, num_labels)


def _add_zeros(sums: Sums, models: dict[str, PreTrainedModel], num_features: int) -> None:
    num_labels = models[DENSE].config.num_labels
    sums.add(("images",), 0)
    for name in models:
        if num_labels:
            for key in ("right", "labelled", "top5"):
                sums.add((name, key), torch.zeros(num_labels))
        if name != DENSE:
            for key in ("agreeing", "distance"):
                sums.add((name, key), 0)
    if not num_labels:
        sums.add(("features",), torch.zeros(num_features))
        sums.add(("energy",), 0)


def _add_distance(sums: Sums, name: str, wanted: Tensor, found: Tensor, num_labels: int) -> None:
    """Add how far logits, or features, (B, K) are from those of the dense model."""
    sums.add((name, "distance"), total_distance(found, wanted, num_labels))
    if num_labels:
        agreeing = found.argmax(-1) == wanted.argmax(-1)  # (B,)
        sums.add((name, "agreeing"), agreeing.sum())


def _add_hits(sums: Sums, name: str, logits: Tensor, labels: list[int | None]) -> None:
    """Add which labelled images are classified rightly, by class."""
    known = [index for index, label in enumerate(labels) if label is not None]
    if not known:
        return
    classes = logits.shape[-1]
    logits = logits[known].cpu()  # (K, classes)
    truth = torch.tensor([labels[index] for index in known])  # (K,)
    best = logits.topk(min(TOP, classes)).indices  # (K, 5)
    hits = best == truth[:, None]
    for key, counted in (("right", hits[:, 0]), ("top5", hits.any(1))):
        sums.add((name, key), torch.bincount(truth[counted], minlength=classes))
    sums.add((name, "labelled"), torch.bincount(truth, minlength=classes))


def _summary(
    sums: Sums, models: dict[str, PreTrainedModel], num_labels: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    images = int(sums[("images",)])
    results: dict[str, dict[str, Any]] = {}
    by_class: dict[str, list[float]] = {}
    for name in models:
        results[name] = {"num_examples": images}
        if name != DENSE and images:
            results[name] |= _nearness(sums, name, num_labels)
        if num_labels:
            results[name] |= _accuracy(sums, name)
            by_class[name] = _top1_by_class(sums, name)
    return results, by_class


def _accuracy(sums: Sums, name: str) -> dict[str, Any]:
    """Return top-1 and top-5 in percent; nothing without labels."""
    count = int(sums[(name, "labelled")].sum())
    if not count:
        return {}
    accuracy: dict[str, Any] = {"num_labelled": count}
    for key, hits in (("top1", "right"), ("top5", "top5")):
        percent = 100 * float(sums[(name, hits)].sum()) / count
        accuracy[key] = round(percent, 4)
    return accuracy


def _top1_by_class(sums: Sums, name: str) -> list[float]:
    """Return top-1 of every class in percent, NaN where there are too few images."""
    labelled = sums[(name, "labelled")]
    percent = 100 * sums[(name, "right")] / labelled
    percent[labelled < FEWEST_OF_A_CLASS] = math.nan
    return percent.round(decimals=4).tolist()


def _nearness(sums: Sums, name: str, num_labels: int) -> dict[str, float]:
    """Return how near a model is to the dense one: its first class and its logits, or features."""
    images = float(sums[("images",)])
    distance = float(sums[(name, "distance")]) / images
    if num_labels:
        agreement = 100 * float(sums[(name, "agreeing")]) / images
        return {"agreement": round(agreement, 4), "kl": round(distance, 6)}
    mean = sums[("features",)] / images
    energy = float(sums[("energy",)]) / images
    variance = energy - float(mean.square().sum())
    error = distance / max(variance, TINY)
    return {"feature_error": round(error, 6)}
