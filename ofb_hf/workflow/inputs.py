"""Load what a run starts from: classifiers, their image processors, and data prepared for them."""

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import httpx
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
from ..data.processors import describe_other_pixels
from ..families.description import image_sides
from ..families.evaluation import evaluating
from ..families.loading import NEW_CLASSIFIER, load_complete_classifier, load_with_new_head
from ..families.registry import describe, require_classifier, require_single_label
from ..families.subnet import SubnetSpec
from ..models.shapes import SHAPES
from ..training.ranks import decided_by_rank_0
from .arguments import TrainedModelArguments
from .output import SUBNET

logger = logging.get_logger(__name__)

# Of the training images, one in so many is held out to choose the weights by; at most and least.
GUARD_SHARE = 20
MOST_GUARD_IMAGES = 1024
LEAST_GUARD_IMAGES = 64


@dataclass
class Inputs:
    """Data prepared for one image processor.

    Args:
        processor: the image processor.
        data: the splits as they were loaded.
        train: augmented rows of {"pixel_values" (3, H, W), "labels"}.
        eval: rows of the same kind that are not augmented.
        train_plain: the training rows, not augmented.
        guard: rows that are held out of the training, not augmented; None without any.
        batch_augmentation: augments whole batches of training images, if anything does.
    """

    processor: Any
    data: ImageData
    train: Any
    eval: Any
    train_plain: Any
    batch_augmentation: BatchAugmentation | None = None
    guard: Any = None


def require_findable(name_or_path: str) -> None:
    """Raise ValueError for a name that neither a folder, nor a shape, nor a model on the Hub has.

    Without this a mistyped shape would be looked for on the Hub, with all its retries.

    Args:
        name_or_path: key of `SHAPES`, a folder, or a Hub name.
    """
    # all image classifiers on the Hub have an owner
    if name_or_path in SHAPES or "/" in name_or_path or Path(name_or_path).exists():
        return
    # with their words in order: "vit_digits" is "digits_vit"
    shapes = {_in_order(name): name for name in SHAPES}
    similar = difflib.get_close_matches(_in_order(name_or_path), shapes, n=1)
    advice = f"did you mean {shapes[similar[0]]}?" if similar else "check the spelling."
    raise ValueError(
        f"{name_or_path!r} is no folder, no Hub name (OWNER/NAME) and none of the named shapes "
        f"{', '.join(SHAPES)}; {advice}"
    )


def require_possible_teacher(name_or_path: str | None) -> None:
    """Raise ValueError for a teacher that could not be loaded or has nothing to teach."""
    if name_or_path is None:
        return
    require_findable(name_or_path)
    if name_or_path in SHAPES:
        raise ValueError(
            f"the teacher is {name_or_path}, a named shape with random weights; name a trained "
            "classifier, or leave --teacher_name_or_path out."
        )


def _in_order(name: str) -> str:
    """Return the words of a name, in alphabetical order."""
    return " ".join(sorted(name.lower().replace("-", "_").split("_")))


