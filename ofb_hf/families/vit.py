"""The ViT family (ViT, DeiT): what a search needs to know about it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..models.configuration_ofb_vit import OFBViTConfig
from ..models.modeling_ofb_vit import OFBViTForImageClassification, TokenReduction
from .bases import WITHOUT_HEAD, Bases, HeadBasis, NormReaders, StreamBasis
from .blocks import Block, common_scale, linear_slots, norm_slots
from .description import (
    Architecture,
    Attributes,
    Family,
    Part,
    Sizes,
    Slot,
    StockTwin,
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


def _block(config: ViTConfig, layer: int) -> Block:
    return Block(f"{LAYERS}.{layer}", f"layers.{layer}", _layer_sizes(config, layer))


def _blocks(config: ViTConfig) -> list[Block]:
    return [_block(config, layer) for layer in range(config.num_hidden_layers)]


def _grid(config: ViTConfig) -> tuple[int, int]:
    """Return the patches of an image, (rows, columns)."""
    height, width = image_sides(config)
    patch = square_patch(config)
    return height // patch, width // patch


def _is_ours(config: ViTConfig) -> bool:
    """Return whether a config is one of this package; `trust_remote_code` loads another class."""
    return config.model_type == OFBViTConfig.model_type


def _layer_sizes(config: ViTConfig, layer: int) -> dict[str, int]:
    """Return heads, channels per head and MLP width of a layer, of a stock config as well."""
    if _is_ours(config):
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
    submodules = [_residual_width(config)]
    for block in _blocks(config):
        submodules += block.submodules()
    return Architecture(
        submodules=tuple(submodules),
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
    for block in _blocks(config):
        slots += block.residual_slots
        norms += block.norms
    return Submodule(WIDTH, "embedding", (config.hidden_size,), tuple(slots), tuple(norms))


def _schedule(config: ViTConfig) -> list[tuple[int, int]]:
    """Return the tokens of each layer after dropping and after merging."""
    layers = range(config.num_hidden_layers)
    if _is_ours(config):
        return [config.token_counts(layer)[1:] for layer in layers]
    tokens = math.prod(_grid(config)) + 1  # patches and the class token
    return [(tokens, tokens) for _ in layers]


def _parts(config: ViTConfig, schedule: Sequence[Sequence[Any]]) -> tuple[Part, ...]:
    """Return the forward parts under a token schedule; see `TokenReductions.parts`."""
    patches = math.prod(_grid(config))
    pixels = config.num_channels * square_patch(config) ** 2
    # The class token and the positions are added, not multiplied.
    parts = [end_part("stem", WIDTH, patches * pixels)]
    before = patches + 1  # the class token
    weighs = False
    for layer, (kept, merged) in enumerate(schedule):
        parts += _layer_parts(layer, before, kept, merged, weighs)
        before = merged
        weighs = weighs | (merged < kept)
    parts.append(end_part("head", WIDTH, config.num_labels))
    return tuple(parts)


def _layer_parts(
    layer: int,
    before: Any,
    kept: Any,
    merged: Any,
    weighs: Any,
) -> tuple[Part, ...]:
    """Return the forward parts of one layer; see `TokenReductions.layer_parts`."""
    return reducing_block(WIDTH, f"layers.{layer}", before, kept, merged, weighs)


def _params(config: ViTConfig) -> tuple[Term, ...]:
    pixels = config.num_channels * square_patch(config) ** 2
    tokens = math.prod(_grid(config)) + 1
    # Of each residual channel: patch projection with bias, class token, positions, LayerNorm,
    # classifier.
    per_channel = (pixels + 1) + 1 + tokens + 2 + config.num_labels
    params = [Term(per_channel, (WIDTH,)), Term(config.num_labels)]
    for block in _blocks(config):
        params += block.params(WIDTH, config.qkv_bias)
    return tuple(params)


# ---------------------------------------------------------------------------------------- resizing


def _pin(config: OFBViTConfig) -> None:
    """Write into the config what it derives from widths that are about to change."""
    if config.attention_scale is None:
        layers = range(config.num_hidden_layers)
        head_dims = [config.layer_sizes(layer)["head_dim"] for layer in layers]
        config.attention_scale = common_scale("head_dim_per_layer", head_dims, "attention_scale")
    _resize(config, _describe(config).sizes)


def _resize(config: OFBViTConfig, sizes: Sizes) -> None:
    """Write submodule sizes into the config."""
    attentions = [sizes[block.attention] for block in _blocks(config)]
    mlps = [sizes[block.mlp] for block in _blocks(config)]
    config.hidden_size = sizes[WIDTH][0]
    config.num_attention_heads_per_layer = [heads for heads, _ in attentions]
    config.head_dim_per_layer = [channels for _, channels in attentions]
    config.intermediate_size_per_layer = [units for (units,) in mlps]


def _attributes(config: OFBViTConfig) -> Attributes:
    """Return what modules store next to their weights."""
    attributes: Attributes = {}
    for layer, block in enumerate(_blocks(config)):
        attributes |= block.attributes
        # A config that got a token schedule later needs its reductions, too.
        before, kept, merged = config.token_counts(layer)
        reduction = TokenReduction(kept, merged) if merged < before else None
        attributes[block.path][REDUCTION] = reduction
    return attributes


# ------------------------------------------------------------------------------------------- others


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a classifier in order."""
    return model.get_submodule(LAYERS)


