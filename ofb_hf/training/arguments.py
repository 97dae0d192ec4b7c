"""How to train: transformers' arguments plus distillation, weight averaging and the pieces of a
search."""

import math
from dataclasses import dataclass, field

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

SEARCH_OPTIMIZERS = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


@dataclass
class OFBTrainingArguments(TrainingArguments):
    """`TrainingArguments` for searching and finetuning classifiers.

    What differs from transformers' defaults: no gradient clipping (DeiT uses none), columns are
    left alone (the data pipeline knows what the model needs), `labels` are the only labels, and NaN
    is never hidden from the logs. How the search decides is the business of `BiMaskConfig`.

    Raises:
        ValueError: for a combination that cannot work, before anything is loaded or trained.
    """

    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Gradient clipping norm, 0 = none (as DeiT)."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns the model does not take."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Label columns."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses; they stop our runs."}
    )

    distillation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Share of distillation in the classification loss, 0 = labels only, 1 = "
            "teacher only. "
            "By default 0.5 in a search (preset 'paper': 0, or 1 with a teacher), and 1 elsewhere "
            "with a teacher."
        },
    )
    distillation_type: str = field(
        default="soft", metadata={"help": "'soft' (KL) or 'hard' (teacher's arg max)."}
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Softens both predictions (soft only)."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a running average of the weights, which is what is kept in the end; "
            "e.g. 0.999."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.distillation_weight is not None and not 0 <= self.distillation_weight <= 1:
            raise ValueError(
                f"distillation_weight is {self.distillation_weight}; it is a share between 0 and 1."
            )
        if self.distillation_type not in ("soft", "hard"):
            raise ValueError(
                f"distillation_type is {self.distillation_type!r}; allowed are 'soft' and 'hard'."
            )
        if not self.distillation_temperature > 0:
            raise ValueError(
                f"distillation_temperature is {self.distillation_temperature}; it must be positive."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay is {self.ema_decay}; it must lie between 0 and 1, or be left out."
            )


def _sharding(args: OFBTrainingArguments) -> str | None:
    """What splits parameters over processes in this run, asked for by a flag or by the launcher's
    environment."""
    parallelism = args.parallelism_config
    asked = {
        "FSDP": bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
        "DeepSpeed": bool(args.deepspeed) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
        "Megatron-LM": parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"),
        "tensor or context parallelism (parallelism_config)": parse_flag_from_env(
            "ACCELERATE_USE_PARALLELISM_CONFIG"
        )
        or (parallelism is not None and parallelism.total_size != parallelism.dp_replicate_size),
    }
    return next((name for name, wanted in asked.items() if wanted), None)


def check_search_arguments(args: OFBTrainingArguments) -> None:
    """Raises ValueError for settings that a shrinking search cannot work with, in words, before
    anything happens."""
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end cannot go with a search: earlier checkpoints are larger "
            "networks that miss the "
            "budget. Leave it off for the search; finetuning may use it."
        )
    if args.optim not in SEARCH_OPTIMIZERS:
        raise ValueError(
            f"optim is {args.optim.value!r}; a search has one AdamW, whose state is cut with the "
            f"network, so allowed "
            f"are {', '.join(repr(name.value) for name in SEARCH_OPTIMIZERS)}. Finetuning "
            f"afterwards may use any."
        )
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            f"max_steps is {args.max_steps}, num_train_epochs {args.num_train_epochs}; a search "
            f"needs a step."
        )
    if args.per_device_train_batch_size < 1:
        raise ValueError(
            f"per_device_train_batch_size is {args.per_device_train_batch_size}; it must be at "
            f"least 1."
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub: a search does not push; push the finished output folder when it is done."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size restarts training with a used supernet; set the batch size "
            "yourself."
        )
    if sharding := _sharding(args):
        raise ValueError(
            f"{sharding} splits parameters that the search replaces while it runs; use DDP "
            f"instead (accelerate launch "
            "--multi_gpu, or recipes/accelerate/multi_gpu.yaml). Finetuning afterwards may use "
            "any of them."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"this one process sees {args.n_gpu} GPUs and would copy the network to all of them "
            f"in every step; start "
            "one process per GPU (accelerate launch --multi_gpu), or show it one "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    if not math.isfinite(args.learning_rate) or args.learning_rate < 0:
        raise ValueError(
            f"learning_rate is {args.learning_rate}; it must be finite and not negative."
        )
