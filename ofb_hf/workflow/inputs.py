"""What a run starts from: classifiers, their image processors, and the data prepared for them."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from ..architectures import require_classifier
from ..data import DataArguments, ImageData, build_transform, load_image_data, with_image_transform

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _deit(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-6,
        "image_size": 224,
    }


# Shapes with random weights: DeiT (arXiv:2012.12877, table 1) and the demonstration's ViT on 8 x 8 digits.
PRESETS: dict[str, dict[str, Any]] = {
    "deit_tiny": _deit(192),
    "deit_small": _deit(384),
    "deit_base": _deit(768),
    "digits_vit": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 8,
        "patch_size": 2,
    },
}


@dataclass
class Inputs:
    """A data set prepared for one image processor.

    Args:
        processor: the image processor; data: the splits as they were loaded.
        train, eval: rows of {"pixel_values" (3, H, W), "labels"}, augmented and not.
    """

    processor: Any
    data: ImageData
    train: Any
    eval: Any


def load_inputs(name_or_path: str, data_args: DataArguments) -> Inputs:
    """The data, prepared as the checkpoint's image processor says; errors as its two parts."""
    processor, data = load_image_processor(name_or_path), load_image_data(data_args)
    columns = (data.image_column, data.label_column)
    augmented = build_transform(processor, data_args.augmentation, train=True)
    plain = build_transform(processor, "none", train=False)
    return Inputs(
        processor,
        data,
        with_image_transform(data.train, augmented, *columns),
        with_image_transform(data.eval, plain, *columns),
    )


def load_classifier(name_or_path: str, label_names: list[str], seed: int) -> PreTrainedModel:
    """A classifier for these labels.

    Args:
        name_or_path: key of `PRESETS` (random weights from `seed`), a folder, or a Hub name.
        label_names: classes of the data, in order.

    Raises:
        ValueError: if a checkpoint has another number of labels than the data, or cannot be loaded.
        UnsupportedArchitectureError: if it is no classifier that this package knows.
    """
    if name_or_path in PRESETS:
        torch.manual_seed(seed)
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
        return ViTForImageClassification(ViTConfig(**PRESETS[name_or_path], **labels))
    model = _load(name_or_path)
    require_classifier(model)
    if model.config.num_labels != len(label_names):
        raise ValueError(
            f"{name_or_path} classifies {model.config.num_labels} labels, but the data has {len(label_names)}: "
            f"{label_names[:8]}{'...' if len(label_names) > 8 else ''}. Finetune a dense model on this data first, "
            "or give the data that the model was trained for."
        )
    return model


def load_teacher(name_or_path: str | None, inputs: Inputs) -> PreTrainedModel | None:
    """Any image classifier for these inputs, whatever its architecture; None if none is named.

    Raises:
        ValueError: if it cannot be loaded, has another number of labels, or wants its pixels prepared otherwise than
            the student (both see the same batch).
    """
    if name_or_path is None:
        return None
    model, processor = _load(name_or_path), inputs.processor
    theirs, num_labels = load_image_processor(name_or_path), len(inputs.data.label_names)
    for field in ("image_mean", "image_std", "size"):
        ours, wanted = getattr(processor, field), getattr(theirs, field)
        if dict(ours) != dict(wanted) if field == "size" else list(ours) != list(wanted):
            raise ValueError(
                f"the teacher {name_or_path} expects {field} {wanted}, but the model gets {ours}; student and teacher "
                "see the same batch, so choose a teacher with the same preprocessing."
            )
    if model.config.num_labels != num_labels:
        raise ValueError(
            f"the teacher {name_or_path} classifies {model.config.num_labels} labels, but the data has {num_labels}."
        )
    return model


def _load(name_or_path: str) -> PreTrainedModel:
    try:
        return AutoModelForImageClassification.from_pretrained(name_or_path)
    except (OSError, KeyError) as error:
        raise ValueError(
            f"cannot load an image classifier from {name_or_path!r}: {error}. Give a Hub name, a folder written by "
            f"save_pretrained, or one of {sorted(PRESETS)}."
        ) from error


def load_image_processor(name_or_path: str) -> Any:
    """The image processor that belongs to a checkpoint; for a preset, ImageNet's values at its image size."""
    if name_or_path in PRESETS:
        size = PRESETS[name_or_path]["image_size"]
        values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if name_or_path == "digits_vit" else IMAGENET
        return ViTImageProcessorPil(size={"height": size, "width": size}, **values)
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{name_or_path} has no image processor (preprocessor_config.json): {error}. Save one beside the model, so "
            "that size, mean and standard deviation of its pixels are known."
        ) from error
