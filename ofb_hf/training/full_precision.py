"""Training from float32 where a checkpoint stores half of it.

transformers loads a checkpoint in the type that it is stored in. In bfloat16 most updates are
smaller than the distance to the next number and get lost; in float16 gradients overflow.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

HALF = (torch.float16, torch.bfloat16)


def learns_in_half(model: nn.Module) -> bool:
    """Return whether a parameter that learns is of a type too coarse for that."""
    # Those that rest may stay as they are, as below adapters.
    return _half_of(model) is not None


def _half_of(model: nn.Module) -> torch.dtype | None:
    """Return the type of a parameter that learns in half precision, None if none does."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            return parameter.dtype
    return None


def to_full_precision_(model: nn.Module) -> None:
    """Turn a model that would learn in half precision into float32, and say so.

    Its parameters stay the same objects.
    """
    stored = _half_of(model)
    if stored is None:
        return
    name = str(stored).removeprefix("torch.")
    logger.warning(
        f"weights are stored in {name}, in which small updates get lost: they are trained in "
        f"float32. The result of a search or of a command is of the stored type again; another "
        f"model is by model.to(torch.{name})."
    )
    model.float()


def in_full_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that can learn: itself, or a copy in float32."""
    if not learns_in_half(model):
        return model
    model = copy.deepcopy(model)
    to_full_precision_(model)
    return model


def of_type(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose weights are of a type: itself, or a copy."""
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
