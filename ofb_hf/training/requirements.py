"""What a training needs, refused before its first step where transformers would meet it later.

A setting is tried out where that costs nothing: a schedule is built for an optimizer of one number,
the callback of a missing logger is made. So no rule of transformers is written down twice.
"""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import ParallelMode

from ..argument_checks import require_choice, require_finite
from ..data.completeness import is_missing
from ..data.epochs import Batching
from ..metrics import compute_topk

# Field -> the lowest and the highest value that a training can work with.
RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    # 0 is allowed: a search may rank units without training
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
    # those below 1 are fractions of all steps
    "logging_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "eval_delay": (0, math.inf),
    "save_steps": (0, math.inf),
    # of numpy, whose generator the Trainer seeds as well
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
# Field that has to be off -> why.
UNUSABLE = {
    "use_liger_kernel": "its kernels are for language models: no layer of a vision transformer has "
    "one",
    "enable_jit_checkpoint": "the trainers of this package save a checkpoint after SIGTERM by "
    "themselves, and its handler would take the place of theirs",
    "include_num_input_tokens_seen": "it counts the tokens of texts, and images have none",
}
# What `compute_topk` gives, and what the Trainer adds to any evaluation.
TOPK_METRICS = ("top1", "top5", "accuracy")
TRAINER_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
# Steps of a schedule that is tried out, if their number is not known yet.
TRIED_STEPS = 100
# What `get_scheduler` itself gives to the function of a schedule.
GIVEN_TO_SCHEDULES = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
ALL_CHOICES = "`ofb-hf finetune --help all`"


def require_usable(args: TrainingArguments) -> None:
    """Raise ValueError for training arguments that no trainer of this package can work with.

    They need neither model nor data to be found out.
    """
    _require_columns(args)
    _require_schedule(args)
    _require_loggers(args.report_to)
    _require_optimizer(args)
    _require_process(args)
    for name, reason in UNUSABLE.items():
        value = getattr(args, name)
        if value not in (False, None, "no"):
            raise ValueError(f"{name} is {value!r}, but {reason}. Leave it out.")
    if args.save_strategy == SaveStrategy.BEST and args.metric_for_best_model is None:
        raise ValueError(
            "save_strategy is 'best', but nothing says what is best; give metric_for_best_model "
            "(loss, top1) and an eval_strategy."
        )


def _require_process(args: TrainingArguments) -> None:
    """Refuse what loader, launcher or compiler would refuse when a training begins."""
    checkpointing = args.activation_checkpointing_kwargs
    if not isinstance(checkpointing, dict | None):
        raise ValueError(
            f"activation_checkpointing_kwargs is {checkpointing!r}; it is a dictionary, e.g. "
            "'{\"use_reentrant\": false}'."
        )
    if args.dataloader_num_workers == 0:
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(args, name):
                raise ValueError(
                    f"{name} is {getattr(args, name)!r}, but dataloader_num_workers is 0, so there "
                    "are no workers; give at least 1, or leave it out."
                )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            "fsdp is on, but this is one process without others to share parameters with; start "
            "several (accelerate launch), or leave it out."
        )
    if args.torch_compile:
        try:
            # compiles nothing yet, but looks at its options
            torch.compile(
                nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode
            )
        except RuntimeError as error:
            raise ValueError(
                f"torch_compile_mode is {args.torch_compile_mode!r} and torch_compile_backend "
                f"{args.torch_compile_backend!r}, which torch refuses: {error}"
            ) from error


def require_in_range(args: TrainingArguments) -> None:
    """Raise ValueError for a number that no training can work with, naming its field."""
    require_finite(args)
    for name, (lowest, highest) in RANGES.items():
        value = getattr(args, name)
        if value is None or lowest <= value <= highest:
            continue
        upper = "" if highest == math.inf else f" and at most {highest}"
        raise ValueError(f"{name} is {value}; it must be at least {lowest}{upper}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(
                f"{name} is {getattr(args, name)}; it must be at least 0 and below 1, e.g. 0.9."
            )


def require_known_choices(args: TrainingArguments) -> None:
    """Raise ValueError for a field whose value is none of its choices, naming the nearest ones."""
    for name, choices in _choices().items():
        value = getattr(args, name)
        if value is not None:
            require_choice(name, value, choices, ALL_CHOICES)


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """Return the fields of transformers' arguments that have choices, with these."""
    types = typing.get_type_hints(TrainingArguments)
    choices = {}
    for field in dataclasses.fields(TrainingArguments):
        alternatives = typing.get_args(types[field.name]) or (types[field.name],)
        enums = [each for each in alternatives if inspect.isclass(each) and issubclass(each, Enum)]
        listed = field.metadata.get("choices") or tuple(enums[0] if enums else ())
        if listed:
            choices[field.name] = tuple(listed)
    return choices


