"""Top-1 and top-5 accuracy; self-contained, because `evaluate.load` copies this file away from its
package."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Share of images, in percent, whose class is the first, or among the first five, of a ranked list."
INPUTS = """
Args:
    predictions: class indices per image, best first: (N, k). With fewer than five classes k is their number; beyond
        the fifth they are ignored.
    references: the right classes: (N,).
Returns:
    {"top1", "top5"} in percent.
"""


class TopKAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy from ranked classes, for `evaluate.load(folder)` without a
    network."""

    def _info(self) -> evaluate.MetricInfo:
        ranked = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": ranked, "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        """predictions (N, k), references (N,) -> percentages."""
        if len(references) == 0:
            raise ValueError("there are no predictions to score; the evaluation set is empty.")
        hits = np.asarray(predictions)[:, :5] == np.asarray(references)[:, None]
        return {
            "top1": 100 * float(hits[:, :1].any(1).mean()),
            "top5": 100 * float(hits.any(1).mean()),
        }
