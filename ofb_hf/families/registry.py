"""Which model families there are, and which of them a config or a model belongs to."""

from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .description import Architecture, Family, UnsupportedArchitectureError
from .swin import SWIN
from .vit import VIT

FAMILIES: dict[type[PreTrainedConfig], Family] = {ViTConfig: VIT, SwinConfig: SWIN}
CLASSIFIERS: tuple[type[PreTrainedModel], ...] = (
    ViTForImageClassification,
    SwinForImageClassification,
)


def family_of(config: PreTrainedConfig) -> Family:
    """The family that a config belongs to.

    Raises:
        UnsupportedArchitectureError: naming the model type and the supported ones.
    """
    for config_class, family in FAMILIES.items():
        if isinstance(config, config_class):
            return family
    supported = sorted(config_class.model_type for config_class in FAMILIES)
    raise UnsupportedArchitectureError(
        f"model type {getattr(config, 'model_type', type(config).__name__)!r} cannot be searched; "
        f"supported: "
        f"{supported}. A new family is one entry in ofb_hf/architectures.py."
    )


def describe(config: PreTrainedConfig) -> Architecture:
    """The architecture that a config, stock or ours, stands for."""
    return family_of(config).describe(config)


def require_classifier(model: nn.Module) -> None:
    """Raises `UnsupportedArchitectureError` unless `model` is an image classifier of a supported
    family."""
    if not isinstance(model, CLASSIFIERS):
        raise UnsupportedArchitectureError(
            f"got a {type(model).__name__}; expected an image classifier: "
            f"{[c.__name__ for c in CLASSIFIERS]} or our "
            "classes of that kind."
        )
