"""Training arguments: transformers' own, plus distillation and weight averaging."""

import json
import multiprocessing
from dataclasses import dataclass, field

from accelerate.utils import parse_flag_from_env
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from .requirements import (
    require_in_range,
    require_known_choices,
    require_steps,
    require_usable,
)

# The state of these two is one pair of moments per parameter, which can be sliced with it.
SEARCH_OPTIMIZERS = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
# These follow evaluations.
REACTING_SCHEDULES = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


@dataclass
class OFBTrainingArguments(TrainingArguments):
    """Store the arguments of a search or a finetuning.

    Defaults that differ from `TrainingArguments`: gradients are not clipped (DeiT does not clip
    them either), no column is removed (the data pipeline gives the model what it takes), `labels`
    is the only label column, and NaN is not hidden from the logs. How a search decides is set in
    `BiMaskConfig`.

    Raises:
        ValueError: for values out of range, and for settings that no trainer of this package can
            work with: loggers that are not installed, a schedule without its numbers, ...
    """

    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Largest norm of the gradients, 0 = no clipping (as DeiT)."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that the model does not take."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Columns with labels."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave NaN out of the logs; a NaN loss ends the run in any case."},
    )

    distillation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the classification loss that comes from the teacher: 0 = labels "
            "only, 1 = teacher only. By default 1 in a search (preset 'bi_mask': 0.5, 'paper': 0, "
            "or 1 with a teacher), and in other trainings with a teacher."
        },
    )
    distillation_type: str = field(
        default="soft",
        metadata={"help": "'soft' (KL divergence) or 'hard' (the teacher's arg max)."},
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Divides the logits of both models ('soft' only)."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a running average of the weights, e.g. 0.999. The average is what is "
            "evaluated, and the result."
        },
    )

    def __post_init__(self):
        # Before some of the numbers are converted there, where they would raise other errors.
        require_in_range(self)
        require_known_choices(self)
        try:
            super().__post_init__()
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"a training argument that takes a dictionary cannot be read: {error}. Write it as "
                "JSON, e.g. --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}', with known names in it."
            ) from error
        except ValueError as error:
            # of torch, which looks for the other processes
            if self.ddp_backend is None or "process group" not in str(error):
                raise
            raise ValueError(
                f"ddp_backend is {self.ddp_backend!r}, but this is one process, which talks to no "
                "other; leave it out, or start several processes (accelerate launch)."
            ) from error
        self._choose_start_of_workers()
        if self.distillation_weight is not None and not 0 <= self.distillation_weight <= 1:
            raise ValueError(
                f"distillation_weight is {self.distillation_weight}; it is a fraction from 0 to 1."
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
        require_usable(self)
        # None would let the Trainer guess them from the model's signature.
        self.label_names = ["labels"]

    def _choose_start_of_workers(self) -> None:
        """Start loading workers from a server process where other ranks are talked to.

        A worker that is forked from a process whose threads send to other ranks inherits locks
        that one of them may have held at that moment, and waits for ever.
        """
        is_given = self.dataloader_multiprocessing_context is not None
        is_needed = self.dataloader_num_workers > 0 and self.world_size > 1
        if is_needed and not is_given and "forkserver" in multiprocessing.get_all_start_methods():
            self.dataloader_multiprocessing_context = "forkserver"
            # so that every worker after the first starts at once
            multiprocessing.set_forkserver_preload(["__main__", "ofb_hf.data"])


def _sharding(args: OFBTrainingArguments) -> str | None:
    """Return what splits parameters over processes in this run, None if nothing does."""
    # `accelerate launch` asks for it by its environment, not by our arguments.
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        return "Megatron-LM"
    parallelism = args.parallelism_config
    # Data-parallel replicas hold whole copies of the model; every other dimension splits it.
    splits = parallelism is not None and parallelism.total_size != parallelism.dp_replicate_size
    if splits or parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return "tensor or context parallelism (parallelism_config)"
    return None


def check_search_arguments(args: OFBTrainingArguments) -> None:
    """Raise ValueError for settings that a search, which shrinks its network, cannot work with."""
    _check_length(args)
    _check_update(args)
    _check_processes(args)
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end does not work in a search: earlier checkpoints hold larger "
            "networks that miss the budget. Leave it off for the search; finetuning may use it."
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub: a search does not push; push the output folder when the search is done."
        )


def _check_length(args: OFBTrainingArguments) -> None:
    require_steps(args)
    # They may have been set after the checks of the arguments.
    require_in_range(args)
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size starts the training again with a supernet that has been trained "
            "already; set per_device_train_batch_size yourself."
        )


def _check_update(args: OFBTrainingArguments) -> None:
    if args.optim not in SEARCH_OPTIMIZERS:
        allowed = ", ".join(repr(name.value) for name in SEARCH_OPTIMIZERS)
        raise ValueError(
            f"optim is {args.optim.value!r}; a search slices the state of its optimizer with the "
            f"network, so allowed are {allowed}. Finetuning afterwards may use any."
        )
    if args.lr_scheduler_type in REACTING_SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type is {args.lr_scheduler_type.value!r}, which follows evaluations; "
            "the learning rate of a search follows its phases. Take another one, such as cosine."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}: its noise would hide what units "
            "are worth, and a search has no place for it. Leave it out; finetuning may use it."
        )


def _check_processes(args: OFBTrainingArguments) -> None:
    if sharding := _sharding(args):
        raise ValueError(
            f"{sharding} splits parameters that the search replaces while it runs; use DDP instead "
            "(accelerate launch --multi_gpu, or recipes/accelerate/multi_gpu.yaml). Finetuning "
            "afterwards may use any of them."
        )
    # nn.DataParallel, which the Trainer would use, copies the model anew in every step; masks and
    # counters that a step changes would be those of a copy.
    if args.n_gpu > 1:
        raise ValueError(
            f"this one process sees {args.n_gpu} GPUs and would copy the network to all of them in "
            "every step; start one process per GPU (accelerate launch --multi_gpu), or show it one "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
