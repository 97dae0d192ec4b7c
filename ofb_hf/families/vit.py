"""The ViT family (ViT, DeiT): what a search needs to know about it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import (
    ViTConfig,
)

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
    image_sides,
    square_patch,
)
from .forward_parts import REDUCTION, end_part, reducing_block

VIT_LAYERS = "vit.layers"


def _vit_grid(config: ViTConfig) -> tuple[int, int]:
    """Patches of an image, (rows, columns)."""
    (height, width), patch = image_sides(config), square_patch(config)
    return height // patch, width // patch


def _describe_vit(config: ViTConfig) -> Architecture:
    grid, patch = _vit_grid(config), square_patch(config)
    pixels, tokens, layers = (
        config.num_channels * patch**2,
        grid[0] * grid[1] + 1,
        range(config.num_hidden_layers),
    )
    is_ours = isinstance(config, OFBViTConfig)
    layer_sizes = OFBViTConfig.layer_sizes if is_ours else _dense_vit_layer_sizes
    schedule = [config.token_counts(layer)[1:] if is_ours else (tokens, tokens) for layer in layers]

    residual = [
        *linear_slots("vit.embeddings.patch_embeddings.projection", 0, gated=True),
        *(
            Slot(f"vit.embeddings.{name}", 2, gated=True)
            for name in ("cls_token", "position_embeddings", "mask_token")
        ),
        *norm_slots("vit.layernorm"),
        *linear_slots("classifier", 1),
    ]
    norms, submodules = ["vit.layernorm"], []
    params = [
        Term(pixels + 1 + 1 + tokens + 2 + config.num_labels, ("embeddings",)),
        Term(config.num_labels),
    ]
    for layer in layers:
        path, name, sizes = _vit_layer(layer), f"layers.{layer}", layer_sizes(config, layer)
        attention, mlp = block_submodules(path, name, sizes)
        submodules += [attention, mlp]
        residual += block_residual_slots(path)
        norms += block_norms(path, sizes)
        params += block_params("embeddings", attention.name, mlp.name, config.qkv_bias)
    embedding = Submodule(
        "embeddings", "embedding", (config.hidden_size,), tuple(residual), tuple(norms)
    )
    return Architecture(
        submodules=(embedding, *submodules),
        parts=vit_parts(config, schedule),
        params=tuple(params),
        patch_grid=grid,
        patch_size=patch,
        token_grid=grid,
        token_size=patch,
        num_channels=config.num_channels,
        first_width="embeddings",
        last_width="embeddings",
        embeddings="vit.embeddings",
        activation=config.hidden_act,
    )


def vit_parts(config: ViTConfig, schedule: Sequence[Sequence[Any]]) -> tuple[Part, ...]:
    """The parts of a ViT classifier under a token schedule whose counts do not rise; they may be
    scalar tensors."""
    patches = math.prod(_vit_grid(config))
    parts = [
        end_part("stem", "embeddings", patches * config.num_channels * square_patch(config) ** 2)
    ]
    before, weighs = patches + 1, False
    for layer, (kept, merged) in enumerate(schedule):
        parts += vit_layer_parts(layer, before, kept, merged, weighs)
        before, weighs = merged, weighs | (merged < kept)
    return (*parts, end_part("head", "embeddings", config.num_labels))


def vit_layer_parts(
    layer: int, before: Any, kept: Any, merged: Any, weighs: Any
) -> tuple[Part, ...]:
    """The parts of one of its layers; counts as for `reducing_block`."""
    return reducing_block("embeddings", f"layers.{layer}", before, kept, merged, weighs)


def scheduled(config: ViTConfig, schedule: Sequence[Sequence[int]]) -> Architecture:
    """The architecture of a ViT under another token schedule than its own."""
    return replace(_describe_vit(config), parts=vit_parts(config, schedule))


def _vit_layer(layer: int) -> str:
    return f"{VIT_LAYERS}.{layer}"


def vit_query_parameters(layer: int) -> tuple[str, ...]:
    """The tensors that make a ViT layer's queries out of its tokens."""
    return tuple(
        slot.parameter for slot in linear_slots(f"{_vit_layer(layer)}.attention.q_proj", 0)
    )


def with_vit_layers(state: dict[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    """A ViT's state once only these layers are left, numbered anew."""
    renamed = {
        name: tensor for name, tensor in state.items() if not name.startswith(f"{VIT_LAYERS}.")
    }
    for new, old in enumerate(layers):
        path = f"{_vit_layer(old)}."
        renamed |= {
            f"{_vit_layer(new)}.{name.removeprefix(path)}": t
            for name, t in state.items()
            if name.startswith(path)
        }
    return renamed


def _dense_vit_layer_sizes(config: ViTConfig, layer: int) -> dict[str, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_attention_heads": config.num_attention_heads,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
    }


def _pin_vit(config: OFBViTConfig) -> None:
    """Writes down what the stock config derives from widths, so that it survives when widths
    change."""
    if config.attention_scale is None:
        head_dims = [
            config.layer_sizes(layer)["head_dim"] for layer in range(config.num_hidden_layers)
        ]
        config.attention_scale = common_scale("head_dim_per_layer", head_dims, "attention_scale")
    _resize_vit(config, _describe_vit(config).sizes)


def _resize_vit(config: OFBViTConfig, sizes: dict[str, tuple[int, ...]]) -> None:
    layers = range(config.num_hidden_layers)
    config.hidden_size = sizes["embeddings"][0]
    config.num_attention_heads_per_layer = [
        sizes[f"layers.{layer}.attention"][0] for layer in layers
    ]
    config.head_dim_per_layer = [sizes[f"layers.{layer}.attention"][1] for layer in layers]
    config.intermediate_size_per_layer = [sizes[f"layers.{layer}.mlp"][0] for layer in layers]


def _vit_attributes(config: OFBViTConfig) -> dict[str, dict[str, Any]]:
    attributes: dict[str, dict[str, Any]] = {}
    for layer in range(config.num_hidden_layers):
        attributes |= block_attributes(_vit_layer(layer), config.layer_sizes(layer))
        before, kept, merged = config.token_counts(layer)
        attributes[_vit_layer(layer)][REDUCTION] = (
            TokenReduction(kept, merged) if merged < before else None
        )
    return attributes


VIT = Family(
    describe=_describe_vit,
    from_dense=OFBViTForImageClassification.from_dense,
    pin=_pin_vit,
    resize=_resize_vit,
    attributes=_vit_attributes,
    model_class=OFBViTForImageClassification,
    undecayed=("_token", "position_embeddings"),
)


def with_fewest_tokens(config: ViTConfig) -> Architecture:
    """The architecture of a ViT that drops and merges: it has every kind of part that a schedule
    brings along."""
    return scheduled(config, [(3, 2)] * config.num_hidden_layers)
