"""What a run starts from: classifiers, their image processors, and the data prepared for them."""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.utils import logging

from ..data import (
    AugmentationArguments,
    BatchAugmentation,
    DataArguments,
    ImageData,
    ImageStream,
    ImageTransform,
    SeededImages,
    StreamedSplit,
    align_labels,
    build_transform,
    cropping,
    load_image_data,
    require_decodable,
    with_image_transform,
)
from ..families.loading import load_complete_classifier
from ..families.registry import require_classifier
from ..models.shapes import SHAPES
from ..training.ranks import decided_by_rank_0

logger = logging.get_logger(__name__)


@dataclass
class Inputs:
    """A data set prepared for one image processor.

    Args:
        processor: the image processor; data: the splits as they were loaded.
        train, eval: rows of {"pixel_values" (3, H, W), "labels"}, augmented and not.
        batch_augmentation: what is left to do to whole batches of training images, if anything.
    """

    processor: Any
    data: ImageData
    train: Any
    eval: Any
    batch_augmentation: BatchAugmentation | None = None


def load(
    name_or_path: str,
    data_args: DataArguments,
    seed: int,
    augmentation_args: AugmentationArguments | None = None,
) -> tuple[PreTrainedModel, Inputs]:
    """A classifier and its data, prepared as its image processor says and labelled in its order.

    Raises:
        ValueError: if one of them cannot be loaded, or they do not go together.
    """
    augmentation_args = augmentation_args or AugmentationArguments()
    if augmentation_args.repeated_augmentation > 1 and not data_args.streaming:
        raise ValueError(
            f"repeated_augmentation is {augmentation_args.repeated_augmentation}, which only a "
            f"stream does; give "
            "--streaming true as well (a folder can be streamed, too), or leave it out."
        )
    processor, data = load_image_processor(name_or_path), load_image_data(data_args)
    decided_by_rank_0(lambda: require_decodable(data.eval, data.image_column))
    model = load_classifier(name_or_path, data.label_names, seed)
    data = _in_the_models_order(data, model, name_or_path)
    columns = (data.image_column, data.label_column)
    augmented = build_transform(
        processor, data_args.augmentation, train=True, augmentation_args=augmentation_args
    )
    in_batches = None
    if data_args.augmentation == "deit":
        in_batches = BatchAugmentation.from_arguments(
            processor, len(data.label_names), augmentation_args
        )
    plain = build_transform(processor, "none", train=False, eval_crop_pct=data_args.eval_crop_pct)
    if isinstance(data.train, StreamedSplit):
        train = ImageStream(data.train, augmented, seed, augmentation_args.repeated_augmentation)
    else:
        train = SeededImages(data.train, augmented, *columns, seed)
    if data_args.eval_crop_pct is not None:
        # what is saved prepares images as for the accuracy
        processor = cropping(processor, data_args.eval_crop_pct)
    inputs = Inputs(
        processor,
        data,
        train,
        with_image_transform(data.eval, plain, *columns),
        in_batches,
    )
    pixel_values = inputs.eval[0]["pixel_values"][None]
    require_same_size(name_or_path, model, tuple(pixel_values.shape[-2:]))
    try:
        with torch.no_grad():
            model.eval()(pixel_values=pixel_values)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name_or_path} cannot take the images that its image processor makes: {error}. Size "
            f"and channels of "
            "preprocessor_config.json and config.json have to agree (images come as RGB)."
        ) from error
    return model.train(), inputs


def require_same_size(name: str, model: PreTrainedModel, shape: tuple[int, int]) -> None:
    """Raises ValueError unless the images of an image processor, (height, width), have the size of
    the model's."""
    size = model.config.image_size
    if list(shape) != ([size, size] if isinstance(size, int) else list(size)):
        raise ValueError(
            f"{name} cannot take the images that its image processor makes: they have "
            f"{list(shape)} pixels, and "
            f"image_size is {size}, for which its cost is counted. Make preprocessor_config.json "
            f"and config.json agree."
        )


