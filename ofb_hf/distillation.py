"""A Trainer for classifiers that learn from labels, from a teacher, or from both."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from .averaging import WeightAverage
from .callbacks import AverageCallback, EpochCallback, RandomStreamsCallback
from .checkpoints import ASIDE, move_into_place
from .interruption import Interruption, TrainingInterrupted
from .losses import classification_loss, distillation_loss
from .training_args import OFBTrainingArguments

logger = logging.get_logger(__name__)

EMA_FILE = "ema.safetensors"
BatchAugmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class DistillationTrainer(Trainer):
    """Finetunes a classifier; the base of `OFBTrainer`.

    Args:
        model: an image classifier.
        args: `OFBTrainingArguments`.
        teacher: any image classifier with the same labels, or None. It is frozen and only evaluated.
        batch_augmentation: what is done to batches for training, on the device: images, labels (B,) and a generator
            -> images and labels (`ofb_hf.data.BatchAugmentation`). Teacher and student see the result.
        kwargs: as for `transformers.Trainer`. Batches hold `pixel_values` (B, C, H, W) and `labels`, either (B,)
            class indices or (B, classes) probabilities.

    Raises:
        ValueError: if teacher and model have different numbers of labels, or distillation is asked for without one.
        FloatingPointError: in training, at the first non-finite loss, naming its parts.
        TrainingInterrupted: from `train`, after SIGTERM or Ctrl-C, when a checkpoint has been saved.
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
            raise TypeError(f"args is a {type(args).__name__}; give OFBTrainingArguments, which has the same fields.")
        super().__init__(model=model, args=args, **kwargs)
        # Our losses are means over a micro-batch: the Trainer has to divide them by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        weight = args.distillation_weight if args.distillation_weight is not None else distillation_weight
        if teacher is None and args.distillation_weight:
            raise ValueError(f"distillation_weight is {args.distillation_weight}, but there is no teacher; give one.")
        if teacher is not None and teacher.config.num_labels != model.config.num_labels:
            raise ValueError(
                f"the teacher has {teacher.config.num_labels} labels and the model {model.config.num_labels}; "
                "distillation needs the same labels in the same order."
            )
        self.distillation_weight = 0.0 if teacher is None else weight
        self.teacher = teacher.eval().requires_grad_(False).to(args.device) if self.distillation_weight else None
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        if self.average is not None:
            self.add_callback(AverageCallback(self.average))
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(EpochCallback(self.train_dataset))
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self.batch_augmentation = batch_augmentation
        # On the CPU for what is drawn there, and on the device of the images for what is done to whole batches.
        self.generator, self.device_generator = torch.Generator(), torch.Generator(args.device)
        self.add_callback(RandomStreamsCallback(self.generator, self.device_generator))
        self._parts: dict[str, Tensor] = {}
        self._num_parts = 0
        self._run_dir: Path | None = None  # where checkpoints are written to at the moment, if not to their place

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. SIGTERM and Ctrl-C end the step, save a checkpoint and raise `TrainingInterrupted`."""
        with self.interruption:
            result = super().train(*args, **kwargs)
        if (signal := self.interruption.stopped_by) is not None:
            logger.warning(
                f"stopped by {signal.name} after step {self.state.global_step} of {self.state.max_steps}; a checkpoint "
                f"is in {self.args.output_dir}. Continue with --resume_from_checkpoint auto."
            )
            raise TrainingInterrupted(128 + signal)
        return result

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, or the loader of a data set that has one for every rank (`ofb_hf.data.ImageStream`)."""
        if not hasattr(self.train_dataset, "loader"):
            return super().get_train_dataloader()
        args = self.args
        options = {"pin_memory": args.dataloader_pin_memory}
        if args.dataloader_num_workers:
            options["persistent_workers"] = args.dataloader_persistent_workers
            options["prefetch_factor"] = args.dataloader_prefetch_factor
        return self.train_dataset.loader(
            self._train_batch_size,
            args.process_index,
            args.world_size,
            args.dataloader_num_workers,
            drop_last=args.dataloader_drop_last,
            **options,
        )

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
            pixel_values, labels = self.batch_augmentation(pixel_values, labels, self.device_generator)
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
            loss = (1 - weight) * classification_loss(logits, labels, self.args.label_smoothing_factor)
        if weight > 0:
            with torch.no_grad():
                teacher_logits = self.teacher(pixel_values=pixel_values).logits
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
        # Looking at a value waits for the device; on accelerators once at the start and then at every log is enough.
        if loss.device.type == "cpu" or self.state.global_step == 0:
            self._require_finite()

    def _require_finite(self) -> None:
        values = {name: float(value) / self._num_parts for name, value in self._parts.items()}
        if not all(torch.isfinite(torch.tensor(value)) for value in values.values()):
            values.pop("_loss")
            raise FloatingPointError(
                f"the loss is not finite after optimizer step {self.state.global_step}; its parts are {values}. "
                "Check the data (non-finite pixels?), lower --learning_rate, or train in fp32 or bf16 instead of fp16."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss part since the last log, over all ranks."""
        if "loss" in logs and self._num_parts:
            self._require_finite()
            self._parts.pop("_loss")
            means = torch.stack([value / self._num_parts for value in self._parts.values()])
            logs |= dict(zip(self._parts, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            self._parts, self._num_parts = {}, 0
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._run_dir is None else str(self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint aside and renames it once all ranks are done: a kill leaves the previous one."""
        folder = Path(self._get_output_dir(trial))
        aside, name = folder / ASIDE, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            move_into_place(aside / name, folder / name, self.state)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # The Trainer pickles its arguments, hub token included; nothing of ours reads that file.
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.average is not None:
            self.average.save(folder / EMA_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint) / EMA_FILE)