def _query_parameters(layer: int) -> list[str]:
    """Return the names of the tensors that make queries out of a layer's tokens."""
    path = f"{LAYERS}.{layer}.attention.q_proj"
    return [slot.parameter for slot in linear_slots(path, 0)]


def _with_layers(state: dict[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    """Return the state of a ViT that has these layers only, renumbered from 0."""
    numbers = {str(old): new for new, old in enumerate(layers)}
    prefix = f"{LAYERS}."
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            renamed[name] = tensor
            continue
        old, _, rest = name.removeprefix(prefix).partition(".")
        if old in numbers:
            renamed[f"{prefix}{numbers[old]}.{rest}"] = tensor
    return renamed


def _only_logits(pixel_values: Tensor) -> dict[str, Any]:
    """Return the argument with which a classifier computes the tokens that logits follow from.

    Args:
        pixel_values: (B, C, H, W).
    """
    # (B, 1), the number of the class token: logits are computed from that token only
    wanted = torch.zeros(len(pixel_values), 1, dtype=torch.long, device=pixel_values.device)
    return {"wanted": wanted}


def _bases(config: ViTConfig) -> Bases:
    """Return what may change its basis: all heads and the one residual stream."""
    heads: list[HeadBasis] = []
    writers = [PATCH_PROJECTION]
    norms: list[NormReaders] = []
    for block in _blocks(config):
        heads += block.head_bases
        writers += block.writers
        norms += block.norm_readers()
    stream = StreamBasis(
        name=WIDTH,
        writers=tuple(writers),
        tensors=(f"{EMBEDDINGS}.cls_token", f"{EMBEDDINGS}.position_embeddings", MASK_TOKEN),
        norms=(*norms, NormReaders(NORM, (CLASSIFIER,))),
    )
    if not config.num_labels:
        return Bases(tuple(heads), streams=(), fixed={WIDTH: WITHOUT_HEAD})
    return Bases(heads=tuple(heads), streams=(stream,), fixed={})


VIT = Family(
    stock_class=ViTForImageClassification,
    model_class=OFBViTForImageClassification,
    describe=_describe,
    pin=_pin,
    resize=_resize,
    attributes=_attributes,
    undecayed=("_token", "position_embeddings"),
    bases=_bases,
    tokens=TokenReductions(parts=_parts, layer_parts=_layer_parts, layers=_layers),
    stock_twin=StockTwin(
        sizes=("num_attention_heads", "head_dim", "intermediate_size"),
        query_parameters=_query_parameters,
        with_layers=_with_layers,
    ),
    only_logits=_only_logits,
)
