"""Accuracy of a classifier, computed from ranked classes so that no process ever holds all logits.

Trainer(..., compute_metrics=compute_topk, preprocess_logits_for_metrics=top5_indices)
"""

from torch import Tensor
from transformers import EvalPrediction

from .topk_accuracy.topk_accuracy import TopKAccuracy

MAX_RANK = 5


def top5_indices(logits: Tensor | tuple[Tensor, ...], labels: Tensor | None = None) -> Tensor:
    """The best classes of each image, best first: (B, classes) -> (B, min(5, classes)) int64.

    Of a tuple (models that also return hidden states) the first element counts. The labels are not
    looked at: the Trainer passes them.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    return logits.topk(min(MAX_RANK, logits.shape[-1]), dim=-1).indices


def compute_topk(eval_prediction: EvalPrediction) -> dict[str, float]:
    """{"top1", "top5"} in percent from ranked classes (N, k) and labels (N,), as `Trainer.evaluate`
    collects them."""
    # In memory: the ranks of one machine must not meet in a cache file. The class itself, not
    # `evaluate.load`: that would copy the script into the user's cache first.
    metric = TopKAccuracy(keep_in_memory=True)
    return metric.compute(
        predictions=eval_prediction.predictions, references=eval_prediction.label_ids
    )