def _in_the_models_order(data: ImageData, model: PreTrainedModel, name: str) -> ImageData:
    """The data with its labels numbered as the model numbers them, where the names are the same."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if names == data.label_names:
        return data
    if sorted(names) != sorted(data.label_names):
        ours, theirs = next(
            pair for pair in zip(names, data.label_names, strict=True) if pair[0] != pair[1]
        )
        logger.warning(
            f"{name} names its labels otherwise than the data (for example {ours!r}, which is "
            f"{theirs!r} there); they "
            "are matched by number."
        )
        return data
    train, evaluation = (
        split.aligned(names)
        if isinstance(split, StreamedSplit)
        else align_labels(split, names, data.label_column)
        for split in (data.train, data.eval)
    )
    return replace(data, train=train, eval=evaluation, label_names=names)


def load_classifier(name_or_path: str, label_names: list[str], seed: int) -> PreTrainedModel:
    """A classifier for these labels.

    Args:
        name_or_path: key of `SHAPES` (random weights from `seed`), a folder, or a Hub name.
        label_names: classes of the data, in order.

    Raises:
        ValueError: if a checkpoint has another number of labels than the data, or cannot be loaded.
        UnsupportedArchitectureError: if it is no classifier that this package knows.
    """
    if name_or_path in SHAPES:
        torch.manual_seed(seed)
        return AutoModelForImageClassification.from_config(SHAPES[name_or_path].config(label_names))
    model = load_complete_classifier(name_or_path)
    require_classifier(model)
    if model.config.num_labels != len(label_names):
        raise ValueError(
            f"{name_or_path} classifies {model.config.num_labels} labels, but the data has "
            f"{len(label_names)}: "
            f"{label_names[:8]}{'...' if len(label_names) > 8 else ''}. Finetune a dense model on "
            f"this data first, "
            "or give the data that the model was trained for."
        )
    return model


def load_for_counting(name_or_path: str, num_labels: int) -> PreTrainedModel:
    """A classifier that no data is needed for.

    Args:
        name_or_path: key of `SHAPES` (random weights), a folder, or a Hub name.
        num_labels: of a shape; a checkpoint has its own.

    Raises:
        ValueError: if a checkpoint cannot be loaded.
        UnsupportedArchitectureError: if it is no classifier that this package knows.
    """
    if name_or_path in SHAPES:
        return load_classifier(name_or_path, [str(label) for label in range(num_labels)], seed=0)
    model = load_complete_classifier(name_or_path)
    require_classifier(model)
    return model


def load_teacher(name_or_path: str | None, inputs: Inputs) -> PreTrainedModel | None:
    """Any image classifier for these inputs, whatever its architecture; None if none is named.

    Raises:
        ValueError: if it cannot be loaded, has another number of labels, or wants its pixels
            prepared otherwise than the student (both see the same batch).
    """
    if name_or_path is None:
        return None
    model, processor = load_complete_classifier(name_or_path), inputs.processor
    theirs, num_labels = load_image_processor(name_or_path), len(inputs.data.label_names)
    names = [
        model.config.id2label[index] for index in range(min(num_labels, model.config.num_labels))
    ]
    if names != inputs.data.label_names and sorted(names) == sorted(inputs.data.label_names):
        raise ValueError(
            f"the teacher {name_or_path} numbers the labels differently: {names[:5]}..."
        )
    for what, ours, wanted in zip(
        ("mean", "std", "size"), _batch_of(processor), _batch_of(theirs), strict=True
    ):
        if ours != wanted:
            raise ValueError(
                f"the teacher {name_or_path} expects images of {what} {wanted}, but the model "
                f"gets {ours}; student and "
                "teacher see the same batch, so choose a teacher with the same preprocessing."
            )
    if model.config.num_labels != num_labels:
        raise ValueError(
            f"the teacher {name_or_path} classifies {model.config.num_labels} labels, but the "
            f"data has {num_labels}."
        )
    return model


def image_shape(processor: Any) -> tuple[int, int]:
    """Height and width of what an image processor makes."""
    transform = ImageTransform(processor)
    return transform.height, transform.width


def _batch_of(processor: Any) -> tuple[list[float], list[float], tuple[int, int]]:
    """What batches look like that are made as an image processor says: mean, standard deviation,
    (height, width)."""
    return list(processor.image_mean), list(processor.image_std), image_shape(processor)


def load_image_processor(name_or_path: str) -> Any:
    """The image processor that belongs to a checkpoint; for a shape, its own values."""
    if name_or_path in SHAPES:
        shape = SHAPES[name_or_path]
        size = {"height": shape.fields["image_size"], "width": shape.fields["image_size"]}
        return ViTImageProcessorPil(
            size=size, image_mean=list(shape.image_mean), image_std=list(shape.image_std)
        )
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{name_or_path} has no image processor (preprocessor_config.json): {error}. Save one "
            f"beside the model, so "
            "that size, mean and standard deviation of its pixels are known."
        ) from error
