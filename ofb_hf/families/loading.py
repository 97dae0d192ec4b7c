"""Make classifiers: load a complete one from the Hub or a folder, or rebuild one of our class."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .registry import family_of

# How a user gets a classifier for labels of their own, for messages.
NEW_CLASSIFIER = (
    "`ofb-hf finetune --new_classifier` trains one for the labels of your data, and so does "
    "`ofb-hf search --new_classifier --dense_epochs N` before it searches"
)


def load_complete_classifier(name_or_path: str | Path) -> PreTrainedModel:
    """Load an image classifier, stock or ours, from the Hub or a folder, with all of its weights.

    Raises:
        ValueError: if it cannot be loaded, or if the file lacks weights, which transformers would
            initialise at random.
    """
    model, report = _loaded(name_or_path)
    _require_complete(name_or_path, model, report["missing_keys"])
    return model


def load_with_new_head(name_or_path: str | Path, label_names: list[str]) -> PreTrainedModel:
    """Load an image classifier, or an encoder, with a head for other labels.

    The head has random weights, whatever the checkpoint holds; seed torch to repeat them.

    Args:
        name_or_path: a folder, or a Hub name.
        label_names: of the new labels, in the order of their numbers.

    Raises:
        ValueError: if it cannot be loaded, or if other weights than those of the head are missing
            or have another shape.
    """
    numbers = {name: number for number, name in enumerate(label_names)}
    model, report = _loaded(
        name_or_path,
        ignore_mismatched_sizes=True,
        id2label=dict(enumerate(label_names)),
        label2id=numbers,
        problem_type=None,  # a checkpoint may have had several right classes, or a number
    )
    other_shapes = {name for name, *_ in report["mismatched_keys"]}
    missing = _in_encoder(model, report["missing_keys"] | other_shapes)
    _require_complete(name_or_path, model, missing)
    for module in _head_modules(model):
        for tensor in module.parameters(recurse=False):
            # transformers does not touch what a checkpoint filled, and a head of as many labels as
            # before was filled
            tensor._is_hf_initialized = False
        model._init_weights(module)
    return model


def load_classifier_or_features(name_or_path: str | Path) -> PreTrainedModel:
    """Load an image classifier; without its head if the checkpoint has none, as an encoder's.

    Such a model has `num_labels` 0 and gives out features. transformers would make up a head with
    random weights.

    Raises:
        ValueError: if it cannot be loaded, or if other weights than those of the head are missing.
    """
    model, report = _loaded(name_or_path)
    missing = report["missing_keys"]
    if missing and not _in_encoder(model, missing):
        model, report = _loaded(name_or_path, num_labels=0)
    _require_complete(name_or_path, model, report["missing_keys"])
    return model


def _in_encoder(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return those of some tensors' names that are not of a classifier's head."""
    return {name for name in names if name.startswith(f"{model.base_model_prefix}.")}


def _head_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules of a classifier that are not of its encoder."""
    modules: list[nn.Module] = []
    for name, child in model.named_children():
        if name != model.base_model_prefix:
            modules += child.modules()
    return modules


def _loaded(
    name_or_path: str | Path, **changes: Any
) -> tuple[PreTrainedModel, dict[str, set[Any]]]:
    """Load an image classifier with some fields of its config set.

    Also return which tensors are missing and which have another shape, as transformers says.
    """
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            name_or_path, output_loading_info=True, **changes
        )
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load an image classifier from {str(name_or_path)!r}: {error} Give a Hub name "
            "or a folder written by save_pretrained."
        ) from error
    return model, report


def _require_complete(
    name_or_path: str | Path, model: PreTrainedModel, missing: Iterable[str]
) -> None:
    """Raise ValueError if a checkpoint lacks tensors."""
    names = sorted(missing)
    if not names:
        return
    advice = "" if _in_encoder(model, names) else f" It has no head: {NEW_CLASSIFIER}."
    raise ValueError(
        f"{name_or_path} is no complete image classifier: {len(names)} of its tensors are "
        f"missing, such as {names[0]}.{advice}"
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
