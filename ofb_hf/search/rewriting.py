"""Rewrite a network before it is searched: which images are looked at, and one result on all ranks.

`pruning/equivalent_basis.py` has the mathematics.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from ..frozen.compression import frozen_space
from ..pruning.equivalent_basis import equivalent_basis
from ..space.configuration import BiMaskConfig, default_config
from ..training.arguments import OFBTrainingArguments
from ..training.classifier import BatchAugmentation
from .supernet import install_bi_masks

# Images whose second moments give the basis, and how many of any are computed together.
BASIS_IMAGES = 256
BATCH = 32


def as_bi_masks(config: BiMaskConfig, model_config: PreTrainedConfig) -> BiMaskConfig:
    """Return a search of the network as it is given, over the sizes that `config` can choose.

    It needs no images, so it tells before any is read what a network and a budget allow.

    Raises:
        ValueError: for residual widths to choose from where none can be cut.
    """
    if not config.chooses_first or not config.search_embedding:
        return config.as_given()
    if any(space.kind == "embedding" for space in frozen_space(config, model_config, config.basis)):
        return config.as_given()
    if config.embedding_candidates:
        raise ValueError(
            f"embedding_candidates is {config.embedding_candidates}, but in basis {config.basis!r} "
            f"error curves cut no residual width of a {type(model_config).__name__}; leave it out, "
            "or give preset='bi_mask'."
        )
    return replace(config.as_given(), search_embedding=False, smallest_share=None)


def in_basis(
    model: PreTrainedModel,
    config: BiMaskConfig | None,
    args: OFBTrainingArguments,
    *,
    train_dataset: Any = None,
    calibration_dataset: Any = None,
    batch_augmentation: BatchAugmentation | None = None,
    **others: Any,
) -> PreTrainedModel:
    """Return a classifier in the basis that a search is to begin with.

    Args:
        model: a classifier, stock or ours; it stays as it is.
        config: of the search; None = the default.
        args: of the run. Random numbers begin with its seed again after images were read.
        train_dataset, calibration_dataset, batch_augmentation: as for `OFBTrainer`, whose other
            arguments are ignored.

    Returns:
        `model` itself if it is to be searched as it is.

    Raises:
        ValueError: without images, and, before any are read, as `install_bi_masks`.
    """
    if config is None:
        config = default_config(model.config)
    if config.basis == "given":
        return model
    install_bi_masks(model, as_bi_masks(config, model.config))
    if calibration_dataset is not None:
        train_dataset, batch_augmentation = calibration_dataset, None
    if train_dataset is None:
        raise ValueError(
            f"basis is {config.basis!r}, but there is no train_dataset with images to find it by; "
            'give one, or basis="given".'
        )
    images = images_for_basis(train_dataset, args, batch_augmentation)
    result = rewritten(model, images, config.basis, args)
    # The masks start as they do where no images are read.
    set_seed(args.seed)
    return result


def rewritten(
    model: PreTrainedModel, batches: Iterable[Tensor], basis: str, args: OFBTrainingArguments
) -> PreTrainedModel:
    """Return a copy of a classifier in another basis, bit for bit the same on all ranks.

    Args:
        model: a classifier, stock or ours; it stays as it is.
        batches: images (B, channels, height, width), the same on all ranks, which share the work.
        basis: "heads" or "equivalent".
        args: of the run, for its device and ranks.

    Returns:
        A classifier of this package, on the device and in the training mode of `model`.
    """
    moved = copy.deepcopy(model).to(args.device)
    result = equivalent_basis(moved, batches, streams=basis == "equivalent")
    if args.world_size > 1:
        # Eigenvectors may differ on other hardware, in their signs for example.
        for tensor in result.state_dict().values():
            tensor.copy_(broadcast(tensor.clone()))
    return result.to(model.device).train(model.training)


def images_for_basis(
    dataset: Any,
    args: OFBTrainingArguments,
    batch_augmentation: BatchAugmentation | None = None,
    count: int = BASIS_IMAGES,
) -> Iterator[Tensor]:
    """Yield batches of images of a data set, (B, channels, height, width), the same on all ranks.

    Args:
        dataset: rows of {"pixel_values", "labels"}, by index, one after the other, or, as
            `ofb_hf.data.ImageStream`, with a loader of its own.
        args: of the run. Its seed says which images are taken where they have an index.
        batch_augmentation: what a training does with its batches, if images are no numbers that a
            model takes before that.
        count: of images, at most.
    """
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for batch in _batches(dataset, args, count):
        pixel_values = batch["pixel_values"].to(args.device)
        if batch_augmentation is not None:
            labels = batch["labels"].to(args.device)
            pixel_values, _ = batch_augmentation(pixel_values, labels, generator)
        yield pixel_values


def _batches(dataset: Any, args: OFBTrainingArguments, count: int) -> Iterator[dict[str, Tensor]]:
    """Yield up to `count` rows of a data set, in batches, at least one for each process."""
    if hasattr(dataset, "loader"):
        # As one process reads it, so that all of them see the same.
        size = max(1, min(BATCH, len(dataset) // args.world_size))
        yield from islice(dataset.loader(size), count // size)
        return
    size = BATCH
    if hasattr(dataset, "__len__"):
        size = max(1, min(BATCH, len(dataset) // args.world_size))
    rows = _rows(dataset, args.seed, count)
    while together := list(islice(rows, size)):
        yield default_collate(together)


def _rows(dataset: Any, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield up to `count` rows, drawn at random where they have an index."""
    # A data set of torch that is read in order has a `__getitem__` as well, which refuses.
    in_order = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if in_order:
        rows = islice(dataset, count)
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(dataset), generator=generator)[:count]
        rows = (dataset[index] for index in drawn.tolist())
    for row in rows:
        yield {name: row[name] for name in ("pixel_values", "labels")}
