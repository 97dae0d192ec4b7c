"""A pre-norm transformer block in the words of `description`: its submodules, slots, norms and
parameters."""

from typing import Any

from torch import nn

from .description import (
    Slot,
    Submodule,
    Term,
    UnsupportedArchitectureError,
    presence_of,
)


def linear_slots(path: str, axis: int, gated: bool = False) -> tuple[Slot, ...]:
    """The slots of a linear or convolution layer: its outputs (axis 0, weight and bias) or its
    inputs (axis 1)."""
    names = ("weight", "bias") if axis == 0 else ("weight",)
    return tuple(Slot(f"{path}.{name}", axis, gated) for name in names)


def norm_slots(path: str, gated: bool = False, tiles: int = 1) -> tuple[Slot, ...]:
    return tuple(Slot(f"{path}.{name}", 0, gated, tiles) for name in ("weight", "bias"))


# The norm that belongs to each half of a block, and the layers of that half.
BLOCK_HALVES = {
    "attention": (
        "layernorm_before",
        ("q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias"),
    ),
    "mlp": ("layernorm_after", ("fc1", "fc2")),
}


def block_submodules(
    path: str, name: str, sizes: dict[str, int], *more: Slot
) -> tuple[Submodule, Submodule]:
    """Attention and MLP of the block at `path`, called `name`; `more` are slots of its
    attention."""
    rows = [
        slot
        for letter in "qkv"
        for slot in linear_slots(f"{path}.attention.{letter}_proj", 0, gated=True)
    ]
    attention = Submodule(
        f"{name}.attention",
        "attention",
        (sizes["num_attention_heads"], sizes["head_dim"]),
        (*rows, *linear_slots(f"{path}.attention.o_proj", 1), *more),
        constants=(f"{path}.attention.o_proj.bias",),
    )
    mlp = Submodule(
        f"{name}.mlp",
        "mlp",
        (sizes["intermediate_size"],),
        (*linear_slots(f"{path}.mlp.fc1", 0, gated=True), *linear_slots(f"{path}.mlp.fc2", 1)),
        constants=(f"{path}.mlp.fc2.bias",),
    )
    return attention, mlp


def block_residual_slots(path: str) -> list[Slot]:
    """Where the block at `path` reads and writes the residual stream."""
    readers = [f"{path}.attention.{letter}_proj" for letter in "qkv"] + [f"{path}.mlp.fc1"]
    writers = [f"{path}.attention.o_proj", f"{path}.mlp.fc2"]
    slots = [slot for reader in readers for slot in linear_slots(reader, 1)]
    slots += [slot for writer in writers for slot in linear_slots(writer, 0, gated=True)]
    return slots + [
        slot for norm, _ in BLOCK_HALVES.values() for slot in norm_slots(f"{path}.{norm}")
    ]


def _living_halves(sizes: dict[str, int]) -> list[str]:
    """The halves of a block that have any width."""
    widths = {"attention": sizes["num_attention_heads"], "mlp": sizes["intermediate_size"]}
    return [half for half, width in widths.items() if width]


def block_norms(path: str, sizes: dict[str, int]) -> list[str]:
    return [f"{path}.{BLOCK_HALVES[half][0]}" for half in _living_halves(sizes)]


def block_attributes(path: str, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What the modules of the block at `path` keep beside their weights; a half without width has
    no layers left."""
    heads = {name: sizes[name] for name in ("num_attention_heads", "head_dim")}
    attributes: dict[str, dict[str, Any]] = {path: {}, f"{path}.attention": heads}
    for half in BLOCK_HALVES.keys() - set(_living_halves(sizes)):
        norm, layers = BLOCK_HALVES[half]
        attributes[path][norm] = nn.Identity()
        attributes[f"{path}.{half}"] = attributes.get(f"{path}.{half}", {}) | dict.fromkeys(layers)
    return attributes


def common_scale(field: str, head_dims: list[int], scale_field: str) -> float:
    """The factor on the attention logits that heads of this width imply; those of no width imply
    none.

    Raises:
        UnsupportedArchitectureError: for heads of several widths, whose factors differ.
    """
    widths = set(head_dims) - {0} or {1}
    if len(widths) > 1:
        raise UnsupportedArchitectureError(
            f"{field} is {head_dims} and {scale_field} is not given, so each width implies a "
            f"factor of its own on the "
            f"attention logits, which would change when heads shrink; only models with "
            f"{scale_field} are supported."
        )
    return widths.pop() ** -0.5


def block_params(width: str, attention: str, mlp: str, qkv_bias: bool) -> list[Term]:
    """Parameters of one block: its residual width and halves, and whether q, k and v have
    biases."""
    return [
        Term(4, (width, attention)),
        Term(3 * bool(qkv_bias), (attention,)),
        Term(2, (width, mlp)),
        Term(1, (mlp,)),
        Term(1 + 2, (width, presence_of(attention))),  # bias of o_proj, LayerNorm
        Term(1 + 2, (width, presence_of(mlp))),  # bias of fc2, LayerNorm
    ]