def _require_columns(args: TrainingArguments) -> None:
    if args.label_names not in (None, ["labels"]):
        raise ValueError(
            f"label_names is {args.label_names}; these trainers take labels from the column "
            "'labels' alone. Rename the column, and leave label_names out."
        )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"train_sampling_strategy is {args.train_sampling_strategy!r}, which sorts texts by "
            "their length, and images have none; allowed are 'random' and 'sequential'."
        )


def _require_schedule(args: TrainingArguments) -> None:
    """Build the schedule of the learning rate for a stand-in, and look at some of its values."""
    steps = args.max_steps if args.max_steps > 0 else TRIED_STEPS
    # A rate of 0 is allowed, and some schedules divide by it.
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 1.0)
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            stand_in,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        for factor in getattr(scheduler, "lr_lambdas", ()):
            for step in (0, steps // 2, steps):
                factor(step)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_type is {args.lr_scheduler_type.value!r} and lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}, which make no schedule: {error}. "
            f"{_taken_by(args.lr_scheduler_type)} Or take another one, such as cosine."
        ) from error


def _taken_by(schedule: SchedulerType) -> str:
    """Return which lr_scheduler_kwargs a schedule takes, and how they are written."""
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters.values()
    own = [each for each in parameters if each.name not in GIVEN_TO_SCHEDULES]
    if not own:
        return "This schedule takes no lr_scheduler_kwargs; leave them out."
    if any(each.kind is each.VAR_KEYWORD for each in own):
        return "Its documentation in transformers says which lr_scheduler_kwargs it takes."
    needed = [each.name for each in own if each.default is each.empty]
    others = [each.name for each in own if each.default is not each.empty]
    takes = ", ".join([*(f"{name} (has to be given)" for name in needed), *others])
    example = (needed or others)[0]
    return f"This schedule takes {takes}; write '{{\"{example}\": NUMBER}}'."


def _require_loggers(names: Collection[str]) -> None:
    available = get_available_reporting_integrations() if names else ()
    for name in set(names) - set(available):
        require_choice("report_to", name, ("none", "all", *INTEGRATION_TO_CALLBACK), ALL_CHOICES)
        try:
            # Some can do without what the list of available ones asks for.
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise ValueError(
                f"report_to is {name!r}, which cannot be used here: {error} Install it, or leave "
                "report_to out."
            ) from error


