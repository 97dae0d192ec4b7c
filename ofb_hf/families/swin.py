"""The Swin family: what a search needs to know about it."""

import math
from dataclasses import replace
from typing import Any

from transformers import (
    SwinConfig,
)

from ..models.configuration_ofb_swin import OFBSwinConfig
from ..models.modeling_ofb_swin import OFBSwinForImageClassification
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
    heads_of,
    image_sides,
    square_patch,
)
from .forward_parts import end_part, merging_part, windowed_block


def _swin_stage_width(config: SwinConfig, stage: int) -> int:
    return (
        config.stage_width(stage)
        if isinstance(config, OFBSwinConfig)
        else int(config.embed_dim * 2**stage)
    )


def _swin_layer_sizes(config: SwinConfig, stage: int, block: int) -> dict[str, int]:
    if isinstance(config, OFBSwinConfig):
        return config.layer_sizes(stage, block)
    width, heads = _swin_stage_width(config, stage), config.num_heads[stage]
    return {
        "num_attention_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": int(config.mlp_ratio * width),
    }


def _swin_grids(config: SwinConfig) -> list[tuple[int, int]]:
    """Tokens (rows, columns) of every stage; patch embedding and patch merging pad what they cannot
    divide."""
    patch = square_patch(config)
    grids = [tuple(math.ceil(pixels / patch) for pixels in image_sides(config))]
    for _ in config.depths[1:]:
        grids.append(tuple(math.ceil(tokens / 2) for tokens in grids[-1]))
    return grids


def _describe_swin(config: SwinConfig) -> Architecture:
    grids, patch, last = _swin_grids(config), square_patch(config), len(config.depths) - 1
    submodules: list[Submodule] = []
    (stem, head), params = _swin_ends(config)
    parts = [stem]
    for stage, depth in enumerate(config.depths):
        path, width = f"swin.encoder.layers.{stage}", f"stages.{stage}.width"
        slots, norms = _swin_entry_slots(stage)
        blocks: list[Submodule] = []
        for block in range(depth):
            at, name = f"{path}.blocks.{block}", f"stages.{stage}.blocks.{block}"
            sizes = _swin_layer_sizes(config, stage, block)
            table = Slot(
                f"{at}.attention.relative_position_bias.relative_position_bias_table",
                1,
                per_head=True,
            )
            attention, mlp = block_submodules(at, name, sizes, table)
            attention = replace(attention, variant="shifted" if block % 2 else "")
            blocks += [attention, mlp]
            slots += block_residual_slots(at)
            norms += block_norms(at, sizes)
            parts += windowed_block(
                width, name, stage, attention.variant, *_swin_token_counts(config, grids[stage])
            )
            params += block_params(width, attention.name, mlp.name, config.qkv_bias)
            params.append(Term((2 * config.window_size - 1) ** 2, (heads_of(attention.name),)))
        if stage < last:
            # Patch merging concatenates 2 x 2 neighbours: channel i stands at i, i + C, i + 2C and
            # i + 3C.
            norms.append(f"{path}.downsample.norm")
            slots += [
                *norm_slots(norms[-1], tiles=4),
                Slot(f"{path}.downsample.reduction.weight", 1, tiles=4),
            ]
            parts.append(
                merging_part(stage, width, f"stages.{stage + 1}.width", math.prod(grids[stage + 1]))
            )
            params += [Term(8, (width,)), Term(4, (width, f"stages.{stage + 1}.width"))]
        else:
            norms.append("swin.layernorm")
            slots += [*norm_slots(norms[-1]), *linear_slots("classifier", 1)]
        units = (_swin_stage_width(config, stage),)
        submodules += [Submodule(width, "embedding", units, tuple(slots), tuple(norms)), *blocks]
    return Architecture(
        submodules=tuple(submodules),
        parts=(*parts, head),
        params=tuple(params),
        patch_grid=grids[0],
        patch_size=patch,
        token_grid=grids[-1],
        token_size=patch * 2**last,
        num_channels=config.num_channels,
        first_width="stages.0.width",
        last_width=f"stages.{last}.width",
        embeddings="swin.embeddings",
        activation=config.hidden_act,
    )


