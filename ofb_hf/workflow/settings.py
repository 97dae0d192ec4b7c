"""Which settings decide the result of a run, so that a resumed run has to agree with them."""

import os
from typing import Any

from ..data import DataArguments
from ..training.arguments import OFBTrainingArguments

# Training arguments that decide the result, besides batch sizes and precision. Those that only say
# how a run is watched, saved or given its data may change when it is resumed.
DECISIVE = (
    "seed",
    "data_seed",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "distillation_weight",
    "distillation_type",
    "distillation_temperature",
    "ema_decay",
)


def training_settings(args: OFBTrainingArguments, data_args: DataArguments) -> dict[str, Any]:
    """Return the training arguments that decide the result; a resumed run must agree with them."""
    settings = {name: getattr(args, name) for name in DECISIVE}
    settings["lr_scheduler_type"] = args.lr_scheduler_type.value
    settings["optim"] = str(getattr(args.optim, "value", args.optim))
    settings["mixed_precision"] = _mixed_precision(args)
    batch_size = args.per_device_train_batch_size
    accumulated = args.gradient_accumulation_steps
    settings["total_train_batch_size"] = batch_size * accumulated * args.world_size
    settings["per_device_train_batch_size"] = batch_size
    settings["gradient_accumulation_steps"] = accumulated
    settings["num_processes"] = args.world_size
    if data_args.streaming:
        # every worker reads a part of the stream, so their number decides the order of images
        settings["dataloader_num_workers"] = args.dataloader_num_workers
    return settings


def _mixed_precision(args: OFBTrainingArguments) -> str:
    """Return bf16, fp16 or no; a launcher's configuration decides where no flag does."""
    if args.bf16:
        return "bf16"
    if args.fp16:
        return "fp16"
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
