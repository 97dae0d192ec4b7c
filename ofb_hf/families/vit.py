"""The ViT family (ViT, DeiT): what a search needs to know about it."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..models.configuration_ofb_vit import OFBViTConfig
from ..models.modeling_ofb_vit import OFBViTForImageClassification, TokenReduction
from .blocks import (
    block_attributes,
    block_norms,
    block_params,
    block_residual_slots,
    block_submodules,
    common_scale,
    linear_slots,
    norm_slots,
)
from .description import (
    Architecture,
    Family,
    Part,
    Slot,
    Submodule,
    Term,
    TokenReductions,
    image_sides,
    square_patch,
)
from .forward_parts import REDUCTION, end_part, reducing_block

LAYERS = "vit.layers"
EMBEDDINGS = "vit.embeddings"
PATCH_PROJECTION = f"{EMBEDDINGS}.patch_embeddings.projection"
MASK_TOKEN = f"{EMBEDDINGS}.mask_token"
NORM = "vit.layernorm"
CLASSIFIER = "classifier"
WIDTH = "embeddings"  # the one submodule of the residual stream


# ------------------------------------------------------------------------------------------- sizes


def _path(layer: int) -> str:
    """Return where a layer is in the model."""
    return f"{LAYERS}.{layer}"


def _name(layer: int) -> str:
    """Return how the names of a layer's submodules begin."""
    return f"layers.{layer}"


def _grid(config: ViTConfig) -> tuple[int, int]:
    """Return the patches of an image, (rows, columns)."""
    height, width = image_sides(config)
    patch = square_patch(config)
    return height // patch, width // patch


def _layer_sizes(config: ViTConfig, layer: int) -> dict[str, int]:
    """Return heads, channels per head and MLP width of a layer, of a stock config as well."""
    if isinstance(config, OFBViTConfig):
        return config.layer_sizes(layer)
    # As the stock model does: a `head_dim` that is not a declared field counts.
    head_dim = getattr(config, "head_dim", None)
    return {
        "num_attention_heads": config.num_attention_heads,
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
    }


# ------------------------------------------------------------------------------------- description


def _describe(config: ViTConfig) -> Architecture:
    grid, patch = _grid(config), square_patch(config)
    blocks: list[Submodule] = []
    for layer in range(config.num_hidden_layers):
        blocks += block_submodules(_path(layer), _name(layer), _layer_sizes(config, layer))
    return Architecture(
        submodules=(_residual_width(config), *blocks),
        parts=_parts(config, _schedule(config)),
        params=_params(config),
        patch_grid=grid,
        patch_size=patch,
        token_grid=grid,
        token_size=patch,
        num_channels=config.num_channels,
        first_width=WIDTH,
        last_width=WIDTH,
        mask_token=MASK_TOKEN,
        activation=config.hidden_act,
    )


def _residual_width(config: ViTConfig) -> Submodule:
    """Return the submodule whose units are the channels of the residual stream."""
    slots = [
        *linear_slots(PATCH_PROJECTION, 0, gated=True),
        Slot(f"{EMBEDDINGS}.cls_token", 2, gated=True),
        Slot(f"{EMBEDDINGS}.position_embeddings", 2, gated=True),
        Slot(MASK_TOKEN, 2, gated=True),
        *norm_slots(NORM),
        *linear_slots(CLASSIFIER, 1),
    ]
    norms = [NORM]
    for layer in range(config.num_hidden_layers):
        slots += block_residual_slots(_path(layer))
        norms += block_norms(_path(layer), _layer_sizes(config, layer))
    return Submodule(WIDTH, "embedding", (config.hidden_size,), tuple(slots), tuple(norms))


def _schedule(config: ViTConfig) -> list[tuple[int, int]]:
    """Return the tokens of each layer after dropping and after merging."""
    layers = range(config.num_hidden_layers)
    if isinstance(config, OFBViTConfig):
        return [config.token_counts(layer)[1:] for layer in layers]
    tokens = math.prod(_grid(config)) + 1  # patches and the class token
    return [(tokens, tokens) for _ in layers]


