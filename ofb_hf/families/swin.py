"""The Swin family: what a search needs to know about it."""

import math
from dataclasses import replace

from transformers import SwinConfig, SwinForImageClassification

from ..models.configuration_ofb_swin import OFBSwinConfig
from ..models.modeling_ofb_swin import OFBSwinForImageClassification
from .bases import WITHOUT_HEAD, Bases, HeadBasis, NormReaders, StreamBasis
from .blocks import Block, BlockNames, common_scale, linear_slots, norm_slots
from .description import (
    Architecture,
    Attributes,
    Family,
    Part,
    Sizes,
    Slot,
    Submodule,
    Term,
    heads_of,
    image_sides,
    square_patch,
)
from .forward_parts import end_part, merging_part, windowed_block

STAGES = "swin.encoder.layers"
EMBEDDINGS = "swin.embeddings"
PATCH_PROJECTION = f"{EMBEDDINGS}.patch_embeddings.projection"
MASK_TOKEN = f"{EMBEDDINGS}.mask_token"
NORM = "swin.layernorm"
CLASSIFIER = "classifier"
BIAS_TABLE = "attention.relative_position_bias.relative_position_bias_table"
BLOCK_NAMES = BlockNames(attention_others=("attention.relative_position_bias",))


# ------------------------------------------------------------------------------------------- sizes


def _width(stage: int) -> str:
    """Return the name of a stage's submodule of the residual stream."""
    return f"stages.{stage}.width"


def _last_width(config: SwinConfig) -> str:
    return _width(len(config.depths) - 1)


def _blocks(config: SwinConfig, stage: int) -> list[Block]:
    """Return the blocks of a stage."""
    blocks: list[Block] = []
    for number in range(config.depths[stage]):
        path = f"{STAGES}.{stage}.blocks.{number}"
        name = f"stages.{stage}.blocks.{number}"
        sizes = _layer_sizes(config, stage, number)
        blocks.append(Block(path, name, sizes, BLOCK_NAMES))
    return blocks


def _grids(config: SwinConfig) -> list[tuple[int, int]]:
    """Return the tokens (rows, columns) of every stage.

    Patch embedding and patch merging pad what they cannot divide.
    """
    patch = square_patch(config)
    height, width = image_sides(config)
    rows = math.ceil(height / patch)
    columns = math.ceil(width / patch)
    grids = [(rows, columns)]
    for _ in config.depths[1:]:
        rows = math.ceil(rows / 2)
        columns = math.ceil(columns / 2)
        grids.append((rows, columns))
    return grids


def _is_ours(config: SwinConfig) -> bool:
    """Return whether a config is one of this package; `trust_remote_code` loads another class."""
    return config.model_type == OFBSwinConfig.model_type


def _stage_width(config: SwinConfig, stage: int) -> int:
    """Return the channels of a stage's residual stream, of a stock config as well."""
    if _is_ours(config):
        return config.stage_width(stage)
    return int(config.embed_dim * 2**stage)


def _layer_sizes(
    config: SwinConfig,
    stage: int,
    block: int,
) -> dict[str, int]:
    """Return heads, channels per head and MLP width of a block, of a stock config as well."""
    if _is_ours(config):
        return config.layer_sizes(stage, block)
    width = _stage_width(config, stage)
    heads = config.num_heads[stage]
    return {
        "num_attention_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": int(config.mlp_ratio * width),
    }


# ------------------------------------------------------------------------------------- description


def _describe(config: SwinConfig) -> Architecture:
    grids, patch = _grids(config), square_patch(config)
    submodules: list[Submodule] = []
    for stage in range(len(config.depths)):
        submodules.append(_residual_width(config, stage))
        submodules += _block_submodules(config, stage)
    return Architecture(
        submodules=tuple(submodules),
        parts=_parts(config),
        params=_params(config),
        patch_grid=grids[0],
        patch_size=patch,
        token_grid=grids[-1],
        # Every patch merging doubles the side of the square that a token stands for.
        token_size=patch * 2 ** (len(config.depths) - 1),
        num_channels=config.num_channels,
        first_width=_width(0),
        last_width=_last_width(config),
        mask_token=MASK_TOKEN,
        activation=config.hidden_act,
    )


