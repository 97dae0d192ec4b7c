"""What a search needs to know about each model family, in the words of `unit_groups`; the only file that spells
module paths."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ..models.configuration_ofb_swin import OFBSwinConfig
from ..models.configuration_ofb_vit import OFBViTConfig
from ..models.modeling_ofb_swin import OFBSwinForImageClassification
from ..models.modeling_ofb_vit import OFBViTForImageClassification, TokenReduction
from .description import Architecture, Family, Part, Slot, Submodule, Term, block_params, heads_of
from .forward_parts import REDUCTION, end_part, merging_part, reducing_block, windowed_block


class UnsupportedArchitectureError(ValueError):
    """The model or config belongs to no family that can be searched."""


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_sides(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images a model was made for, in pixels."""
    return _pair(config.image_size)


def _square_patch(config: PreTrainedConfig) -> int:
    height, width = _pair(config.patch_size)
    if height != width:
        raise UnsupportedArchitectureError(f"patch_size is {(height, width)}; only square patches are supported.")
    return height


VIT_LAYERS = "vit.layers"


def _linear(path: str, axis: int, gated: bool = False) -> tuple[Slot, ...]:
    """The slots of a linear or convolution layer: its outputs (axis 0, weight and bias) or its inputs (axis 1)."""
    names = ("weight", "bias") if axis == 0 else ("weight",)
    return tuple(Slot(f"{path}.{name}", axis, gated) for name in names)


def _norm(path: str, gated: bool = False, tiles: int = 1) -> tuple[Slot, ...]:
    return tuple(Slot(f"{path}.{name}", 0, gated, tiles) for name in ("weight", "bias"))


# The norm that belongs to each half of a block, and the layers of that half.
BLOCK_HALVES = {
    "attention": ("layernorm_before", ("q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias")),
    "mlp": ("layernorm_after", ("fc1", "fc2")),
}


def _block_submodules(path: str, name: str, sizes: dict[str, int], *more: Slot) -> tuple[Submodule, Submodule]:
    """Attention and MLP of the block at `path`, called `name`; `more` are slots of its attention."""
    rows = [slot for letter in "qkv" for slot in _linear(f"{path}.attention.{letter}_proj", 0, gated=True)]
    attention = Submodule(
        f"{name}.attention",
        "attention",
        (sizes["num_attention_heads"], sizes["head_dim"]),
        (*rows, *_linear(f"{path}.attention.o_proj", 1), *more),
        constants=(f"{path}.attention.o_proj.bias",),
    )
    mlp = Submodule(
        f"{name}.mlp",
        "mlp",
        (sizes["intermediate_size"],),
        (*_linear(f"{path}.mlp.fc1", 0, gated=True), *_linear(f"{path}.mlp.fc2", 1)),
        constants=(f"{path}.mlp.fc2.bias",),
    )
    return attention, mlp


def _block_residual_slots(path: str) -> list[Slot]:
    """Where the block at `path` reads and writes the residual stream."""
    readers = [f"{path}.attention.{letter}_proj" for letter in "qkv"] + [f"{path}.mlp.fc1"]
    writers = [f"{path}.attention.o_proj", f"{path}.mlp.fc2"]
    slots = [slot for reader in readers for slot in _linear(reader, 1)]
    slots += [slot for writer in writers for slot in _linear(writer, 0, gated=True)]
    return slots + [slot for norm, _ in BLOCK_HALVES.values() for slot in _norm(f"{path}.{norm}")]


def _living_halves(sizes: dict[str, int]) -> list[str]:
    """The halves of a block that have any width."""
    widths = {"attention": sizes["num_attention_heads"], "mlp": sizes["intermediate_size"]}
    return [half for half, width in widths.items() if width]


def _block_norms(path: str, sizes: dict[str, int]) -> list[str]:
    return [f"{path}.{BLOCK_HALVES[half][0]}" for half in _living_halves(sizes)]


