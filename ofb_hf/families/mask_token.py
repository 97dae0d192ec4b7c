"""The embedding that stands in for hidden patches, which most classifiers lack."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .registry import describe


def add_mask_token_(model: PreTrainedModel) -> None:
    """Give a classifier a mask token of zeros, unless it owns one."""
    architecture = describe(model.config)
    if architecture.owns_mask_token:
        return
    # It enters where patches enter, and learns from 0 on.
    width = architecture.sizes[architecture.first_width][0]
    zeros = torch.zeros(1, 1, width, dtype=model.dtype, device=model.device)
    _set(model, architecture.mask_token, nn.Parameter(zeros))


def mask_token_of(model: PreTrainedModel) -> nn.Parameter:
    """Return the mask token of a classifier, after `add_mask_token_`."""
    return model.get_parameter(describe(model.config).mask_token)


def drop_mask_token_(model: PreTrainedModel) -> None:
    """Take the mask token that `add_mask_token_` added away again."""
    architecture = describe(model.config)
    if not architecture.owns_mask_token:
        _set(model, architecture.mask_token, None)


def _set(
    model: PreTrainedModel,
    parameter: str,
    value: nn.Parameter | None,
) -> None:
    owner, _, name = parameter.rpartition(".")
    setattr(model.get_submodule(owner), name, value)
