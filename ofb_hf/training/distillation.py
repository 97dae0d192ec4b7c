"""A Trainer for classifiers that learn from labels, from a teacher, or from both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..models import OFBViTForImageClassification
from .arguments import OFBTrainingArguments
from .averaging import AverageCallback, WeightAverage
from .callbacks import EpochCallback, RandomStreamsCallback
from .interruption import shield_workers
from .losses import classification_loss, distillation_loss
from .resumable import ResumableTrainer

EMA_FILE = "ema.safetensors"
BatchAugmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def _logits(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Logits (B, classes), of our ViTs without the tokens that they do not follow from.

    By a call in any case: a teacher may have hooks, or be wrapped or compiled.
    """
    wanted = {}
    if type(model) is OFBViTForImageClassification:  # a subclass may take other arguments
        wanted["wanted"] = torch.zeros(
            len(pixel_values), 1, dtype=torch.long, device=pixel_values.device
        )
    return model(pixel_values=pixel_values, **wanted).logits


class DistillationTrainer(ResumableTrainer):
    """Finetunes a classifier; the base of `OFBTrainer`.

    Args:
        model: an image classifier.
        args: `OFBTrainingArguments`.
        teacher: any image classifier with the same labels, or None. It is frozen and only
            evaluated.
        batch_augmentation: what is done to batches for training, on the device: images, labels (B,)
            and a generator -> images and labels (`ofb_hf.data.BatchAugmentation`). Teacher and
            student see the result.
        kwargs: as for `transformers.Trainer`. Batches hold `pixel_values` (B, C, H, W) and
            `labels`, either (B,) class indices or (B, classes) probabilities.

    Raises:
        ValueError: if teacher and model have different numbers of labels, or distillation is asked
            for without one.
        FloatingPointError: in training, at the first non-finite loss, naming its parts.
        TrainingInterrupted: from `train`, after SIGTERM or Ctrl-C, when a checkpoint has been
            saved.
    """

    def __init__(
        self,
        model: nn.Module,
        args: OFBTrainingArguments,
        teacher: PreTrainedModel | None = None,
        distillation_weight: float = 1.0,
        batch_augmentation: BatchAugmentation | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, OFBTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; give OFBTrainingArguments, which has the same "
                f"fields."
            )
        super().__init__(model=model, args=args, **kwargs)
        # Our losses are means over a micro-batch: the Trainer has to divide them by the
        # accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        weight = (
            args.distillation_weight
            if args.distillation_weight is not None
            else distillation_weight
        )
        if teacher is None and args.distillation_weight:
            raise ValueError(
                f"distillation_weight is {args.distillation_weight}, but there is no teacher; "
                f"give one."
            )
        if teacher is not None and teacher.config.num_labels != model.config.num_labels:
            raise ValueError(
                f"the teacher has {teacher.config.num_labels} labels and the model "
                f"{model.config.num_labels}; "
                "distillation needs the same labels in the same order."
            )
        self.distillation_weight = 0.0 if teacher is None else weight
        # Not frozen: it is the user's, who may train it, or search it again, afterwards.
        self.teacher = teacher.eval().to(args.device) if self.distillation_weight else None
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        if self.average is not None:
            self.add_callback(AverageCallback(self.average))
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(EpochCallback(self.train_dataset))
        self.batch_augmentation = batch_augmentation
        # On the CPU for what is drawn there, and on the device of the images for what is done to
        # whole batches.
        self.generator, self.device_generator = torch.Generator(), torch.Generator(args.device)
        self.add_callback(RandomStreamsCallback(self.generator, self.device_generator))
        self._parts: dict[str, Tensor] = {}
        self._num_parts = 0

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, or the loader of a data set that has one for every rank
        (`ofb_hf.data.ImageStream`)."""
        if not hasattr(self.train_dataset, "loader"):
            return super().get_train_dataloader()
        args = self.args
        options = {"pin_memory": args.dataloader_pin_memory}
        if args.dataloader_num_workers:
            options["persistent_workers"] = args.dataloader_persistent_workers
            options["prefetch_factor"] = args.dataloader_prefetch_factor
        loader = self.train_dataset.loader(
            self._train_batch_size,
            args.process_index,
            args.world_size,
            args.dataloader_num_workers,
            drop_last=args.dataloader_drop_last,
            **options,
        )
        return shield_workers(loader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The training loss, or plain cross-entropy while evaluating."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if not model.training:
            outputs = model(**inputs)
            loss = classification_loss(outputs.logits, labels)
            return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss
        pixel_values = inputs["pixel_values"]
        if self.batch_augmentation is not None:
            pixel_values, labels = self.batch_augmentation(
                pixel_values, labels, self.device_generator
            )
        outputs, parts, loss = self.training_losses(model, pixel_values, labels)
        self._record(parts, loss)
        return (loss, outputs) if return_outputs else loss

    def training_losses(
        self, model: nn.Module, pixel_values: Tensor, labels: Tensor
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Outputs, the parts of the loss by name, and their weighted sum. Subclasses add parts."""
        outputs = model(pixel_values=pixel_values)
        task = self.task_loss(outputs.logits, pixel_values, labels)
        return outputs, {"task": task}, task

    def task_loss(self, logits: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Labels and teacher, mixed by `distillation_weight`."""
        weight = self.distillation_weight
        loss = logits.new_zeros(())
        if weight < 1:
            loss = (1 - weight) * classification_loss(
                logits, labels, self.args.label_smoothing_factor
            )
        if weight > 0:
            with torch.no_grad():
                teacher_logits = _logits(self.teacher, pixel_values)
            hard = self.args.distillation_type == "hard"
            loss = loss + weight * distillation_loss(
                logits, teacher_logits, self.args.distillation_temperature, hard=hard
            )
        return loss

    def _record(self, parts: dict[str, Tensor], loss: Tensor) -> None:
        """Sums the parts up until the next log, and stops at a loss that is not finite."""
        self._num_parts += 1
        for name, value in (parts | {"_loss": loss}).items():
            self._parts[name] = self._parts.get(name, 0) + value.detach().float()
        # Looking at a value waits for the device; on accelerators once at the start and then at
        # every log is enough.
        if loss.device.type == "cpu" or self.state.global_step == 0:
            self._require_finite()

    def _require_finite(self) -> None:
        values = {name: float(value) / self._num_parts for name, value in self._parts.items()}
        if not all(torch.isfinite(torch.tensor(value)) for value in values.values()):
            values.pop("_loss")
            self._parts, self._num_parts = {}, 0
            raise FloatingPointError(
                f"the loss is not finite after optimizer step {self.state.global_step}; its parts "
                f"are {values}. "
                "Check the data (non-finite pixels?), lower --learning_rate, or train in fp32 or "
                "bf16 instead of fp16."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss part since the last log, over all ranks."""
        if "loss" in logs and self._num_parts:
            self._require_finite()
            self._parts.pop("_loss")
            means = torch.stack([value / self._num_parts for value in self._parts.values()])
            logs |= dict(
                zip(self._parts, self.accelerator.reduce(means, "mean").tolist(), strict=True)
            )
            self._parts, self._num_parts = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; while training with `ema_decay` it is the average that is
        evaluated, and chosen by."""
        if self.average is None or not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        with self.average.applied_to(self.model):
            return super().evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.average is not None:
            self.average.save(
                Path(output_dir if output_dir is not None else self.args.output_dir) / EMA_FILE
            )

    def _load_weights(self, checkpoint: Path) -> None:
        self._load_average(checkpoint)
        super()._load_weights(checkpoint)

    def _load_average(self, checkpoint: Path) -> None:
        if (checkpoint / EMA_FILE).is_file() != (self.average is not None):
            has = "no" if self.average is not None else "a"
            raise ValueError(
                f"ema_decay is {self.args.ema_decay}, but {checkpoint} has {has} weight average "
                f"({EMA_FILE}); resume "
                "with the same ema_decay."
            )
        if self.average is not None:
            self.average.load(checkpoint / EMA_FILE)