def _require_optimizer(args: TrainingArguments) -> None:
    """Refuse an optimizer whose package is missing, and arguments of it that cannot be read."""
    parts = args.optim_args.split(",") if args.optim_args else ()
    if any(part.count("=") != 1 for part in parts):
        raise ValueError(f"optim_args is {args.optim_args!r}; write NAME=VALUE,NAME=VALUE.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, nn.Identity())
    except ImportError as error:
        raise ValueError(
            f"optim is {args.optim.value!r}, which cannot be used here: {error} Install it, or "
            "take adamw_torch."
        ) from error
    except ValueError:
        # Said of the stand-in, which has none of the layers that optim_target_modules names.
        return


def require_steps(args: TrainingArguments) -> None:
    """Raise ValueError for a length of the training that has no step in it."""
    # The Trainer takes a max_steps below 0 for "not given".
    if args.max_steps > 0:
        return
    if args.max_steps == 0 or not 0 < args.num_train_epochs < math.inf:
        raise ValueError(
            f"max_steps is {args.max_steps}, num_train_epochs {args.num_train_epochs}; a training "
            "needs at least one step."
        )


def require_batches(dataset: Any, args: TrainingArguments) -> None:
    """Raise ValueError unless every process gets a batch of a training split.

    Args:
        dataset: has a length, or is an iterable whose length nobody knows.
        args: for the size of a batch, the number of processes, and whether a last batch is dropped.
    """
    if not hasattr(dataset, "__len__"):
        return
    batch_size = args.train_batch_size
    if args.accelerator_config.split_batches:
        batch_size = max(1, batch_size // args.world_size)
    Batching(
        batch_size, world_size=args.world_size, drop_last=args.dataloader_drop_last
    ).num_batches(len(dataset))


def require_metric(
    args: TrainingArguments,
    compute_metrics: Callable[..., dict[str, float]] | None,
    eval_names: Collection[str] = (),
) -> None:
    """Raise ValueError if no evaluation will give the metric that tells the best model.

    Args:
        args: for `metric_for_best_model`.
        compute_metrics: of the trainer. What a function of the user's own gives is not known.
        eval_names: of the data sets to evaluate on, where the trainer has a dict of several. Their
            metrics begin with these names.
    """
    wanted = args.metric_for_best_model
    if wanted is None or compute_metrics not in (None, compute_topk):
        return
    known = TRAINER_METRICS
    if compute_metrics is not None and not args.prediction_loss_only:
        known = (*TRAINER_METRICS, *TOPK_METRICS)
    if eval_names:
        known = tuple(f"{name}_{metric}" for name in eval_names for metric in known)
    if wanted.removeprefix("eval_") not in known:
        loss_only = " with prediction_loss_only" if args.prediction_loss_only else ""
        raise ValueError(
            f"metric_for_best_model is {wanted!r}; an evaluation{loss_only} gives "
            f"{', '.join(known)}."
        )


# ------------------------------------------------------------------------------------------- labels


class CheckedLabels:
    """Collate rows to a batch, and refuse labels that the head does not have.

    On an accelerator such labels would end the process, or be read from other memory.

    Args:
        collate: makes a batch of a list of rows.
        num_labels: of the head.
    """

    def __init__(self, collate: Callable[[list], Mapping[str, Any]], num_labels: int):
        self.collate = collate
        self.num_labels = num_labels

    def __call__(self, rows: list) -> Mapping[str, Any]:
        """Return the batch.

        Raises:
            ValueError: as `require_labels`.
        """
        batch = self.collate(rows)
        if isinstance(batch.get("labels"), Tensor):
            require_labels(batch["labels"], self.num_labels)
        return batch


def require_labels(labels: Tensor, num_labels: int) -> None:
    """Raise ValueError unless labels are classes of a head, or probabilities of its classes.

    Args:
        labels: (B,) integers from 0 to num_labels - 1, or (B, num_labels) whose rows sum to 1.
        num_labels: of the head.
    """
    expected = (
        f"the model has {num_labels} labels, so they are integers from 0 to {num_labels - 1}, or "
        f"{num_labels} probabilities per image that sum to 1"
    )
    if labels.ndim == 1 and not labels.is_floating_point():
        outside = labels[(labels < 0) | (labels >= num_labels)]
        if len(outside):
            first = int(outside[0])
            advice = "Number the classes from 0."
            if is_missing(first):
                count = int((labels == first).sum())
                advice = (
                    f"{first} stands for no class, and {count} of {len(labels)} labels are that; "
                    "training and evaluation need a class for every image. Leave these images out."
                )
            raise ValueError(f"a label is {first}, but {expected}. {advice}")
        return
    is_soft = labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] == num_labels
    if not is_soft:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}, but {expected}; "
            "regression and several right classes per image are not supported."
        )
    sums = labels.float().sum(1)
    if bool((labels < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise ValueError(
            f"the labels of an image sum to {float(sums[(sums - 1).abs().argmax()]):g}, but "
            f"{expected}; several right classes per image are not supported."
        )


def require_known_labels(dataset: Any, num_labels: int, name: str) -> None:
    """Raise ValueError for labels that the head does not have, where they are at hand.

    They are in a list of rows and in a column of `datasets.Dataset`; other data sets may have to
    decode an image for each, and are checked batch by batch.

    Args:
        dataset: a data set, a dict of several, or None.
        num_labels: of the head.
        name: of the data set, for the message.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            require_known_labels(part, num_labels, f"{name}[{key!r}]")
        return
    labels = [_as_number(label) for label in _labels_at_hand(dataset)]
    if None in labels:
        raise ValueError(
            f"{name}: {labels.count(None)} of {len(labels)} labels are None; training and "
            "evaluation need a class for every image. Leave these images out."
        )
    # The shapes of labels of other kinds are looked at in batches.
    integers = [label for label in labels if isinstance(label, int)]
    if not integers:
        return
    try:
        require_labels(torch.tensor(integers), num_labels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _as_number(label: Any) -> int | float | str | None:
    """Return a label that is one number as that, also from torch and NumPy; "" for any other."""
    if isinstance(label, int | None):
        return label
    is_scalar = getattr(label, "ndim", None) == 0 and hasattr(label, "item")
    return label.item() if is_scalar else ""


def _labels_at_hand(dataset: Any) -> list[Any]:
    """Return the labels of a data set as transformers' collator will take them from its rows."""
    # Of the two names it takes the first if a row has both.
    names = ("labels", "label")
    if isinstance(dataset, list | tuple):
        rows = [row for row in dataset if isinstance(row, Mapping)]
        return [row[name] for row in rows for name in [_first_of(names, row)] if name]
    # A transform may make other labels of the column.
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        name = _first_of(names, dataset.column_names)
        return dataset.with_format(None)[name][:] if name else []
    return []


def _first_of(names: Iterable[str], there: Collection[str]) -> str | None:
    return next((name for name in names if name in there), None)