def _block_submodules(config: SwinConfig, stage: int) -> list[Submodule]:
    """Return attention and MLP of every block of a stage."""
    submodules: list[Submodule] = []
    for number, block in enumerate(_blocks(config, stage)):
        # A removed head takes its column of the table along.
        table = Slot(block.at(BIAS_TABLE), 1, per_head=True)
        attention, mlp = block.submodules(table)
        submodules += [replace(attention, variant=_variant(number)), mlp]
    return submodules


def _variant(block: int) -> str:
    """Return what tells apart the attentions of a stage: every second one shifts its windows."""
    return "shifted" if block % 2 else ""


def _residual_width(config: SwinConfig, stage: int) -> Submodule:
    """Return the submodule whose units are the channels of a stage's residual stream."""
    slots, norms = _entry(stage)
    for block in _blocks(config, stage):
        slots += block.residual_slots
        norms += block.norms
    if stage < len(config.depths) - 1:
        # Patch merging concatenates 2 x 2 neighbours: channel i stands at i, i + C, i + 2C and
        # i + 3C.
        merging = f"{STAGES}.{stage}.downsample"
        norms.append(f"{merging}.norm")
        slots += norm_slots(norms[-1], tiles=4)
        slots.append(Slot(f"{merging}.reduction.weight", 1, tiles=4))
    else:
        norms.append(NORM)
        slots += norm_slots(NORM)
        slots += linear_slots(CLASSIFIER, 1)
    shape = (_stage_width(config, stage),)
    return Submodule(_width(stage), "embedding", shape, tuple(slots), tuple(norms))


def _entry(stage: int) -> tuple[list[Slot], list[str]]:
    """Return slots and norms through which a stage's residual stream is first written."""
    if stage > 0:
        merging = f"{STAGES}.{stage - 1}.downsample.reduction"
        return list(linear_slots(merging, 0, gated=True)), []
    # The patch embedding is normalised before it becomes the residual stream, so the norm's output
    # is what is gated.
    norm = f"{EMBEDDINGS}.norm"
    slots = [
        *linear_slots(PATCH_PROJECTION, 0),
        *norm_slots(norm, gated=True),
        Slot(f"{EMBEDDINGS}.position_embeddings", 2, gated=True),
        Slot(MASK_TOKEN, 2, gated=True),
    ]
    return slots, [norm]


def _parts(config: SwinConfig) -> tuple[Part, ...]:
    grids = _grids(config)
    patches = math.prod(grids[0])
    pixels = config.num_channels * square_patch(config) ** 2
    parts = [end_part("stem", _width(0), patches * pixels)]
    for stage, grid in enumerate(grids):
        width = _width(stage)
        if stage > 0:
            before = stage - 1
            tokens = math.prod(grid)
            parts.append(merging_part(before, _width(before), width, tokens))
        counts = _token_counts(config, grid)
        for number, block in enumerate(_blocks(config, stage)):
            parts += windowed_block(width, block.name, stage, _variant(number), *counts)
    parts.append(end_part("head", _last_width(config), config.num_labels))
    return tuple(parts)


def _token_counts(config: SwinConfig, grid: tuple[int, int]) -> tuple[int, int, int]:
    """Return tokens of a stage, tokens padded to whole windows, and tokens of one window."""
    rows, columns = grid
    # The model narrows its windows for an image that is smaller than one.
    window = min(config.window_size, rows, columns)
    windows = math.ceil(rows / window) * math.ceil(columns / window)
    in_window = window**2
    return rows * columns, windows * in_window, in_window


