"""Load a classifier, stock or ours, from the Hub or a folder, and refuse one with missing
weights."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForImageClassification, PreTrainedModel


def load_complete_classifier(name_or_path: str | Path) -> PreTrainedModel:
    """An image classifier, stock or ours, from the Hub or a folder, with all of its weights.

    Raises:
        ValueError: if it cannot be loaded, or if weights are missing in the file, which
            transformers would draw anew.
    """
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            name_or_path, output_loading_info=True
        )
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load an image classifier from {str(name_or_path)!r}: {error} Give a Hub name "
            f"or a folder written "
            "by save_pretrained."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name_or_path} is no complete image classifier: {len(missing)} of its tensors are "
            f"missing, such as "
            f"{missing[0]}."
        )
    return model
