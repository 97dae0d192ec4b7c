"""Which settings decide the result of a run, so that a resumed run has to agree with them."""

import os
from typing import Any

from ..data import DataArguments
from ..training.arguments import OFBTrainingArguments

# Training arguments that decide the result of a run, beside batch sizes and precision. Those that
# only say how it is watched, saved or fed may change when it is resumed.
DECISIVE = (
    *(
        "seed",
        "data_seed",
        "max_steps",
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler_kwargs",
        "warmup_steps",
    ),
    *(
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "label_smoothing_factor",
    ),
    *("distillation_weight", "distillation_type", "distillation_temperature", "ema_decay"),
)


def training_settings(args: OFBTrainingArguments, data_args: DataArguments) -> dict[str, Any]:
    """What of the training arguments decides the result; a resumed run must agree with it."""
    settings = {name: getattr(args, name) for name in DECISIVE}
    settings |= {
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "optim": str(getattr(args.optim, "value", args.optim)),
    }
    # A launcher's configuration sets the precision where no flag does.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    settings["mixed_precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else launched
    batch_size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    settings["total_train_batch_size"] = batch_size * accumulated * args.world_size
    settings |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulated,
    }
    settings["num_processes"] = args.world_size
    if data_args.streaming:  # whose order is dealt out to the workers
        settings["dataloader_num_workers"] = args.dataloader_num_workers
    return settings