def load(
    name_or_path: str,
    data_args: DataArguments,
    seed: int,
    augmentation_args: AugmentationArguments | None = None,
    *,
    trains: bool = True,
    new_classifier: bool = False,
    match_labels_by_number: bool = False,
    guard_images: int | None = 0,
) -> tuple[PreTrainedModel, Inputs]:
    """Load a classifier and its data.

    The images are prepared as the image processor of the classifier says, and the labels are
    numbered as the classifier numbers them.

    Args:
        name_or_path: key of `SHAPES`, a folder, or a Hub name.
        seed: of the augmentation, and of random weights.
        trains: whether the classifier is to be trained, as of `load_image_data`.
        new_classifier: whether the classifier gets a head with random weights for the labels of
            the data.
        match_labels_by_number: whether label 0 of the data is label 0 of the classifier, and so
            on, even if no name is the same.
        guard_images: rows to hold out of the training; None = as many as `guard_size` says.

    Raises:
        ValueError: if one of them cannot be loaded, or they do not go together.
    """
    require_findable(name_or_path)
    augmentation_args = augmentation_args or AugmentationArguments()
    if augmentation_args.repeated_augmentation > 1 and not data_args.streaming:
        raise ValueError(
            f"repeated_augmentation is {augmentation_args.repeated_augmentation}, which only a "
            "stream does; give --streaming true as well (a folder can be streamed, too), or leave "
            "it out."
        )
    # The model is made, or checked, for the label names of the data; then the data follows the
    # order in which the model has them.
    processor = load_image_processor(name_or_path)
    data = load_image_data(data_args, trains)
    # Rank 0 decides for all: a rank that went on alone would wait for the others for ever.
    decided_by_rank_0(lambda: require_decodable(data.eval, data.image_column))
    model = load_classifier(name_or_path, data.label_names, seed, new_classifier)
    data = _in_the_models_order(data, model, name_or_path, match_labels_by_number)
    inputs = _prepared(processor, data, data_args, augmentation_args, seed, guard_images)
    # with a real image, before anything is written or trained
    _require_images(name_or_path, model, inputs)
    return model.train(), inputs


def load_to_train(
    model_args: TrainedModelArguments,
    data_args: DataArguments,
    seed: int,
    augmentation_args: AugmentationArguments,
) -> tuple[PreTrainedModel, Inputs]:
    """Load the classifier that a command is to train, and its data; see `load`."""
    return load(
        model_args.model_name_or_path,
        data_args,
        seed,
        augmentation_args,
        new_classifier=model_args.new_classifier,
        match_labels_by_number=model_args.match_labels_by_number,
        guard_images=model_args.guard_images,
    )


def _prepared(
    processor: Any,
    data: ImageData,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    seed: int,
    guard_images: int | None,
) -> Inputs:
    """Return data that is prepared as an image processor says, augmented for training."""
    columns = (data.image_column, data.label_column)
    # "plain" for evaluation: resized, cropped and normalised, and not augmented
    augmented = build_transform(
        processor, data_args.augmentation, train=True, augmentation_args=augmentation_args
    )
    plain = build_transform(processor, "none", train=False, eval_crop_pct=data_args.eval_crop_pct)
    guard = None
    # A stream shuffles and deals out its images by itself; others are indexed by a sampler.
    if isinstance(data.train, StreamedSplit):
        if guard_images:
            raise ValueError(
                f"--guard_images is {guard_images}, but a stream holds none out; leave it out."
            )
        train = ImageStream(data.train, augmented, seed, augmentation_args.repeated_augmentation)
        train_plain = ImageStream(data.train, plain, seed)
    else:
        allowed = data_args.max_bad_share
        rows, held_out = _held_out(data.train, guard_images, seed)
        train = SeededImages(rows, augmented, *columns, seed, allowed)
        train_plain = SeededImages(rows, plain, *columns, seed, allowed)
        if held_out is not None:
            guard = SeededImages(held_out, plain, *columns, seed, allowed)
    # Mixing and erasing need whole batches, on the device.
    batch_augmentation = None
    if data_args.augmentation == "deit":
        batch_augmentation = BatchAugmentation.from_arguments(
            processor, len(data.label_names), augmentation_args
        )
    if data_args.eval_crop_pct is not None:
        # What is saved with the result prepares images as for the accuracy that is reported. The
        # transforms above still crop by themselves.
        processor = cropping(processor, data_args.eval_crop_pct)
    evaluation = with_image_transform(data.eval, plain, *columns)
    return Inputs(processor, data, train, evaluation, train_plain, batch_augmentation, guard)


