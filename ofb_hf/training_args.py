"""How to train: transformers' arguments plus distillation, weight averaging and the pieces of a search."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class OFBTrainingArguments(TrainingArguments):
    """`TrainingArguments` for searching and finetuning classifiers.

    What differs from transformers' defaults: no gradient clipping (DeiT uses none), columns are left alone (the data
    pipeline knows what the model needs), `labels` are the only labels, and NaN is never hidden from the logs. How the
    search decides is the business of `BiMaskConfig`.

    Raises:
        ValueError: for a combination that cannot work, before anything is loaded or trained.
    """

    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping norm, 0 = none (as DeiT)."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not take."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Label columns."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses; they stop our runs."})

    distillation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Share of distillation in the classification loss, 0 = labels only, 1 = teacher only. "
            "By default 0.5 in a search (preset 'paper': 0, or 1 with a teacher), and 1 elsewhere with a teacher."
        },
    )
    distillation_type: str = field(default="soft", metadata={"help": "'soft' (KL) or 'hard' (teacher's arg max)."})
    distillation_temperature: float = field(default=2.0, metadata={"help": "Softens both predictions (soft only)."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of a running average of the weights, which is what is kept in the end; e.g. 0.999."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.distillation_weight is not None and not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight is {self.distillation_weight}; it is a share between 0 and 1.")
        if self.distillation_type not in ("soft", "hard"):
            raise ValueError(f"distillation_type is {self.distillation_type!r}; allowed are 'soft' and 'hard'.")
        if not self.distillation_temperature > 0:
            raise ValueError(f"distillation_temperature is {self.distillation_temperature}; it must be positive.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must lie between 0 and 1, or be left out.")
