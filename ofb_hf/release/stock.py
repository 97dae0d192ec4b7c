"""Stock twin of a compressed model: transformers' own class, padded with zeros to equal widths.

The family of a model says whether its classifiers have one (`Family.stock_twin`); ViT's have.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.description import Family, StockTwin
from ..families.loading import rebuild_classifier
from ..families.registry import FAMILIES, describe, family_of, is_ours
from ..pruning.surgery import Entries, unit_group_plan

NOT_STOCK = {
    # Fields of our config only, besides one list for each width.
    "attention_scale",
    "token_schedule",
    "basis",
    # Fields that describe our class, or that transformers fills in.
    "model_type",
    "architectures",
    "transformers_version",
    "auto_map",
    "dtype",
}


def pad_to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Return a stock classifier that computes what `model` does.

    Every attention gets the most heads of all layers, every MLP the largest width. The padding is
    zero and changes no output, but it costs its MACs. Where all layers are equally wide (a search
    with `uniform_across_layers=True`) there is none. Layers without attention and MLP are removed,
    so the stock model has fewer layers and fewer hidden states.

    A stock head scales its logits by its own width, a head of this package by the width of the
    dense model's heads. Padded heads get the latter width; where nothing is padded, the ratio is
    multiplied into the queries.

    Args:
        model: a classifier of this package whose family has stock twins.

    Returns:
        A classifier in eval mode, on the CPU, with the dtype of `model`. Logits are equal up to
        rounding, plus one rounding of `model`'s dtype where queries are multiplied.

    Raises:
        TypeError: for other classes; a stock Swin, for example, cannot have these widths.
        ValueError: for a model with a `token_schedule`, which a stock model would not follow.
    """
    family = _family_with_twins(model)
    if family is None:
        able = [each.model_class.__name__ for each in FAMILIES.values() if each.stock_twin]
        raise TypeError(
            f"got a {type(model).__name__}; only {' and '.join(able)} can be padded to a stock "
            "checkpoint. Load others with ofb_hf, or with trust_remote_code=True."
        )
    if not has_stock_twin(model):
        raise ValueError(
            "the model has a token_schedule, which transformers' own class would not follow: it "
            "would keep all tokens and cost more. Load the model with ofb_hf, or with "
            "trust_remote_code=True."
        )
    twin = family.stock_twin
    model = _without_empty_layers(model, twin)
    config = model.config
    sizes = _layer_sizes(config)
    widest = _widest(config, sizes, twin)

    fields = config.to_dict()
    for name in (*NOT_STOCK, *(f"{name}_per_layer" for name in twin.sizes)):
        fields.pop(name, None)
    fields |= widest
    stock_config = family.stock_class.config_class
    stock = stock_config(**fields, attn_implementation=config._attn_implementation)
    padded = family.stock_class(stock).to(model.dtype)
    state = _padded_state(model, padded)

    for layer, size in enumerate(sizes):
        scale = config.attention_scale
        if scale is None:
            scale = (size["head_dim"] or 1) ** -0.5
        for name in twin.query_parameters(layer):
            if name in state:  # the bias is optional
                # A stock model multiplies logits by head_dim ** -0.5.
                state[name] = state[name] * (scale * widest["head_dim"] ** 0.5)
    padded.load_state_dict(state)
    padded.config.dtype = config.dtype
    return padded.eval()


def has_stock_twin(model: PreTrainedModel) -> bool:
    """Return whether `pad_to_stock` takes the model."""
    schedule = getattr(model.config, "token_schedule", None)
    return _family_with_twins(model) is not None and schedule is None


def _family_with_twins(model: PreTrainedModel) -> Family | None:
    """Return the family of one of our classifiers, None if it has no stock twins."""
    if not is_ours(model):
        return None
    family = family_of(model.config)
    return None if family.stock_twin is None else family


def _layer_sizes(config: PreTrainedConfig) -> list[dict[str, int]]:
    return [config.layer_sizes(layer) for layer in range(config.num_hidden_layers)]


def _widest(
    config: PreTrainedConfig, sizes: list[dict[str, int]], twin: StockTwin
) -> dict[str, int]:
    """Return the sizes of all layers of the stock model."""
    widest = {}
    for name in twin.sizes:
        in_layers = [size[name] for size in sizes]
        widest[name] = max([1, *in_layers])  # a stock layer has at least one of each
    if config.attention_scale:
        # Heads of this width have that scale in a stock model. Where something is padded anyway,
        # queries then stay as they are.
        head_dim = round(config.attention_scale**-2)
        is_padded = any(size != widest for size in sizes)
        if is_padded and head_dim > widest["head_dim"]:
            widest["head_dim"] = head_dim
    return widest


def _without_empty_layers(model: PreTrainedModel, twin: StockTwin) -> PreTrainedModel:
    """Return the same model without the layers that have neither attention nor MLP."""
    sizes = _layer_sizes(model.config)
    layers = [layer for layer, size in enumerate(sizes) if any(size.values())]
    if len(layers) == len(sizes):
        return model
    config = copy.deepcopy(model.config)
    for name in twin.sizes:
        remaining = [sizes[layer][name] for layer in layers]
        setattr(config, f"{name}_per_layer", remaining)
    config.num_hidden_layers = len(layers)
    return rebuild_classifier(model, config, twin.with_layers(model.state_dict(), layers))


def _padded_state(model: PreTrainedModel, padded: PreTrainedModel) -> dict[str, Tensor]:
    """Return tensors for `padded`: zeros, with `model`'s in the first units of every submodule."""
    large = describe(padded.config)
    small = describe(model.config)
    # As if `model` had been sliced from `padded`, keeping the first units along each axis.
    kept = {}
    for name, shape in small.sizes.items():
        large_shape = torch.Size(large.sizes[name])
        units = torch.arange(large_shape.numel()).reshape(large_shape)
        first = tuple(slice(size) for size in shape)
        kept[name] = units[first].flatten()
    zeros = padded.state_dict()
    plan = unit_group_plan(large.submodules, kept, set(zeros))
    tensors = model.state_dict()
    state = {}
    for name, tensor in zeros.items():
        if name in tensors:
            state[name] = _unslice(tensors[name].cpu(), plan.get(name, ()), tensor.shape)
        else:  # of a submodule that the model does not have
            state[name] = torch.zeros_like(tensor)
    return state


def _unslice(tensor: Tensor, entries: Entries, shape: torch.Size) -> Tensor:
    """Return the tensor of this shape, zero elsewhere, of which `tensor` is a slice.

    Args:
        tensor: the slice.
        entries: (axis, kept indices), ...
        shape: of the result.
    """
    for axis, indices in entries:
        wider_shape = list(tensor.shape)
        wider_shape[axis] = shape[axis]
        tensor = tensor.new_zeros(wider_shape).index_copy(axis, indices, tensor)
    return tensor