def _swin_ends(config: SwinConfig) -> tuple[tuple[Part, Part], list[Term]]:
    """What comes before and after the blocks (patch embedding, final LayerNorm and classifier), and
    its parameters."""
    first, last = "stages.0.width", f"stages.{len(config.depths) - 1}.width"
    patch = square_patch(config)
    pixels, patches = config.num_channels * patch**2, math.prod(_swin_grids(config)[0])
    positions = math.prod(side // patch for side in image_sides(config)) * bool(
        config.use_absolute_embeddings
    )
    parts = end_part("stem", first, patches * pixels), end_part("head", last, config.num_labels)
    params = [
        Term(pixels + 1 + 2 + positions, (first,)),
        Term(2 + config.num_labels, (last,)),
        Term(config.num_labels),
    ]
    return parts, params


def _swin_token_counts(config: SwinConfig, grid: tuple[int, int]) -> tuple[int, int, int]:
    """Tokens of a stage, tokens after padding to whole windows, and tokens of one window."""
    window = min(config.window_size, *grid)
    padded = math.prod(math.ceil(side / window) * window for side in grid)
    return math.prod(grid), padded, window**2


def _swin_entry_slots(stage: int) -> tuple[list[Slot], list[str]]:
    """Slots and norms through which a stage's residual stream is first written."""
    if stage > 0:
        return [
            *linear_slots(f"swin.encoder.layers.{stage - 1}.downsample.reduction", 0, gated=True)
        ], []
    # The patch embedding is normalised before it becomes the residual stream, so the norm's output
    # is what is gated.
    slots = [
        *linear_slots("swin.embeddings.patch_embeddings.projection", 0),
        *norm_slots("swin.embeddings.norm", gated=True),
        *(
            Slot(f"swin.embeddings.{name}", 2, gated=True)
            for name in ("position_embeddings", "mask_token")
        ),
    ]
    return slots, ["swin.embeddings.norm"]


def _pin_swin(config: OFBSwinConfig) -> None:
    """Writes down what the stock config derives from widths, so that it survives when widths
    change."""
    if config.attention_scale_per_stage is None:
        config.attention_scale_per_stage = [
            common_scale(
                f"head_dim_per_block[{stage}]",
                [config.layer_sizes(stage, block)["head_dim"] for block in range(depth)],
                "attention_scale_per_stage",
            )
            for stage, depth in enumerate(config.depths)
        ]
    _resize_swin(config, _describe_swin(config).sizes)


def _resize_swin(config: OFBSwinConfig, sizes: dict[str, tuple[int, ...]]) -> None:
    def per_block(kind: str, axis: int) -> list[list[int]]:
        return [
            [sizes[f"stages.{stage}.blocks.{block}.{kind}"][axis] for block in range(depth)]
            for stage, depth in enumerate(config.depths)
        ]

    config.hidden_size_per_stage = [
        sizes[f"stages.{stage}.width"][0] for stage in range(len(config.depths))
    ]
    config.embed_dim, config.hidden_size = (
        config.hidden_size_per_stage[0],
        config.hidden_size_per_stage[-1],
    )
    config.num_heads_per_block = per_block("attention", 0)
    config.head_dim_per_block = per_block("attention", 1)
    config.intermediate_size_per_block = per_block("mlp", 0)


def _swin_attributes(config: OFBSwinConfig) -> dict[str, dict[str, Any]]:
    attributes: dict[str, dict[str, Any]] = {"swin": {"num_features": config.hidden_size}}
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            path = f"swin.encoder.layers.{stage}.blocks.{block}"
            attributes |= block_attributes(path, config.layer_sizes(stage, block))
    return attributes


SWIN = Family(
    describe=_describe_swin,
    from_dense=OFBSwinForImageClassification.from_dense,
    pin=_pin_swin,
    resize=_resize_swin,
    attributes=_swin_attributes,
    model_class=OFBSwinForImageClassification,
    undecayed=("mask_token", "position_embeddings", "relative_position_bias_table"),
)
