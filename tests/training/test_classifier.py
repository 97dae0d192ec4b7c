"""Training from labels alone, and what a teacher adds to it."""

import pytest
import torch
from factories import tiny_model
from invariants import assert_equal_states
from runs import arguments, rows
from transformers import TrainingArguments

from ofb_hf import ClassifierTrainer, DistillationTrainer


def trained(folder, trainer_class, **changes):
    """The weights after four steps without a teacher."""
    args = arguments(folder, max_steps=4, label_smoothing_factor=0.1, **changes)
    trainer = trainer_class(tiny_model("vit").train(), args, train_dataset=rows())
    trainer.train()
    return trainer.model.state_dict()


def test_distillation_without_a_teacher_is_training_from_labels(tmp_path):
    before = tiny_model("vit").state_dict()
    from_labels = trained(tmp_path / "labels", ClassifierTrainer, ema_decay=0.9)
    without_teacher = trained(tmp_path / "none", DistillationTrainer, ema_decay=0.9)
    assert_equal_states(from_labels, without_teacher)
    assert any(not torch.equal(before[name], tensor) for name, tensor in from_labels.items())


def test_a_trainer_that_learns_from_labels_refuses_a_weight_for_the_teacher(tmp_path):
    args = arguments(tmp_path, distillation_weight=0.5)
    with pytest.raises(ValueError, match=r"distillation_weight is 0\.5, but ClassifierTrainer"):
        ClassifierTrainer(tiny_model("vit"), args)
    with pytest.raises(ValueError, match=r"distillation_weight is 0\.5, but there is no teacher"):
        DistillationTrainer(tiny_model("vit"), args)
    ClassifierTrainer(tiny_model("vit"), arguments(tmp_path, distillation_weight=0.0))


def test_a_teacher_has_the_same_number_of_labels(tmp_path):
    teacher = tiny_model("vit", num_labels=7)
    with pytest.raises(ValueError, match="the teacher has 7 labels and the model 3"):
        DistillationTrainer(tiny_model("vit"), arguments(tmp_path), teacher=teacher)


def test_plain_training_arguments_are_refused_with_an_explanation(tmp_path):
    with pytest.raises(TypeError, match="give OFBTrainingArguments"):
        ClassifierTrainer(tiny_model("vit"), TrainingArguments(str(tmp_path), use_cpu=True))
