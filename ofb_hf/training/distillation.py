"""A Trainer for image classifiers that learn from a teacher, from labels, or from both."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.evaluation import logits_of
from ..families.registry import require_single_label
from .arguments import OFBTrainingArguments
from .classifier import ClassifierTrainer
from .losses import classification_loss, distillation_loss


class DistillationTrainer(ClassifierTrainer):
    """Train an image classifier from labels and from a teacher; the base of `OFBTrainer`.

    Args:
        model: an image classifier.
        args: `OFBTrainingArguments`, with `distillation_type` and `distillation_temperature`.
        teacher: any image classifier with the same labels, or None to learn from labels only. It
            is put into evaluation mode and sees the batches that the model sees.
        distillation_weight: fraction of the classification loss that comes from the teacher,
            where `args.distillation_weight` is None.
        kwargs: as for `ClassifierTrainer`.

    Raises:
        ValueError: if teacher and model have different numbers of labels, or if `args` ask for
            distillation without a teacher. Otherwise as `ClassifierTrainer`.
    """

    has_teacher_settings = True

    def __init__(
        self,
        model: nn.Module,
        args: OFBTrainingArguments,
        teacher: PreTrainedModel | None = None,
        distillation_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(model=model, args=args, **kwargs)
        if teacher is None and args.distillation_weight:
            raise ValueError(
                f"distillation_weight is {args.distillation_weight}, but there is no teacher; "
                "give one, or leave the weight out."
            )
        if teacher is not None and teacher.config.num_labels != model.config.num_labels:
            raise ValueError(
                f"the teacher has {teacher.config.num_labels} labels and the model "
                f"{model.config.num_labels}; distillation needs the same labels in the same order."
            )
        if teacher is not None:
            require_single_label(teacher.config, "the teacher")
        if args.distillation_weight is not None:
            distillation_weight = args.distillation_weight
        self.distillation_weight = 0.0 if teacher is None else distillation_weight
        self.teacher = None
        if self.distillation_weight:
            # Its parameters keep their requires_grad: the teacher is the user's, who may train it,
            # or search it again, afterwards.
            self.teacher = teacher.eval().to(args.device)

    def task_loss(self, logits: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Return the losses from labels and from the teacher, mixed by `distillation_weight`."""
        args = self.args
        weight = self.distillation_weight
        loss = logits.new_zeros(())
        # A part without weight is not computed: no forward pass of the teacher, no log-softmax.
        if weight < 1:
            from_labels = classification_loss(logits, labels, args.label_smoothing_factor)
            loss = (1 - weight) * from_labels
        if weight > 0:
            with torch.no_grad():
                teacher_logits = logits_of(self.teacher, pixel_values)
            from_teacher = distillation_loss(
                logits,
                teacher_logits,
                args.distillation_temperature,
                hard=args.distillation_type == "hard",
            )
            loss = loss + weight * from_teacher
        return loss