def _parts(config: ViTConfig, schedule: Sequence[Sequence[Any]]) -> tuple[Part, ...]:
    """Return the forward parts under a token schedule; see `TokenReductions.parts`."""
    patches = math.prod(_grid(config))
    pixels = config.num_channels * square_patch(config) ** 2
    parts = [end_part("stem", WIDTH, patches * pixels)]
    before = patches + 1  # the class token
    weighs = False
    for layer, (kept, merged) in enumerate(schedule):
        parts += _layer_parts(config, layer, before, kept, merged, weighs)
        before = merged
        weighs = weighs | (merged < kept)
    parts.append(end_part("head", WIDTH, config.num_labels))
    return tuple(parts)


def _layer_parts(
    config: ViTConfig, layer: int, before: Any, kept: Any, merged: Any, weighs: Any
) -> tuple[Part, ...]:
    """Return the forward parts of one layer; see `TokenReductions.layer_parts`."""
    return reducing_block(WIDTH, _name(layer), before, kept, merged, weighs)


def _params(config: ViTConfig) -> tuple[Term, ...]:
    pixels = config.num_channels * square_patch(config) ** 2
    tokens = math.prod(_grid(config)) + 1
    # Of each residual channel: patch projection with bias, class token, positions, LayerNorm,
    # classifier.
    per_channel = (pixels + 1) + 1 + tokens + 2 + config.num_labels
    params = [Term(per_channel, (WIDTH,)), Term(config.num_labels)]
    for layer in range(config.num_hidden_layers):
        name = _name(layer)
        params += block_params(WIDTH, f"{name}.attention", f"{name}.mlp", config.qkv_bias)
    return tuple(params)


# ---------------------------------------------------------------------------------------- resizing


def _pin(config: OFBViTConfig) -> None:
    """Write into the config what it derives from widths that are about to change."""
    if config.attention_scale is None:
        layers = range(config.num_hidden_layers)
        head_dims = [config.layer_sizes(layer)["head_dim"] for layer in layers]
        config.attention_scale = common_scale("head_dim_per_layer", head_dims, "attention_scale")
    _resize(config, _describe(config).sizes)


def _resize(config: OFBViTConfig, sizes: dict[str, tuple[int, ...]]) -> None:
    """Write submodule sizes into the config."""
    names = [_name(layer) for layer in range(config.num_hidden_layers)]
    config.hidden_size = sizes[WIDTH][0]
    config.num_attention_heads_per_layer = [sizes[f"{name}.attention"][0] for name in names]
    config.head_dim_per_layer = [sizes[f"{name}.attention"][1] for name in names]
    config.intermediate_size_per_layer = [sizes[f"{name}.mlp"][0] for name in names]


def _attributes(config: OFBViTConfig) -> dict[str, dict[str, Any]]:
    """Return what modules store next to their weights."""
    attributes: dict[str, dict[str, Any]] = {}
    for layer in range(config.num_hidden_layers):
        attributes |= block_attributes(_path(layer), config.layer_sizes(layer))
        before, kept, merged = config.token_counts(layer)
        reduction = TokenReduction(kept, merged) if merged < before else None
        attributes[_path(layer)][REDUCTION] = reduction
    return attributes


# ------------------------------------------------------------------------------------------- others


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a classifier in order."""
    return model.get_submodule(LAYERS)


def query_parameters(layer: int) -> list[str]:
    """Return the names of the tensors that make queries out of a layer's tokens."""
    return [slot.parameter for slot in linear_slots(f"{_path(layer)}.attention.q_proj", 0)]


def with_layers(state: dict[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    """Return the state of a ViT that has these layers only, renumbered from 0."""
    renamed = {name: tensor for name, tensor in state.items() if not name.startswith(f"{LAYERS}.")}
    for new, old in enumerate(layers):
        prefix = f"{_path(old)}."
        for name, tensor in state.items():
            if name.startswith(prefix):
                renamed[f"{_path(new)}.{name.removeprefix(prefix)}"] = tensor
    return renamed


VIT = Family(
    stock_class=ViTForImageClassification,
    model_class=OFBViTForImageClassification,
    describe=_describe,
    pin=_pin,
    resize=_resize,
    attributes=_attributes,
    undecayed=("_token", "position_embeddings"),
    tokens=TokenReductions(parts=_parts, layer_parts=_layer_parts, layers=_layers),
)
