"""Refuse settings on the command line that would do nothing, before anything is loaded.

A dataclass refuses on its own what it can tell from its own fields (`BiMaskConfig` does); here are
the rules between settings of several dataclasses, and between settings and command.

Only settings that the user typed are looked at: a YAML file may hold those of a phase that the
command line turns off. A setting whose value is "off" (0, false, none) is never refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from ..data import AugmentationArguments
from ..models.shapes import SHAPES
from ..space.presets import PRESETS

# Commands that only measure a model: nothing learns, nothing is pushed.
MEASURING = ("evaluate", "verify")
# Commands that push the finished output folder once, and not the checkpoints on the way.
PUSHING_ONCE = ("search", "search-tokens", "finetune")


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
    if settings.command in MEASURING:
        return False
    if settings.command == "finetune":
        return settings.teacher_name_or_path is not None and settings.distillation_weight != 0
    finetuning = _finetunes(settings) and settings.finetune_distillation_weight > 0
    return _search_distils(settings) or finetuning


def _holds_images_out(settings: Settings) -> bool:
    """Return whether the images to evaluate on may be held out from the training split."""
    is_named = settings.dataset_name is not None or settings.data_dir is not None
    return is_named and settings.eval_split in (None, settings.train_split)


def _trains(settings: Settings) -> bool:
    return settings.command not in MEASURING


def _pushes(settings: Settings) -> bool:
    return _trains(settings) and settings.push_to_hub


# What only the augmentation 'deit' does; any augmentation may be repeated.
AUGMENTATION = tuple(
    one.name for one in fields(AugmentationArguments) if one.name != "repeated_augmentation"
)
NOTHING_IS_TRAINED = "this command trains nothing; leave it out"
NOT_PUSHED = "the result is not pushed; add --push_to_hub, or leave it out"
PUSHED_ONCE = "the finished folder is pushed once; leave it out"

RULES = (
    Rule(
        (
            *("augmentation", "max_train_samples", "num_train_epochs", "max_steps"),
            *("learning_rate", "distillation_weight", "ema_decay", "resume_from_checkpoint"),
            "push_to_hub",
        ),
        _trains,
        NOTHING_IS_TRAINED,
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
        _pushes,
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
    sentences = []
    refused = set()
    for rule in RULES:
        for name in rule.names:
            value = getattr(settings, name)
            # one reason per setting is enough
            if name not in given or name in refused or not value or rule.works(settings):
                continue
            refused.add(name)
            # without its value, which may be an access token
            sentences.append(f"--{name} is given, but {rule.reason}.")
    if sentences:
        raise ValueError(" ".join(sentences))
