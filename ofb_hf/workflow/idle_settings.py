"""Refuse settings on the command line that would do nothing, before anything is loaded.

A dataclass refuses on its own what it can tell from its own fields (`BiMaskConfig` does); here are
the rules between settings of several dataclasses, and what those commands read that have the
dataclasses of a training and do not train.

Only settings that the user typed are looked at: a YAML file may hold those of a phase that the
command line turns off. A setting whose value is "off" (0, false, none, no) is never refused: what
it asks for holds anyway.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from ..data import AugmentationArguments
from ..models.shapes import SHAPES
from ..space.presets import PRESETS

# Commands that push the finished output folder once, and not the checkpoints on the way.
PUSHING_ONCE = ("search", "search-tokens", "finetune")


# Of transformers: how and where every process computes, whatever it computes.
PROCESS = (
    *("use_cpu", "bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "full_determinism", "accelerator_config", "ddp_backend", "ddp_timeout"),
    *("local_rank", "log_level", "log_level_replica", "log_on_each_node"),
)
# What an evaluation reads: how the split to evaluate on is found and prepared, and how a Trainer
# predicts. The training split is among it: it is what images are held out from, and its columns
# are those of the data.
EVALUATION = (
    *("model_name_or_path", "match_labels_by_number"),
    *("dataset_name", "dataset_config_name", "data_dir", "train_split", "eval_split"),
    *("image_column", "label_column", "eval_share", "max_eval_samples", "eval_crop_pct"),
    # without storing the training split, and without counting its images
    *("streaming", "num_train_examples"),
    *PROCESS,
    *("bf16_full_eval", "fp16_full_eval", "per_device_eval_batch_size", "eval_accumulation_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
    "dataloader_multiprocessing_context",
    # of random weights
    "seed",
    # accuracy is reported, too
    *("disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)
# What a plan reads: all that decides which subnets there are, how long a search takes and what one
# of its steps computes; and not how the steps are weighed, whose results a plan does not look at.
PLANNING = (
    *("model_name_or_path", "num_images", "num_labels"),
    *("preset", "target_macs", "target_params", "target_latency_ms", "latency_table"),
    *("search_embedding", "search_attention", "search_mlp", "search_depth", "search_tokens"),
    *("embedding_candidates", "head_candidates", "head_dim_candidates", "mlp_candidates"),
    *("uniform_across_layers", "multiple_of", "smallest_share"),
    *("prune_during_search", "settle_at", "importance_hold", "importance_learning_rate"),
    *("importance_init_mean", "importance_init_std", "alpha_init", "normalize_importance"),
    *("pmim", "pmim_until_settled", "pmim_window", "keep_ratio_start", "keep_ratio_end"),
    *PROCESS,
    *("num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "distillation_weight", "optim", "torch_empty_cache_steps"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    "ddp_static_graph",
    # a search refuses these, and says why
    *("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "auto_find_batch_size"),
    "load_best_model_at_end",
)
# Command that trains nothing, and has settings of trainings -> the settings that it reads, and why
# it does not read the others.
READ: dict[str, tuple[frozenset[str], str]] = {
    "evaluate": (frozenset(EVALUATION), "an evaluation trains nothing and does not read it"),
    "verify": (frozenset(EVALUATION), "a verification trains nothing and does not read it"),
    "plan": (frozenset(PLANNING), "nothing that a plan says depends on it"),
}


class Settings(SimpleNamespace):
    """All settings of a command by name, and its name; None for settings that it does not have."""

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Rule:
    """Settings that do something only under a condition.

    Attributes:
        names: the settings.
        works: whether they do something, given all settings.
        reason: why they do nothing otherwise, and what to do about it.
    """

    names: tuple[str, ...]
    works: Callable[[Settings], Any]
    reason: str


def is_read(command: str, name: str) -> bool:
    """Return whether a command reads a setting that its dataclasses have, under some conditions."""
    return command not in READ or name in READ[command][0]


def _finetunes(settings: Settings) -> bool:
    """Return whether a search is followed by finetuning."""
    steps = settings.finetune_max_steps
    if steps is None:  # a command without this phase
        return False
    return steps > 0 or (steps < 0 and settings.finetune_epochs > 0)


def _search_distils(settings: Settings) -> bool:
    """Return whether the search itself learns from a teacher."""
    if settings.distillation_weight is not None:
        return settings.distillation_weight > 0
    if settings.teacher_name_or_path is not None or settings.preset is None:
        return True
    return PRESETS[settings.preset]["distillation_weight"] > 0


def _learns_from_a_teacher(settings: Settings) -> bool:
    """Return whether any phase of a command learns from a teacher."""
    if settings.command == "finetune":
        return settings.teacher_name_or_path is not None and settings.distillation_weight != 0
    finetuning = _finetunes(settings) and settings.finetune_distillation_weight > 0
    return _search_distils(settings) or finetuning


def _holds_images_out(settings: Settings) -> bool:
    """Return whether the images to evaluate on may be held out from the training split."""
    is_named = settings.dataset_name is not None or settings.data_dir is not None
    return is_named and settings.eval_split in (None, settings.train_split)


def _trains_weights(settings: Settings) -> bool:
    """Return whether any phase besides a search for tokens, which freezes them, moves weights."""
    return settings.command != "search-tokens" or settings.dense_epochs or _finetunes(settings)


def _trains_by_transformers(settings: Settings) -> bool:
    """Return whether any phase has the optimizer of transformers; a search has its own."""
    return settings.command == "finetune" or settings.dense_epochs or _finetunes(settings)


def _is_off(value: Any) -> bool:
    """Return whether a setting asks for nothing: 0, false, empty, or a strategy called "no"."""
    return not value or getattr(value, "value", value) == "no"


# What only the augmentation 'deit' does; any augmentation may be repeated.
AUGMENTATION = tuple(
    one.name for one in fields(AugmentationArguments) if one.name != "repeated_augmentation"
)
NOT_PUSHED = "the result is not pushed; add --push_to_hub, or leave it out"
PUSHED_ONCE = "the finished folder is pushed once; leave it out"

RULES = (
    Rule(
        ("do_train", "do_eval", "do_predict"),
        lambda settings: False,
        "it is for scripts of transformers, and no command here reads it; leave it out",
    ),
    Rule(
        ("num_train_epochs",),
        lambda settings: settings.max_steps <= 0,
        "--max_steps takes its place; give one of the two",
    ),
    Rule(
        ("learning_rate",),
        lambda settings: settings.command != "search-tokens",
        "a search for tokens moves no weights: --token_learning_rate is its rate, and "
        "--dense_learning_rate and --finetune_learning_rate are those of the other phases",
    ),
    Rule(
        ("weight_decay", "adam_beta1", "adam_beta2", "optim"),
        _trains_weights,
        "a search for tokens moves no weights; add --finetune_epochs or --dense_epochs, or leave "
        "it out",
    ),
    Rule(
        ("optim_args",),
        _trains_by_transformers,
        "a search has an optimizer of its own; add --finetune_epochs or --dense_epochs, or leave "
        "it out",
    ),
    Rule(
        ("dense_learning_rate",),
        lambda settings: settings.dense_epochs,
        "no dense model is trained first; add --dense_epochs, or leave it out",
    ),
    Rule(
        ("finetune_learning_rate", "finetune_distillation_weight"),
        _finetunes,
        "nothing is finetuned; ask for it with --finetune_epochs, or leave it out",
    ),
    Rule(
        ("finetune_epochs",),
        lambda settings: settings.finetune_max_steps < 0,
        "--finetune_max_steps takes its place; give one of the two",
    ),
    Rule(
        ("teacher_name_or_path", "distillation_type", "distillation_temperature"),
        _learns_from_a_teacher,
        "no phase learns from a teacher; name one with --teacher_name_or_path (where the command "
        "has it) and give its weight (--distillation_weight), or leave it out",
    ),
    Rule(
        ("distillation_temperature",),
        lambda settings: settings.distillation_type == "soft",
        "--distillation_type hard has no temperature; leave one of the two out",
    ),
    Rule(
        ("token_pictures",),
        lambda settings: settings.command == "search-tokens" or settings.search_tokens,
        "no tokens are reduced; add --search_tokens, or leave it out",
    ),
    Rule(
        (
            *("hub_model_id", "hub_token", "hub_private_repo", "hub_revision"),
            *("hub_strategy", "hub_always_push"),
        ),
        lambda settings: settings.push_to_hub,
        NOT_PUSHED,
    ),
    Rule(
        ("hub_strategy", "hub_always_push"),
        lambda settings: settings.command not in PUSHING_ONCE,
        PUSHED_ONCE,
    ),
    Rule(
        AUGMENTATION,
        lambda settings: settings.augmentation == "deit",
        "only --augmentation deit does this; add that, or leave it out",
    ),
    Rule(
        ("color_jitter",),
        lambda settings: settings.auto_augment is None,
        "--auto_augment takes its place; add --auto_augment none, or leave it out",
    ),
    Rule(
        ("mixup_switch_prob",),
        lambda settings: settings.mixup and settings.cutmix,
        "it chooses between mixup and cutmix, and one of them is off; leave it out",
    ),
    Rule(
        ("eval_share",),
        _holds_images_out,
        "the images to evaluate on are given, so none are held out from the training split; leave "
        "it out",
    ),
    Rule(
        ("overwrite_output_dir",),
        lambda settings: settings.resume_from_checkpoint is None,
        "--resume_from_checkpoint continues what is there; give one of the two",
    ),
    Rule(
        ("private", "commit_message"),
        lambda settings: not settings.dry_run,
        "--dry_run sends nothing; give one of the two",
    ),
    Rule(
        ("num_threads",),
        lambda settings: settings.device == "cpu",
        "--device cuda computes on the GPU; leave it out",
    ),
    Rule(
        ("num_labels",),
        lambda settings: settings.model_name_or_path in SHAPES,
        f"a checkpoint has its own labels; it is for the named shapes ({', '.join(SHAPES)})",
    ),
)


def require_effect(command: str, given: set[str], parts: Iterable[Any]) -> None:
    """Raise ValueError if a setting on the command line would do nothing.

    Args:
        command: its name.
        given: names of the settings on the command line.
        parts: instances of the command's dataclasses, with the values of all settings.

    Raises:
        ValueError: naming every such setting, the reason and what to do.
    """
    settings = Settings(command=command)
    for part in parts:
        vars(settings).update(vars(part))
    asked_for = {name for name in given if not _is_off(getattr(settings, name))}
    reasons: dict[str, str] = {}
    if command in READ:
        read, reason = READ[command]
        for name in sorted(asked_for - read):
            reasons[name] = f"{reason}; leave it out"
    for rule in RULES:
        for name in rule.names:
            # one reason per setting is enough
            if name in asked_for and name not in reasons and not rule.works(settings):
                reasons[name] = rule.reason
    if reasons:
        # without its value, which may be an access token
        sentences = [f"--{name} is given, but {reason}." for name, reason in reasons.items()]
        raise ValueError(" ".join(sentences))
