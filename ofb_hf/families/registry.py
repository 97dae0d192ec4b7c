"""The registered model families, and which of them a config or a model belongs to."""

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedConfig

from .description import Architecture, Family, UnsupportedArchitectureError
from .swin import SWIN
from .vit import VIT

# Stock config class -> family. A new family is one more entry, see docs/ADD_A_MODEL_FAMILY.md.
FAMILIES: dict[type[PreTrainedConfig], Family] = {
    family.stock_class.config_class: family for family in (VIT, SWIN)
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family that a config belongs to.

    Raises:
        UnsupportedArchitectureError: naming the model type and the supported ones.
    """
    # Our configs are subclasses of the stock ones.
    for config_class, family in FAMILIES.items():
        if isinstance(config, config_class):
            return family
    supported = sorted(config_class.model_type for config_class in FAMILIES)
    raise UnsupportedArchitectureError(
        f"model type {getattr(config, 'model_type', type(config).__name__)!r} cannot be searched; "
        f"supported: {supported}. docs/ADD_A_MODEL_FAMILY.md says how to add a family."
    )


def describe(config: PreTrainedConfig) -> Architecture:
    """Return the architecture that a config, stock or ours, stands for."""
    return family_of(config).describe(config)


def is_ours(model: nn.Module) -> bool:
    """Return whether a model is a classifier of this package.

    One that came by `trust_remote_code` is, too: its class is of another module, so its model type
    decides.
    """
    for family in FAMILIES.values():
        if isinstance(model, family.stock_class):
            return model.config.model_type == family.model_class.config_class.model_type
    return False


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers: DDP's, those of a compiled model, and PEFT's."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    # of every PeftModel; adapters are layers inside of its base model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_classifier(model: nn.Module) -> None:
    """Raise `UnsupportedArchitectureError` unless a model is a classifier of a family."""
    classes = tuple(family.stock_class for family in FAMILIES.values())
    if not isinstance(model, classes):
        raise UnsupportedArchitectureError(
            f"got a {type(model).__name__}; expected an image classifier: "
            f"{[each.__name__ for each in classes]} or our classes of that kind."
        )


def require_single_label(
    config: PreTrainedConfig,
    name: str = "the model",
    advice: str = "Give a classifier of that kind.",
) -> None:
    """Raise ValueError for a head whose outputs are no logits of a softmax over several classes.

    Such are heads for several right classes per image, and for regression.

    Args:
        config: of a classifier, or of a model without a head.
        name: of the model, for the message.
        advice: what to do.
    """
    problem = getattr(config, "problem_type", None)
    if config.num_labels == 1 or problem not in (None, "single_label_classification"):
        raise ValueError(
            f"{name} has num_labels {config.num_labels} and problem_type {problem!r}, but outputs "
            "are taken for the probabilities of two or more classes, of which one is right. "
            f"{advice}"
        )
