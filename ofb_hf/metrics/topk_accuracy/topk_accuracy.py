"""Top-1 and top-5 accuracy, for `evaluate.load`.

The file imports no other file of the package, because `evaluate.load` copies it to another folder.
"""

import datasets
import evaluate
import numpy as np

DESCRIPTION = (
    "Percentage of images whose class is the first, or among the first five, of a ranked list."
)
INPUTS = """
Args:
    predictions: class indices of every image, best first: (N, k). Those beyond the fifth are
        ignored; with fewer than five classes, k is their number.
    references: the right classes: (N,).
Returns:
    {"top1", "top5"} in percent.
"""


class TopKAccuracy(evaluate.Metric):
    """Compute top-1 and top-5 accuracy from ranked classes.

    `evaluate.load("ofb_hf/metrics/topk_accuracy")` gives it without a network.
    """

    def _info(self) -> evaluate.MetricInfo:
        ranked = datasets.Sequence(datasets.Value("int64"))
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": ranked, "references": label}),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError("there are no predictions to score; the evaluation set is empty.")
        ranked = np.asarray(predictions)[:, :5]  # (N, up to 5)
        labels = np.asarray(references)[:, None]  # (N, 1)
        hits = ranked == labels  # (N, up to 5)
        return {
            "top1": 100 * float(hits[:, :1].any(1).mean()),
            "top5": 100 * float(hits.any(1).mean()),
        }
