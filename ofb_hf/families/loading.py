"""Make classifiers: load a complete one from the Hub or a folder, or rebuild one of our class."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .registry import family_of


def load_complete_classifier(name_or_path: str | Path) -> PreTrainedModel:
    """Load an image classifier, stock or ours, from the Hub or a folder, with all of its weights.

    Raises:
        ValueError: if it cannot be loaded, or if the file lacks weights, which transformers would
            initialise at random.
    """
    model, missing = _loaded(name_or_path)
    _require_complete(name_or_path, missing)
    return model


def load_classifier_or_features(name_or_path: str | Path) -> PreTrainedModel:
    """Load an image classifier; without its head if the checkpoint has none, as an encoder's.

    Such a model has `num_labels` 0 and gives out features. transformers would make up a head with
    random weights.

    Raises:
        ValueError: if it cannot be loaded, or if other weights than those of the head are missing.
    """
    model, missing = _loaded(name_or_path)
    base = f"{model.base_model_prefix}."
    if missing and not any(name.startswith(base) for name in missing):
        model, missing = _loaded(name_or_path, num_labels=0)
    _require_complete(name_or_path, missing)
    return model


def _loaded(name_or_path: str | Path, **config: Any) -> tuple[PreTrainedModel, list[str]]:
    """Load an image classifier with some fields of its config set; also return what is missing."""
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            name_or_path, output_loading_info=True, **config
        )
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load an image classifier from {str(name_or_path)!r}: {error} Give a Hub name "
            "or a folder written by save_pretrained."
        ) from error
    return model, sorted(report["missing_keys"])


def _require_complete(name_or_path: str | Path, missing: list[str]) -> None:
    """Raise ValueError if a checkpoint lacks tensors."""
    if missing:
        raise ValueError(
            f"{name_or_path} is no complete image classifier: {len(missing)} of its tensors are "
            f"missing, such as {missing[0]}."
        )


def rebuild_classifier(
    like: PreTrainedModel,
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
) -> PreTrainedModel:
    """Build a classifier of this package from a config and tensors.

    Args:
        like: the classifier whose device, dtype and training mode it gets.
        config: of our class, with the widths of the tensors. The new classifier keeps it.
        state: tensors by name; those that a classifier with this config does not have (a mask
            token, learned token counts) are left out.
    """
    model_class = family_of(config).model_class
    model = model_class(config).to(device=like.device, dtype=like.dtype)
    # A tensor that is missing is an error, one too many is not.
    tensors = {name: state[name] for name in model.state_dict()}
    model.load_state_dict(tensors)
    return model.train(like.training)