def _held_out(rows: Dataset, wanted: int | None, seed: int) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on, and those that are held out; the same for the same seed.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    count = guard_size(len(rows)) if wanted is None else wanted
    if not count:
        return rows, None
    if count >= len(rows):
        raise ValueError(
            f"--guard_images is {count}, but there are {len(rows)} training images; hold out fewer."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def guard_size(images: int) -> int:
    """Return how many of the training images are held out where nobody says it."""
    count = min(MOST_GUARD_IMAGES, images // GUARD_SHARE)
    return count if count >= LEAST_GUARD_IMAGES else 0


def _require_images(name: str, model: PreTrainedModel, inputs: Inputs) -> None:
    """Raise ValueError unless a model takes the images that are prepared for it."""
    pixel_values = inputs.eval[0]["pixel_values"][None]  # (1, C, H, W)
    require_same_size(name, model, tuple(pixel_values.shape[-2:]))
    _require_forward(name, model, pixel_values)


def _require_forward(name: str, model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Raise ValueError unless a model takes some images (B, C, H, W)."""
    try:
        with evaluating(model), torch.no_grad():
            model(pixel_values=pixel_values)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot take the images that its image processor makes: {error}. Size and "
            "channels of preprocessor_config.json and config.json have to agree (images come as "
            "RGB)."
        ) from error


def require_same_size(name: str, model: PreTrainedModel, shape: tuple[int, int]) -> None:
    """Raise ValueError unless images have the size for which the cost of the model is counted.

    Args:
        name: of the model, for the message.
        shape: (height, width) of what its image processor makes.
    """
    if tuple(shape) != tuple(image_sides(model.config)):
        raise ValueError(
            f"{name} cannot take the images that its image processor makes: they have "
            f"{list(shape)} pixels, and image_size is {model.config.image_size}, for which its "
            "cost is counted. Make preprocessor_config.json and config.json agree."
        )


def _in_the_models_order(
    data: ImageData, model: PreTrainedModel, name: str, by_number: bool
) -> ImageData:
    """Return the data with its labels numbered as the model numbers them.

    If the names are others, labels are matched by number; see `match_by_number`.
    """
    names = _label_names(model)
    if sorted(names) == sorted(data.label_names):
        return _numbered_like(data, names)
    data = _numbered_like(data, in_order_of_numbers(data.label_names))
    match_by_number(name, names, data.label_names, allowed=by_number)
    return data


def _numbered_like(data: ImageData, names: list[str]) -> ImageData:
    """Return the data with its classes, which have these names, in this order."""
    if names == data.label_names:
        return data

    def aligned(split: Any) -> Any:
        if isinstance(split, StreamedSplit):
            return split.aligned(names)
        return align_labels(split, names, data.label_column)

    return replace(data, train=aligned(data.train), eval=aligned(data.eval), label_names=names)


def in_order_of_numbers(names: list[str]) -> list[str]:
    """Return the names of classes as they are matched by number.

    Names that are the numbers from 0 on say their numbers themselves, while folders come in the
    order of text, 10 before 2.
    """
    numbers = [int(name) if name.isdecimal() else -1 for name in names]
    if sorted(numbers) == list(range(len(names))):
        return sorted(names, key=int)
    return names


def _label_names(model: PreTrainedModel) -> list[str]:
    """Return the labels of a classifier in the order of their numbers."""
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def match_by_number(name: str, names: list[str], data_names: list[str], allowed: bool) -> None:
    """Match a model's labels and those of the data by their numbers, with a warning.

    Args:
        name: of the model, for messages.
        names: labels of the model, in the order of their numbers.
        data_names: labels of the data; as many, with other names.
        allowed: whether the user said that this is meant.

    Raises:
        ValueError: if no label of the model has a name of the data, unless it is allowed.
    """
    pairs = list(zip(range(len(names)), names, data_names, strict=True))
    contradiction = next((pair for pair in pairs if not _may_be_same(*pair)), None)
    if contradiction is None:
        # "LABEL_0" for any name, or "tench" for "tench, Tinca tinca"
        _, ours, theirs = next(pair for pair in pairs if pair[1] != pair[2])
        logger.warning(
            f"{name} writes its labels otherwise than the data ({ours!r} for {theirs!r}); they are "
            "matched by number."
        )
        return
    number, ours, theirs = contradiction
    difference = f"label {number} is {ours!r} for {name} and {theirs!r} in the data"
    of_model = set[str]().union(*map(_words, names))
    of_data = set[str]().union(*map(_words, data_names))
    if not allowed and not of_model & of_data:
        raise ValueError(
            f"{difference}, and no other name is the same. If they are the same classes in the "
            "same order, say so with --match_labels_by_number; otherwise give the data that the "
            f"model was trained for, or a model for this data: {NEW_CLASSIFIER}."
        )
    logger.warning(f"{difference}; labels are matched by number.")


def _may_be_same(number: int, ours: str, theirs: str) -> bool:
    """Return whether two labels of this number may name the same class.

    `LABEL_3`, as of a checkpoint without names, says nothing but its number, and may be any class
    but another number. A number alone is a name like others: digits are classes, too.
    """
    if _words(ours) & _words(theirs):
        return True
    unnamed = {f"LABEL_{number}"}
    if not unnamed & {ours, theirs}:
        return False
    stated = {label.removeprefix("LABEL_") for label in (ours, theirs)}
    return {each for each in stated if each.isdecimal()} == {str(number)}


def _words(label: str) -> set[str]:
    """Return the names in a label, such as "tench" and "tinca tinca", as they may be compared."""
    return {" ".join(word.replace("_", " ").split()).casefold() for word in label.split(",")}


def load_classifier(
    name_or_path: str, label_names: list[str], seed: int, new_classifier: bool = False
) -> PreTrainedModel:
    """Load a classifier for these labels.

    Args:
        name_or_path: key of `SHAPES` (random weights from `seed`), a folder, or a Hub name.
        label_names: classes of the data, in the order of their numbers.
        seed: of random weights.
        new_classifier: whether a checkpoint gets a head with random weights for these labels.

    Raises:
        ValueError: if a checkpoint has another number of labels than the data, or cannot be loaded.
        UnsupportedArchitectureError: if it is no classifier of a supported family.
    """
    # random weights are the same on every rank
    torch.manual_seed(seed)
    if name_or_path in SHAPES:
        config = SHAPES[name_or_path].config(label_names)
        return AutoModelForImageClassification.from_config(config)
    if new_classifier:
        model = load_with_new_head(name_or_path, label_names)
    else:
        model = load_complete_classifier(name_or_path)
    require_classifier(model)
    require_single_label(model.config, name_or_path)
    if model.config.num_labels != len(label_names):
        more = "..." if len(label_names) > 8 else ""
        raise ValueError(
            f"{name_or_path} classifies {model.config.num_labels} labels, but the data has "
            f"{len(label_names)}: {label_names[:8]}{more}. Give the data that the model was "
            f"trained for, or a model for this data: {NEW_CLASSIFIER}."
        )
    return model


def load_for_counting(name_or_path: str, num_labels: int) -> PreTrainedModel:
    """Load a classifier whose cost or speed is of interest, without any data.

    Args:
        name_or_path: key of `SHAPES` (random weights), a folder, or a Hub name.
        num_labels: of a shape; a checkpoint has its own.

    Raises:
        ValueError: if a checkpoint cannot be loaded.
        UnsupportedArchitectureError: if it is no classifier of a supported family.
    """
    require_findable(name_or_path)
    if name_or_path in SHAPES:
        return load_classifier(name_or_path, [str(label) for label in range(num_labels)], seed=0)
    model = load_complete_classifier(name_or_path)
    require_classifier(model)
    return model


def load_teacher(
    name_or_path: str | None, inputs: Inputs, match_labels_by_number: bool = False
) -> PreTrainedModel | None:
    """Load an image classifier of any architecture as the teacher; return None if none is named.

    Args:
        name_or_path: a folder, or a Hub name.
        inputs: data, numbered as the student numbers it.
        match_labels_by_number: as for `load`.

    Raises:
        ValueError: if it cannot be loaded, has other labels, or wants its pixels prepared
            otherwise than the student (both see the same batch).
    """
    if name_or_path is None:
        return None
    model = load_complete_classifier(name_or_path)
    require_single_label(model.config, f"the teacher {name_or_path}")
    _require_same_preprocessing(name_or_path, inputs.processor)
    _require_forward(f"the teacher {name_or_path}", model, inputs.eval[0]["pixel_values"][None])
    num_labels = len(inputs.data.label_names)
    if model.config.num_labels != num_labels:
        raise ValueError(
            f"the teacher {name_or_path} classifies {model.config.num_labels} labels, but the "
            f"data has {num_labels}; choose a teacher for this data."
        )
    # The same names in another order are an error: its logits would mean other classes.
    names = _label_names(model)
    if sorted(names) != sorted(inputs.data.label_names):
        teacher = f"the teacher {name_or_path}"
        in_order = in_order_of_numbers(inputs.data.label_names)
        if in_order != inputs.data.label_names:
            raise ValueError(
                f"{teacher} calls label 0 {names[0]!r}, and the classes of the data are numbers, "
                f"which the model has in another order: {inputs.data.label_names[:5]}... Choose a "
                "teacher that names its labels as the model."
            )
        match_by_number(teacher, names, inputs.data.label_names, match_labels_by_number)
    elif names != inputs.data.label_names:
        raise ValueError(
            f"the teacher {name_or_path} numbers the labels differently, {names[:5]}... instead "
            f"of {inputs.data.label_names[:5]}...; choose a teacher that numbers them as the model."
        )
    return model


def _require_same_preprocessing(name_or_path: str, processor: Any) -> None:
    """Raise ValueError unless a teacher's images are made as the image processor makes them."""
    theirs = load_image_processor(name_or_path)
    difference = describe_other_pixels(processor, theirs, *image_shape(processor))
    if difference is not None:
        raise ValueError(
            f"the image processor of the teacher {name_or_path} makes other pixels than that of "
            f"the model: {difference}. Student and teacher see the same batch, so choose a teacher "
            "with the same preprocessing (size, crop_size, do_rescale, do_normalize, image_mean, "
            "image_std)."
        )


def image_shape(processor: Any) -> tuple[int, int]:
    """Return height and width of the images that an image processor makes."""
    transform = ImageTransform(processor)
    return transform.height, transform.width


def load_image_processor(name_or_path: str) -> Any:
    """Load the image processor of a checkpoint; make one for a shape.

    Raises:
        ValueError: if a checkpoint has none.
    """
    if name_or_path in SHAPES:
        shape = SHAPES[name_or_path]
        side = shape.fields["image_size"]
        return ViTImageProcessorPil(
            size={"height": side, "width": side},
            image_mean=list(shape.image_mean),
            image_std=list(shape.image_std),
        )
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{name_or_path} has no image processor (preprocessor_config.json): {error}. Save one "
            "next to the model, so that size, mean and standard deviation of its pixels are known."
        ) from error


def load_subnet(name_or_path: str, model: PreTrainedModel) -> SubnetSpec | None:
    """Load the units that a pruned model keeps of the model it was cut from.

    Args:
        name_or_path: key of `SHAPES`, a folder, or a Hub name.
        model: the model of that name.

    Returns:
        The `subnet.json` next to the model; None if there is none, or none that fits the model's
        widths, with a warning.
    """
    if name_or_path in SHAPES:
        return None
    folder = Path(name_or_path)
    try:
        is_local = folder.is_dir()
        file = folder / SUBNET if is_local else Path(hf_hub_download(name_or_path, SUBNET))
        text = file.read_text(encoding="utf-8")
    except (OSError, httpx.RequestError):  # there is none, or none that could be fetched
        return None
    try:
        subnet = SubnetSpec.from_json(text)
    except ValueError as error:
        logger.warning(f"the {SUBNET} of {name_or_path} is not copied to the result: {error}")
        return None
    # A search may have been followed by another cut, or the file may be a copy from elsewhere.
    if subnet.shapes != describe(model.config).sizes:
        logger.warning(
            f"the {SUBNET} of {name_or_path} does not fit the widths of the model, so it is not "
            "copied to the result."
        )
        return None
    return subnet