def _block_attributes(path: str, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What the modules of the block at `path` keep beside their weights; a half without width has no layers left."""
    heads = {name: sizes[name] for name in ("num_attention_heads", "head_dim")}
    attributes: dict[str, dict[str, Any]] = {path: {}, f"{path}.attention": heads}
    for half in BLOCK_HALVES.keys() - set(_living_halves(sizes)):
        norm, layers = BLOCK_HALVES[half]
        attributes[path][norm] = nn.Identity()
        attributes[f"{path}.{half}"] = attributes.get(f"{path}.{half}", {}) | dict.fromkeys(layers)
    return attributes


def _vit_grid(config: ViTConfig) -> tuple[int, int]:
    """Patches of an image, (rows, columns)."""
    (height, width), patch = image_sides(config), _square_patch(config)
    return height // patch, width // patch


def _describe_vit(config: ViTConfig) -> Architecture:
    grid, patch = _vit_grid(config), _square_patch(config)
    pixels, tokens, layers = config.num_channels * patch**2, grid[0] * grid[1] + 1, range(config.num_hidden_layers)
    is_ours = isinstance(config, OFBViTConfig)
    layer_sizes = OFBViTConfig.layer_sizes if is_ours else _dense_vit_layer_sizes
    schedule = [config.token_counts(layer)[1:] if is_ours else (tokens, tokens) for layer in layers]

    residual = [
        *_linear("vit.embeddings.patch_embeddings.projection", 0, gated=True),
        *(Slot(f"vit.embeddings.{name}", 2, gated=True) for name in ("cls_token", "position_embeddings", "mask_token")),
        *_norm("vit.layernorm"),
        *_linear("classifier", 1),
    ]
    norms, submodules = ["vit.layernorm"], []
    params = [Term(pixels + 1 + 1 + tokens + 2 + config.num_labels, ("embeddings",)), Term(config.num_labels)]
    for layer in layers:
        path, name, sizes = _vit_layer(layer), f"layers.{layer}", layer_sizes(config, layer)
        attention, mlp = _block_submodules(path, name, sizes)
        submodules += [attention, mlp]
        residual += _block_residual_slots(path)
        norms += _block_norms(path, sizes)
        params += block_params("embeddings", attention.name, mlp.name, config.qkv_bias)
    embedding = Submodule("embeddings", "embedding", (config.hidden_size,), tuple(residual), tuple(norms))
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
    """The parts of a ViT classifier under a token schedule whose counts do not rise; they may be scalar tensors."""
    patches = math.prod(_vit_grid(config))
    parts = [end_part("stem", "embeddings", patches * config.num_channels * _square_patch(config) ** 2)]
    before, weighs = patches + 1, False
    for layer, (kept, merged) in enumerate(schedule):
        parts += vit_layer_parts(layer, before, kept, merged, weighs)
        before, weighs = merged, weighs | (merged < kept)
    return (*parts, end_part("head", "embeddings", config.num_labels))


def vit_layer_parts(layer: int, before: Any, kept: Any, merged: Any, weighs: Any) -> tuple[Part, ...]:
    """The parts of one of its layers; counts as for `reducing_block`."""
    return reducing_block("embeddings", f"layers.{layer}", before, kept, merged, weighs)


def scheduled(config: ViTConfig, schedule: Sequence[Sequence[int]]) -> Architecture:
    """The architecture of a ViT under another token schedule than its own."""
    return replace(_describe_vit(config), parts=vit_parts(config, schedule))


def _vit_layer(layer: int) -> str:
    return f"{VIT_LAYERS}.{layer}"


def vit_query_parameters(layer: int) -> tuple[str, ...]:
    """The tensors that make a ViT layer's queries out of its tokens."""
    return tuple(slot.parameter for slot in _linear(f"{_vit_layer(layer)}.attention.q_proj", 0))


def with_vit_layers(state: dict[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    """A ViT's state once only these layers are left, numbered anew."""
    renamed = {name: tensor for name, tensor in state.items() if not name.startswith(f"{VIT_LAYERS}.")}
    for new, old in enumerate(layers):
        path = f"{_vit_layer(old)}."
        renamed |= {
            f"{_vit_layer(new)}.{name.removeprefix(path)}": t for name, t in state.items() if name.startswith(path)
        }
    return renamed


def _dense_vit_layer_sizes(config: ViTConfig, layer: int) -> dict[str, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_attention_heads": config.num_attention_heads,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
    }


def _common_scale(field: str, head_dims: list[int], scale_field: str) -> float:
    """The factor on the attention logits that heads of this width imply; those of no width imply none.

    Raises:
        UnsupportedArchitectureError: for heads of several widths, whose factors differ.
    """
    widths = set(head_dims) - {0} or {1}
    if len(widths) > 1:
        raise UnsupportedArchitectureError(
            f"{field} is {head_dims} and {scale_field} is not given, so each width implies a factor of its own on the "
            f"attention logits, which would change when heads shrink; only models with {scale_field} are supported."
        )
    return widths.pop() ** -0.5


def _pin_vit(config: OFBViTConfig) -> None:
    """Writes down what the stock config derives from widths, so that it survives when widths change."""
    if config.attention_scale is None:
        head_dims = [config.layer_sizes(layer)["head_dim"] for layer in range(config.num_hidden_layers)]
        config.attention_scale = _common_scale("head_dim_per_layer", head_dims, "attention_scale")
    _resize_vit(config, _describe_vit(config).sizes)


def _resize_vit(config: OFBViTConfig, sizes: dict[str, tuple[int, ...]]) -> None:
    layers = range(config.num_hidden_layers)
    config.hidden_size = sizes["embeddings"][0]
    config.num_attention_heads_per_layer = [sizes[f"layers.{layer}.attention"][0] for layer in layers]
    config.head_dim_per_layer = [sizes[f"layers.{layer}.attention"][1] for layer in layers]
    config.intermediate_size_per_layer = [sizes[f"layers.{layer}.mlp"][0] for layer in layers]


def _vit_attributes(config: OFBViTConfig) -> dict[str, dict[str, Any]]:
    attributes: dict[str, dict[str, Any]] = {}
    for layer in range(config.num_hidden_layers):
        attributes |= _block_attributes(_vit_layer(layer), config.layer_sizes(layer))
        before, kept, merged = config.token_counts(layer)
        attributes[_vit_layer(layer)][REDUCTION] = TokenReduction(kept, merged) if merged < before else None
    return attributes


_VIT = Family(
    describe=_describe_vit,
    from_dense=OFBViTForImageClassification.from_dense,
    pin=_pin_vit,
    resize=_resize_vit,
    attributes=_vit_attributes,
    model_class=OFBViTForImageClassification,
    undecayed=("_token", "position_embeddings"),
)


def _swin_stage_width(config: SwinConfig, stage: int) -> int:
    return config.stage_width(stage) if isinstance(config, OFBSwinConfig) else int(config.embed_dim * 2**stage)


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
    """Tokens (rows, columns) of every stage; patch embedding and patch merging pad what they cannot divide."""
    patch = _square_patch(config)
    grids = [tuple(math.ceil(pixels / patch) for pixels in image_sides(config))]
    for _ in config.depths[1:]:
        grids.append(tuple(math.ceil(tokens / 2) for tokens in grids[-1]))
    return grids


def _describe_swin(config: SwinConfig) -> Architecture:
    grids, patch, last = _swin_grids(config), _square_patch(config), len(config.depths) - 1
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
            table = Slot(f"{at}.attention.relative_position_bias.relative_position_bias_table", 1, per_head=True)
            attention, mlp = _block_submodules(at, name, sizes, table)
            attention = replace(attention, variant="shifted" if block % 2 else "")
            blocks += [attention, mlp]
            slots += _block_residual_slots(at)
            norms += _block_norms(at, sizes)
            parts += windowed_block(width, name, stage, attention.variant, *_swin_token_counts(config, grids[stage]))
            params += block_params(width, attention.name, mlp.name, config.qkv_bias)
            params.append(Term((2 * config.window_size - 1) ** 2, (heads_of(attention.name),)))
        if stage < last:
            # Patch merging concatenates 2 x 2 neighbours: channel i stands at i, i + C, i + 2C and i + 3C.
            norms.append(f"{path}.downsample.norm")
            slots += [*_norm(norms[-1], tiles=4), Slot(f"{path}.downsample.reduction.weight", 1, tiles=4)]
            parts.append(merging_part(stage, width, f"stages.{stage + 1}.width", math.prod(grids[stage + 1])))
            params += [Term(8, (width,)), Term(4, (width, f"stages.{stage + 1}.width"))]
        else:
            norms.append("swin.layernorm")
            slots += [*_norm(norms[-1]), *_linear("classifier", 1)]
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
    """What comes before and after the blocks (patch embedding, final LayerNorm and classifier), and its parameters."""
    first, last = "stages.0.width", f"stages.{len(config.depths) - 1}.width"
    patch = _square_patch(config)
    pixels, patches = config.num_channels * patch**2, math.prod(_swin_grids(config)[0])
    positions = math.prod(side // patch for side in image_sides(config)) * bool(config.use_absolute_embeddings)
    parts = end_part("stem", first, patches * pixels), end_part("head", last, config.num_labels)
    params = [Term(pixels + 1 + 2 + positions, (first,)), Term(2 + config.num_labels, (last,)), Term(config.num_labels)]
    return parts, params


def _swin_token_counts(config: SwinConfig, grid: tuple[int, int]) -> tuple[int, int, int]:
    """Tokens of a stage, tokens after padding to whole windows, and tokens of one window."""
    window = min(config.window_size, *grid)
    padded = math.prod(math.ceil(side / window) * window for side in grid)
    return math.prod(grid), padded, window**2


def _swin_entry_slots(stage: int) -> tuple[list[Slot], list[str]]:
    """Slots and norms through which a stage's residual stream is first written."""
    if stage > 0:
        return [*_linear(f"swin.encoder.layers.{stage - 1}.downsample.reduction", 0, gated=True)], []
    # The patch embedding is normalised before it becomes the residual stream, so the norm's output is what is gated.
    slots = [
        *_linear("swin.embeddings.patch_embeddings.projection", 0),
        *_norm("swin.embeddings.norm", gated=True),
        *(Slot(f"swin.embeddings.{name}", 2, gated=True) for name in ("position_embeddings", "mask_token")),
    ]
    return slots, ["swin.embeddings.norm"]


def _pin_swin(config: OFBSwinConfig) -> None:
    """Writes down what the stock config derives from widths, so that it survives when widths change."""
    if config.attention_scale_per_stage is None:
        config.attention_scale_per_stage = [
            _common_scale(
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

    config.hidden_size_per_stage = [sizes[f"stages.{stage}.width"][0] for stage in range(len(config.depths))]
    config.embed_dim, config.hidden_size = config.hidden_size_per_stage[0], config.hidden_size_per_stage[-1]
    config.num_heads_per_block = per_block("attention", 0)
    config.head_dim_per_block = per_block("attention", 1)
    config.intermediate_size_per_block = per_block("mlp", 0)


def _swin_attributes(config: OFBSwinConfig) -> dict[str, dict[str, Any]]:
    attributes: dict[str, dict[str, Any]] = {"swin": {"num_features": config.hidden_size}}
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            path = f"swin.encoder.layers.{stage}.blocks.{block}"
            attributes |= _block_attributes(path, config.layer_sizes(stage, block))
    return attributes


_SWIN = Family(
    describe=_describe_swin,
    from_dense=OFBSwinForImageClassification.from_dense,
    pin=_pin_swin,
    resize=_resize_swin,
    attributes=_swin_attributes,
    model_class=OFBSwinForImageClassification,
    undecayed=("mask_token", "position_embeddings", "relative_position_bias_table"),
)

FAMILIES: dict[type[PreTrainedConfig], Family] = {ViTConfig: _VIT, SwinConfig: _SWIN}
CLASSIFIERS: tuple[type[PreTrainedModel], ...] = (ViTForImageClassification, SwinForImageClassification)


def family_of(config: PreTrainedConfig) -> Family:
    """The family that a config belongs to.

    Raises:
        UnsupportedArchitectureError: naming the model type and the supported ones.
    """
    for config_class, family in FAMILIES.items():
        if isinstance(config, config_class):
            return family
    supported = sorted(config_class.model_type for config_class in FAMILIES)
    raise UnsupportedArchitectureError(
        f"model type {getattr(config, 'model_type', type(config).__name__)!r} cannot be searched; supported: "
        f"{supported}. A new family is one entry in ofb_hf/architectures.py."
    )


def describe(config: PreTrainedConfig) -> Architecture:
    """The architecture that a config, stock or ours, stands for."""
    return family_of(config).describe(config)


def require_classifier(model: nn.Module) -> None:
    """Raises `UnsupportedArchitectureError` unless `model` is an image classifier of a supported family."""
    if not isinstance(model, CLASSIFIERS):
        raise UnsupportedArchitectureError(
            f"got a {type(model).__name__}; expected an image classifier: {[c.__name__ for c in CLASSIFIERS]} or our "
            "classes of that kind."
        )


def with_fewest_tokens(config: ViTConfig) -> Architecture:
    """The architecture of a ViT that drops and merges: it has every kind of part that a schedule brings along."""
    return scheduled(config, [(3, 2)] * config.num_hidden_layers)