def _params(config: SwinConfig) -> tuple[Term, ...]:
    first, last = _width(0), _last_width(config)
    patch = square_patch(config)
    pixels = config.num_channels * patch**2
    positions = 0
    if config.use_absolute_embeddings:
        height, width = image_sides(config)
        positions = (height // patch) * (width // patch)
    params = [
        # Patch projection with bias, LayerNorm, positions.
        Term((pixels + 1) + 2 + positions, (first,)),
        # LayerNorm, classifier.
        Term(2 + config.num_labels, (last,)),
        Term(config.num_labels),
    ]
    offsets = (2 * config.window_size - 1) ** 2  # relative positions of two tokens of a window
    for stage in range(len(config.depths)):
        width = _width(stage)
        for block in _blocks(config, stage):
            params += block.params(width, config.qkv_bias)
            params.append(Term(offsets, (heads_of(block.attention),)))
        if width != last:
            # LayerNorm and linear layer of the patch merging, over 4 tokens side by side.
            following = _width(stage + 1)
            params.append(Term(2 * 4, (width,)))
            params.append(Term(4, (width, following)))
    return tuple(params)


# ---------------------------------------------------------------------------------------- resizing


def _pin(config: OFBSwinConfig) -> None:
    """Write into the config what it derives from widths that are about to change."""
    if config.attention_scale_per_stage is None:
        scales = []
        for stage, depth in enumerate(config.depths):
            sizes = [config.layer_sizes(stage, block) for block in range(depth)]
            head_dims = [size["head_dim"] for size in sizes]
            field = f"head_dim_per_block[{stage}]"
            scales.append(common_scale(field, head_dims, "attention_scale_per_stage"))
        config.attention_scale_per_stage = scales
    _resize(config, _describe(config).sizes)


def _resize(config: OFBSwinConfig, sizes: Sizes) -> None:
    """Write submodule sizes into the config."""
    widths: list[int] = []
    heads: list[list[int]] = []
    head_dims: list[list[int]] = []
    intermediate_sizes: list[list[int]] = []
    for stage in range(len(config.depths)):
        blocks = _blocks(config, stage)
        attentions = [sizes[block.attention] for block in blocks]
        mlps = [sizes[block.mlp] for block in blocks]
        widths.append(sizes[_width(stage)][0])
        heads.append([count for count, _ in attentions])
        head_dims.append([channels for _, channels in attentions])
        intermediate_sizes.append([units for (units,) in mlps])
    config.hidden_size_per_stage = widths
    config.embed_dim = widths[0]
    config.hidden_size = widths[-1]
    config.num_heads_per_block = heads
    config.head_dim_per_block = head_dims
    config.intermediate_size_per_block = intermediate_sizes


def _attributes(config: OFBSwinConfig) -> Attributes:
    """Return what modules store next to their weights."""
    attributes: Attributes = {"swin": {"num_features": config.hidden_size}}
    for stage in range(len(config.depths)):
        for block in _blocks(config, stage):
            attributes |= block.attributes
    return attributes


def _bases(config: SwinConfig) -> Bases:
    """Return what may change its basis: all heads, and the streams of all stages but the first."""
    last = len(config.depths) - 1
    heads: list[HeadBasis] = []
    streams: list[StreamBasis] = []
    for stage in range(len(config.depths)):
        writers = [f"{STAGES}.{stage - 1}.downsample.reduction"] if stage else []
        norms: list[NormReaders] = []
        for block in _blocks(config, stage):
            heads += block.head_bases
            writers += block.writers
            # Windows that the grid does not fill are padded with zeros.
            norms += block.norm_readers(padded=True)
        merging = f"{STAGES}.{stage}.downsample"
        if stage < last:
            norms.append(NormReaders(f"{merging}.norm", (f"{merging}.reduction",), tiles=4))
        else:
            norms.append(NormReaders(NORM, (CLASSIFIER,)))
        streams.append(StreamBasis(_width(stage), tuple(writers), (), tuple(norms)))
    fixed = {
        _width(0): "the norm of the patch embedding writes it, and the scale of that norm belongs "
        "to single channels"
    }
    rotatable = streams[1:]
    if not config.num_labels and rotatable:
        fixed[rotatable.pop().name] = WITHOUT_HEAD
    return Bases(heads=tuple(heads), streams=tuple(rotatable), fixed=fixed)


SWIN = Family(
    stock_class=SwinForImageClassification,
    model_class=OFBSwinForImageClassification,
    describe=_describe,
    pin=_pin,
    resize=_resize,
    attributes=_attributes,
    undecayed=("mask_token", "position_embeddings", "relative_position_bias_table"),
    bases=_bases,
)
