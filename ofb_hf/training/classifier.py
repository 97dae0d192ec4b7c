"""A Trainer for image classifiers that learn from labels, and the base of all our trainers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from ..families.registry import require_single_label
from .arguments import OFBTrainingArguments
from .averaging import AverageCallback, WeightAverage
from .callbacks import EpochCallback, RandomStreamsCallback, ResultCallback
from .full_precision import learns_in_half, to_full_precision_
from .guard import TrainingGuard
from .interruption import shield_workers
from .losses import classification_loss
from .requirements import (
    CheckedLabels,
    require_batches,
    require_known_labels,
    require_metric,
    require_steps,
)
from .resumable import ResumableTrainer

logger = logging.get_logger(__name__)

EMA_FILE = "ema.safetensors"
GUARD_FILE = "weights_before.safetensors"
# Images, labels (B,) and a generator on their device -> images and labels.
BatchAugmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
# The name under which the whole loss is summed up next to its parts; it is not logged by us.
TOTAL = "_loss"


class ClassifierTrainer(ResumableTrainer):
    """Train an image classifier from labels.

    It adds to `ResumableTrainer`: data sets that make their own loader for every rank, augmentation
    of whole batches, soft labels, an average of the weights, random streams per rank, and an error
    at the first loss that is not finite. `DistillationTrainer` adds a teacher. `train` turns a
    model in half precision into float32. Evaluations look at every row, also with
    `dataloader_drop_last`, and leave the model in its type.

    Args:
        model: an image classifier.
        args: `OFBTrainingArguments`.
        guard_dataset: rows like those of `train_dataset`, not augmented, that it does not have.
            They decide in the end which weights are kept: those from before the training, those
            after it, or the average (`TrainingGuard`). Without them it is the average, or else the
            weights after it.
        batch_augmentation: called with training batches on the device: images, labels (B,) and a
            generator -> images and labels (`ofb_hf.data.BatchAugmentation`).
        kwargs: as for `transformers.Trainer`. Batches hold `pixel_values` (B, C, H, W) and
            `labels`, either (B,) class indices or (B, classes) probabilities.

    Raises:
        TypeError: if `args` are plain `TrainingArguments`.
        ValueError: if `args` ask for distillation, for arguments of a Trainer that this one cannot
            use, and for a head of another kind. From `train`, before the first step, if there would
            be none, and for labels that the head does not have.
        FloatingPointError: in training, at the first loss that is not finite, with its parts.
        TrainingInterrupted: from `train`, after SIGTERM or Ctrl-C, when a checkpoint has been
            saved.
    """

    # Whether `args.distillation_weight` has a meaning; DistillationTrainer says yes.
    has_teacher_settings = False
    # Arguments of a Trainer that this one cannot use -> why, and what to do.
    unserved: ClassVar[dict[str, str]] = {
        "model_init": "takes a model; make one trainer for each",
        "compute_loss_func": "computes its losses itself; override task_loss instead",
    }

    def __init__(
        self,
        model: nn.Module,
        args: OFBTrainingArguments,
        batch_augmentation: BatchAugmentation | None = None,
        guard_dataset: Any = None,
        **kwargs: Any,
    ):
        self.require_arguments(model, args, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        self._require_own_optimizer()
        self.data_collator = CheckedLabels(self.data_collator, model.config.num_labels)
        # A data set that makes its own loader has a collator for its rows.
        self._own_collator = None if kwargs.get("data_collator") is None else self.data_collator
        # Our losses are means over a micro-batch, so the Trainer has to divide them by the number
        # of accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.batch_augmentation = batch_augmentation
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        if self.average is not None:
            self.add_callback(AverageCallback(self.average))
        self.guard = None if guard_dataset is None else TrainingGuard(guard_dataset)
        if self.guard is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            logger.warning(
                "guard_dataset is not looked at: the weights are split over processes, and are not "
                "compared. The result is what the training ends with."
            )
            self.guard = None
        self.add_callback(ResultCallback(self))
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(EpochCallback(self.train_dataset))
        # One for numbers that are drawn on the CPU, one for the augmentation of whole batches,
        # which is computed where the images are.
        self.generator = torch.Generator()
        self.device_generator = torch.Generator(args.device)
        self.add_callback(RandomStreamsCallback(self.generator, self.device_generator))
        # Sums since the last log: name of a part of the loss -> scalar tensor on the device.
        self._parts: dict[str, Tensor] = {}
        self._num_parts = 0

    @classmethod
    def require_arguments(cls, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise for arguments of the constructor that cannot work, before anything is made of them.

        Args:
            model, args: as for the constructor.
            kwargs: those for `transformers.Trainer`.
        """
        if not isinstance(args, OFBTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; give OFBTrainingArguments, which has the same "
                "fields."
            )
        for name, reason in cls.unserved.items():
            given = kwargs.get(name)
            if given is not None and given != (None, None):
                raise ValueError(f"{name} is given, but {cls.__name__} {reason}.")
        if args.distillation_weight and not cls.has_teacher_settings:
            raise ValueError(
                f"distillation_weight is {args.distillation_weight}, but {cls.__name__} "
                "learns from labels only; leave it out, or use DistillationTrainer with a teacher."
            )
        require_single_label(model.config)

    def _require_own_optimizer(self) -> None:
        """Raise ValueError for an optimizer or a schedule that would move nothing of the model."""
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        if optimizer is not None:
            own = {id(parameter) for parameter in self.model.parameters()}
            moved = [each for group in optimizer.param_groups for each in group["params"]]
            if not all(id(parameter) in own for parameter in moved):
                raise ValueError(
                    "optimizers holds an optimizer of parameters that are not the model's, so it "
                    "would train nothing; make it of model.parameters(), or leave it out."
                )
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError(
                "optimizers holds a learning rate schedule of another optimizer, which would change"
                " nothing here; give that optimizer with it, or leave it out."
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `ResumableTrainer.train` does, after a look at what is to be trained on."""
        require_steps(self.args)
        eval_names = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
        require_metric(self.args, self.compute_metrics, eval_names)
        if self._own_collator is None:  # one of the user's own may make other labels
            num_labels = self.model.config.num_labels
            require_known_labels(self.train_dataset, num_labels, "train_dataset")
            require_known_labels(self.eval_dataset, num_labels, "eval_dataset")
        if learns_in_half(self.model):
            to_full_precision_(self.model)
            if self.average is not None:
                self.average.restart(self.model)
        return super().train(*args, **kwargs)

    @property
    def may_be_compared(self) -> bool:
        """Whether the network has its final sizes, so that its weights can be compared later."""
        return True

    def begin_result(self) -> None:
        """Let the guard remember the weights, unless a checkpoint has those from the beginning."""
        if self.guard is not None and not self.guard.remembers and self.may_be_compared:
            self.guard.remember(self.model)

    def end_result(self) -> None:
        """Put into the model what the training gives: the best weights, or the average."""
        if self.interruption.stopped_by is not None:
            return  # nothing is over yet: a checkpoint has been written
        if self.guard is not None and self.guard.remembers:
            self.guard.decide_(self.model, self.args, self.average)
        elif self.average is not None:
            self.average.copy_to_(self.model)

    def get_train_dataloader(self) -> DataLoader:
        """Return the data set's own loader for this rank if it makes one, else the Trainer's.

        `ofb_hf.data.ImageStream` makes its own.

        Raises:
            ValueError: if there are too few rows for a batch.
        """
        require_batches(self.train_dataset, self.args)
        if not hasattr(self.train_dataset, "loader"):
            return super().get_train_dataloader()
        args = self.args
        if args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy is {args.train_sampling_strategy!r}, but train_dataset "
                "makes its own loader, which decides about the order; leave it out."
            )
        options: dict[str, Any] = {
            "pin_memory": args.dataloader_pin_memory,
            "in_order": args.dataloader_in_order,
        }
        if self._own_collator is not None:
            options["collate_fn"] = self._own_collator
        if args.dataloader_num_workers:
            # DataLoader refuses these three without workers.
            options["persistent_workers"] = args.dataloader_persistent_workers
            options["prefetch_factor"] = args.dataloader_prefetch_factor
            options["multiprocessing_context"] = args.dataloader_multiprocessing_context
        loader = self.train_dataset.loader(
            self._train_batch_size,
            args.process_index,
            args.world_size,
            args.dataloader_num_workers,
            drop_last=args.dataloader_drop_last,
            **options,
        )
        return shield_workers(loader)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        # The Trainer would leave the last batch of an evaluation out as well.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the training loss, or plain cross-entropy while evaluating."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if not model.training:
            # Without label smoothing, and without a teacher: numbers that any runs can compare.
            logits = model(**inputs).logits
            loss = classification_loss(logits, labels)
            return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
        pixel_values = inputs["pixel_values"]  # (B, C, H, W)
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
        """Compute the losses of one micro-batch. Subclasses add parts.

        Returns:
            The model's outputs, the parts of the loss by the name under which they are logged
            (scalars), and the loss to descend (scalar).
        """
        outputs = model(pixel_values=pixel_values)
        task = self.task_loss(outputs.logits, pixel_values, labels)
        return outputs, {"task": task}, task

    def task_loss(self, logits: Tensor, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Return what the model is trained for, a scalar: here cross-entropy with the labels."""
        return classification_loss(logits, labels, self.args.label_smoothing_factor)

    def _record(self, parts: dict[str, Tensor], loss: Tensor) -> None:
        """Add the parts to their sums; raise FloatingPointError if the loss is not finite."""
        self._num_parts += 1
        for name, value in (parts | {TOTAL: loss}).items():
            self._parts[name] = self._parts.get(name, 0) + value.detach().float()
        # Looking at a value waits for the device: on accelerators only in the first step, and then
        # in `log`, which needs the values anyway.
        if loss.device.type == "cpu" or self.state.global_step == 0:
            self._require_finite()

    def _require_finite(self) -> None:
        values = {}
        for name, total in self._parts.items():
            values[name] = float(total) / self._num_parts
        if all(map(math.isfinite, values.values())):
            return
        del values[TOTAL]
        self._forget_parts()
        raise FloatingPointError(
            f"the loss is not finite after optimizer step {self.state.global_step}; its parts are "
            f"{values}. Check the data (non-finite pixels?), lower --learning_rate, or train in "
            "fp32 or bf16 instead of fp16."
        )

    def _forget_parts(self) -> None:
        self._parts = {}
        self._num_parts = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of every part of the loss since the last log over all ranks."""
        if "loss" in logs and self._num_parts:
            self._require_finite()
            del self._parts[TOTAL]
            means = torch.stack([value / self._num_parts for value in self._parts.values()])
            over_ranks = self.accelerator.reduce(means, "mean").tolist()  # (parts,)
            logs |= dict(zip(self._parts, over_ranks, strict=True))
            self._forget_parts()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `Trainer.evaluate` does; in a training with `ema_decay`, the average.

        The best checkpoint is chosen by the same numbers.
        """
        if self.average is None or not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        # After a training the model holds the average itself.
        with self.average.applied_to(self.model):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the Trainer does, and leave the model in the type that it has.

        Top-1 is also called "accuracy" where that name is asked for.
        """
        with self._in_its_type():
            output = super().evaluation_loop(*args, **kwargs)
        wanted = self.args.metric_for_best_model
        if wanted is not None and wanted.removeprefix("eval_") == "accuracy":
            for name in [name for name in output.metrics if name.endswith("_top1")]:
                alias = name.removesuffix("top1") + "accuracy"
                output.metrics.setdefault(alias, output.metrics[name])
        return output

    @contextmanager
    def _in_its_type(self) -> Iterator[None]:
        """Give the model its tensors back after a block that may round them, as bf16_full_eval."""
        if not (self.args.bf16_full_eval or self.args.fp16_full_eval) or self.is_in_train:
            yield
            return
        # The Trainer rounds them in place and for good.
        tensors = [*self.model.parameters(), *self.model.buffers()]
        kept = [tensor.data for tensor in tensors]
        try:
            yield
        finally:
            for tensor, data in zip(tensors, kept, strict=True):
                tensor.data = data.to(self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.average is not None:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            self.average.save(folder / EMA_FILE)
        if self.args.should_save and self.guard is not None and self.is_in_train:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            self.guard.save(folder / GUARD_FILE)

    def _load_weights(self, checkpoint: Path) -> None:
        self._load_average(checkpoint)
        if self.guard is not None:
            self.guard.load(checkpoint / GUARD_FILE)
        super()._load_weights(checkpoint)

    def _load_average(self, checkpoint: Path) -> None:
        """Load the average; raise ValueError unless the checkpoint and this run agree on one."""
        file = checkpoint / EMA_FILE
        if file.is_file() != (self.average is not None):
            has = "no" if self.average is not None else "a"
            raise ValueError(
                f"ema_decay is {self.args.ema_decay}, but {checkpoint} has {has} weight average "
                f"({EMA_FILE}); resume with the same ema_decay."
            )
        if self.average is not None:
            self.average.load(file)
