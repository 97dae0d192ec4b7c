"""Accuracy of a classifier, from ranked classes: no process ever holds the logits of a whole split.

Trainer(..., compute_metrics=compute_topk, preprocess_logits_for_metrics=top5_indices)
"""

from torch import Tensor
from transformers import EvalPrediction

from .topk_accuracy.topk_accuracy import TopKAccuracy

MAX_RANK = 5


def top5_indices(logits: Tensor | tuple[Tensor, ...], labels: Tensor | None = None) -> Tensor:
    """Return the best classes of every image, best first.

    Args:
        logits: (B, classes), or a tuple that begins with them, of models that also return hidden
            states.
        labels: are not used; the Trainer passes them.

    Returns:
        (B, 5) int64, with fewer columns if there are fewer classes.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    rank = min(MAX_RANK, logits.shape[-1])
    return logits.topk(rank, dim=-1).indices


def compute_topk(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Return {"top1", "top5"} in percent, of the whole evaluation split.

    Args:
        eval_prediction: ranked classes (N, k) as `predictions` and labels (N,) as `label_ids`.
    """
    # The class itself, because `evaluate.load` would first copy the file into the user's cache. In
    # memory, because otherwise the ranks of one machine would share a cache file.
    metric = TopKAccuracy(keep_in_memory=True)
    return metric.compute(
        predictions=eval_prediction.predictions, references=eval_prediction.label_ids
    )
