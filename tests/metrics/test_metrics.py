"""Top-1 and top-5 agree with counting by hand, also through the Trainer and through
`evaluate.load`."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

import ofb_hf.metrics
from ofb_hf.metrics import compute_topk, top5_indices

FOLDER = Path(ofb_hf.metrics.__file__).parent / "topk_accuracy"


@given(classes=st.integers(2, 12), count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_agrees_with_counting(classes, count, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    ranked = top5_indices(logits, labels)
    assert ranked.shape == (count, min(5, classes))
    assert ranked.dtype == torch.int64
    better = (logits > logits.gather(1, labels[:, None])).sum(1)
    result = compute_topk(EvalPrediction(ranked.numpy(), labels.numpy()))
    assert result == {
        "top1": pytest.approx(100 * (better < 1).float().mean().item()),
        "top5": pytest.approx(100 * (better < 5).float().mean().item()),
    }
    assert all(type(value) is float for value in result.values())


def test_first_of_several_outputs_counts():
    logits, hidden = torch.randn(3, 7), torch.randn(3, 4, 2)
    assert torch.equal(top5_indices((logits, hidden), torch.zeros(3)), top5_indices(logits))


def test_evaluate_loads_the_folder_offline(tmp_path, monkeypatch):
    metric = evaluate.load(str(FOLDER), cache_dir=str(tmp_path))
    ranked = [[0, 1, 2, 3, 4, 5], [5, 1, 2, 3, 4, 0]]
    assert metric.compute(predictions=ranked, references=[0, 0]) == {"top1": 50.0, "top5": 50.0}
    metric.add_batch(predictions=[[1, 0]], references=[0])
    metric.add_batch(predictions=np.array([[1, 0], [0, 1]]), references=np.array([1, 1]))
    assert metric.compute() == {"top1": pytest.approx(100 / 3), "top5": 100.0}


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no predictions to score"):
        compute_topk(EvalPrediction(np.zeros((0, 5), dtype=np.int64), np.zeros(0, dtype=np.int64)))


class Table(nn.Module):
    """Logits that are the inputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, labels=None):
        logits = pixel_values * self.scale
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("classes", [3, 9])
def test_trainer_collects_uneven_batches(tmp_path, classes):
    logits, labels = torch.randn(11, classes), torch.randint(classes, (11,))
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(logits, labels.tolist(), strict=True)]
    trainer = Trainer(
        Table(),
        TrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        eval_dataset=rows,
        compute_metrics=compute_topk,
        preprocess_logits_for_metrics=top5_indices,
    )
    metrics = trainer.evaluate()
    expected = compute_topk(EvalPrediction(top5_indices(logits).numpy(), labels.numpy()))
    assert (metrics["eval_top1"], metrics["eval_top5"]) == (expected["top1"], expected["top5"])
    if classes == 3:
        assert metrics["eval_top5"] == 100
