"""A compressed ViT as a checkpoint of the stock class, for those without us: padded with zeros
where widths differ."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..families.loading import rebuild_classifier
from ..families.registry import describe
from ..families.vit import query_parameters, with_layers
from ..models import OFBViTForImageClassification
from ..pruning.surgery import Entries, unit_group_plan

SIZES = ("num_attention_heads", "head_dim", "intermediate_size")
# Fields that only our config has, and those that from_pretrained derives.
NOT_STOCK = (*(f"{name}_per_layer" for name in SIZES), "attention_scale")
NOT_STOCK += (
    "token_schedule",
    "model_type",
    "architectures",
    "transformers_version",
    "auto_map",
    "dtype",
)


def pad_to_stock(model: PreTrainedModel) -> ViTForImageClassification:
    """A stock ViT classifier that computes what `model` does.

    Every attention gets the most heads of all layers, every MLP the largest width. What is added is
    zero, and adds nothing; it costs its MACs all the same. Where all layers are equally wide (a
    search of a model with equal layers and `uniform_across_layers=True`), nothing is added. Layers
    without attention and MLP are left out: the stock model has as many fewer, and its hidden states
    do not repeat what these passed on. Stock heads scale their logits by their own width, ours by
    that of the dense model's heads: padded heads get that width, others have the difference
    multiplied into their queries.

    Args:
        model: an `OFBViTForImageClassification`.

    Returns:
        A `ViTForImageClassification` in eval mode, with the dtype of `model`, on the CPU. Logits
        equal up to rounding, which is once more that of `model`'s dtype where queries are
        multiplied.

    Raises:
        TypeError: for other classes; stock Swin has no place for our widths.
        ValueError: for a model with a `token_schedule`, which a stock model would not follow.
    """
    if not isinstance(model, OFBViTForImageClassification):
        raise TypeError(
            f"got a {type(model).__name__}; only OFBViTForImageClassification can be padded to a "
            f"stock checkpoint. "
            "Load others with ofb_hf, or with trust_remote_code=True."
        )
    if not has_stock_twin(model):
        raise ValueError(
            "the model has a token_schedule, which transformers' own class would not follow: it "
            "would keep all tokens "
            "and cost more. Load it with ofb_hf, or with trust_remote_code=True."
        )
    model = _without_empty_layers(model)
    config, layers = model.config, range(model.config.num_hidden_layers)
    sizes = [config.layer_sizes(layer) for layer in layers]
    widest = {name: max([1, *(size[name] for size in sizes)]) for name in SIZES}
    implied = round(config.attention_scale**-2) if config.attention_scale else 0
    if any(size != widest for size in sizes) and implied > widest["head_dim"]:
        # there is padding anyway, and with this width queries stay as they are
        widest["head_dim"] = implied
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_STOCK}
    stock = ViTConfig(**(fields | widest), attn_implementation=config._attn_implementation)
    padded = ViTForImageClassification(stock).to(model.dtype)
    state = _scatter(model, padded)
    for layer, size in zip(layers, sizes, strict=True):
        scale = (
            (size["head_dim"] or 1) ** -0.5
            if config.attention_scale is None
            else config.attention_scale
        )
        for name in query_parameters(layer):
            if name in state:  # the bias may not be
                state[name] = state[name] * (scale * widest["head_dim"] ** 0.5)
    padded.load_state_dict(state)
    padded.config.dtype = config.dtype
    return padded.eval()


def has_stock_twin(model: PreTrainedModel) -> bool:
    """Whether `pad_to_stock` takes the model."""
    return isinstance(model, OFBViTForImageClassification) and model.config.token_schedule is None


def _without_empty_layers(model: OFBViTForImageClassification) -> OFBViTForImageClassification:
    """The same model without the layers that have neither attention nor MLP."""
    config = copy.deepcopy(model.config)
    sizes = [config.layer_sizes(layer) for layer in range(config.num_hidden_layers)]
    layers = [layer for layer, size in enumerate(sizes) if any(size.values())]
    if len(layers) == len(sizes):
        return model
    for name in SIZES:
        setattr(config, f"{name}_per_layer", [sizes[layer][name] for layer in layers])
    config.num_hidden_layers = len(layers)
    return rebuild_classifier(model, config, with_layers(model.state_dict(), layers))


def _scatter(model: PreTrainedModel, padded: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of `padded`: zeros, and those of `model` at the first units of every
    submodule."""
    large, small = describe(padded.config), describe(model.config)
    kept = {}
    for name, shape in small.sizes.items():
        full = torch.arange(torch.tensor(large.sizes[name]).prod()).reshape(large.sizes[name])
        kept[name] = full[tuple(slice(size) for size in shape)].flatten()
    state, ours = padded.state_dict(), model.state_dict()
    plan = unit_group_plan(large.submodules, kept, set(state))
    return {
        name: _unslice(ours[name].cpu(), plan.get(name, ()), zero.shape)
        if name in ours
        else torch.zeros_like(zero)
        for name, zero in state.items()
    }


def _unslice(tensor: Tensor, entries: Entries, shape: torch.Size) -> Tensor:
    """The tensor of a shape, zero elsewhere, whose slice this one is."""
    for axis, indices in entries:
        wider = tensor.new_zeros([*tensor.shape[:axis], shape[axis], *tensor.shape[axis + 1 :]])
        tensor = wider.index_copy(axis, indices, tensor)
    return tensor
