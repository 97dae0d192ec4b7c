"""Training from a teacher, from labels, or from both."""

import pytest
import torch
from factories import FAMILIES, tiny_model, tiny_vit
from invariants import ours
from runs import arguments, rows
from torch import nn
from transformers import TrainingArguments, default_data_collator

from ofb_hf import DistillationTrainer, OFBViTForImageClassification
from ofb_hf.training.losses import distillation_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_one_learns_the_same_from_a_teacher_of_ours_as_from_the_stock_one(tmp_path, family):
    stock, losses = tiny_model(family), []
    for teacher in (stock, ours(family)):
        trainer = DistillationTrainer(
            tiny_model(family, seed=1), arguments(tmp_path), teacher=teacher
        )
        batch = default_data_collator(rows()[:4])
        losses.append(trainer.task_loss(torch.zeros(4, 3), batch["pixel_values"], batch["labels"]))
    torch.testing.assert_close(*losses)
    assert losses[0] > 0


class Sharper(OFBViTForImageClassification):
    """A teacher with a forward pass of its own."""

    def forward(self, pixel_values):
        outputs = super().forward(pixel_values)
        outputs.logits = 3 * outputs.logits
        return outputs


def brighter(module, args, kwargs):
    """A hook that shows a teacher other pixels."""
    return args, kwargs | {"pixel_values": 2 * kwargs["pixel_values"] + 1}


@pytest.mark.parametrize("kind", ["hooked", "subclass", "compiled"])
def test_a_teacher_of_ours_answers_as_if_called(tmp_path, kind):
    """With its hooks, with its own forward pass, and by its compiled code."""
    graphs, teacher = (
        [],
        (Sharper if kind == "subclass" else OFBViTForImageClassification).from_dense(tiny_vit()),
    )
    if kind == "hooked":
        teacher.register_forward_pre_hook(brighter, with_kwargs=True)
    if kind == "compiled":
        teacher = torch.compile(
            teacher, backend=lambda graph, inputs: graphs.append(graph) or graph
        )
    trainer = DistillationTrainer(tiny_vit(seed=1), arguments(tmp_path), teacher=teacher)
    batch, logits = default_data_collator(rows()[:4]), torch.randn(4, 3)
    loss = trainer.task_loss(logits, batch["pixel_values"], batch["labels"])
    assert bool(graphs) == (kind == "compiled")
    with torch.no_grad():
        answer = trainer.teacher(pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(
        loss, distillation_loss(logits, answer, trainer.args.distillation_temperature)
    )


def test_finetuning_takes_indices_probabilities_and_smoothing(tmp_path):
    model, losses = tiny_vit().train(), {}
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 2])
    for smoothing in (0.0, 0.1):
        trainer = DistillationTrainer(model, arguments(tmp_path, label_smoothing_factor=smoothing))
        for name, target in (("hard", labels), ("soft", nn.functional.one_hot(labels, 3).float())):
            losses[name, smoothing] = trainer.compute_loss(
                model, {"pixel_values": images, "labels": target}
            ).item()
    assert losses["hard", 0.0] == pytest.approx(losses["soft", 0.0], rel=1e-5)
    assert losses["hard", 0.1] == pytest.approx(losses["soft", 0.1], rel=1e-5)
    logits = model(images).logits
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert losses["hard", 0.1] == pytest.approx(expected, rel=1e-5)


def test_plain_training_arguments_are_refused_here_too(tmp_path):
    with pytest.raises(TypeError, match="give OFBTrainingArguments"):
        DistillationTrainer(tiny_vit(), TrainingArguments(str(tmp_path), use_cpu=True))
