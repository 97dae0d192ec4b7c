"""A pre-norm transformer block as a table of layer names: its units, slots, norms, parameters."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .description import Slot, Submodule, Term, UnsupportedArchitectureError, presence_of


@dataclass(frozen=True)
class BlockNames:
    """Where the layers of a block are: paths below the block, as in transformers' ViT and Swin.

    A block adds `attention_output(attention(attention_norm(x)))` to the residual stream x, then
    `mlp_output(activation(mlp_inputs[0](mlp_norm(x))))`.

    Args:
        attention: the module that stores `num_attention_heads` and `head_dim`.
        attention_norm: the LayerNorm before the attention.
        attention_inputs: the linear layers to queries, keys and values.
        attention_output: the linear layer that writes into the residual stream.
        attention_others: other layers of the attention, which are gone when it has no heads.
        mlp_norm: the LayerNorm before the MLP.
        mlp_inputs: the linear layers from the residual stream to the hidden units. The bi-mask
            scales the first of them. Others (the gate projection of a gated MLP) multiply it, so a
            unit is off as soon as its row of the first one is 0.
        mlp_output: the linear layer that writes into the residual stream.
    """

    attention: str = "attention"
    attention_norm: str = "layernorm_before"
    attention_inputs: tuple[str, ...] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    attention_output: str = "attention.o_proj"
    attention_others: tuple[str, ...] = ()
    mlp_norm: str = "layernorm_after"
    mlp_inputs: tuple[str, ...] = ("mlp.fc1",)
    mlp_output: str = "mlp.fc2"

    @property
    def mlp_matrices(self) -> int:
        """Weight matrices of the MLP."""
        return len(self.mlp_inputs) + 1

    @property
    def norms(self) -> dict[str, str]:
        """Half of the block -> its norm."""
        return {"attention": self.attention_norm, "mlp": self.mlp_norm}

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Half of the block -> its layers but the norm, which are gone when it has no units."""
        attention = (*self.attention_inputs, self.attention_output, *self.attention_others)
        return {"attention": attention, "mlp": (*self.mlp_inputs, self.mlp_output)}


STOCK_NAMES = BlockNames()


def linear_slots(path: str, axis: int, gated: bool = False) -> tuple[Slot, ...]:
    """Return the slots of a linear or convolution layer.

    Args:
        path: of the layer.
        axis: 0 for its outputs (weight and bias), 1 for its inputs (weight).
        gated: whether the bi-mask scales them.
    """
    names = ("weight", "bias") if axis == 0 else ("weight",)
    return tuple(Slot(f"{path}.{name}", axis, gated) for name in names)


def norm_slots(path: str, gated: bool = False, tiles: int = 1) -> tuple[Slot, ...]:
    """Return the slots of a LayerNorm; arguments as for `Slot`."""
    return tuple(Slot(f"{path}.{name}", 0, gated, tiles) for name in ("weight", "bias"))


def block_submodules(
    path: str,
    name: str,
    sizes: dict[str, int],
    more: tuple[Slot, ...] = (),
    names: BlockNames = STOCK_NAMES,
) -> tuple[Submodule, Submodule]:
    """Return the attention and the MLP of a block.

    Args:
        path: of the block in the model.
        name: how the names of its submodules begin.
        sizes: `num_attention_heads`, `head_dim` and `intermediate_size`.
        more: further slots of its attention.
        names: of its layers.
    """
    output = f"{path}.{names.attention_output}"
    slots: list[Slot] = []
    for layer in names.attention_inputs:
        slots += linear_slots(f"{path}.{layer}", 0, gated=True)
    attention = Submodule(
        f"{name}.attention",
        "attention",
        (sizes["num_attention_heads"], sizes["head_dim"]),
        (*slots, *linear_slots(output, 1), *more),
        constants=(f"{output}.bias",),
        block=path,
        entry=f"{path}.{names.attention_norm}",
    )
    output = f"{path}.{names.mlp_output}"
    slots = []
    for number, layer in enumerate(names.mlp_inputs):
        slots += linear_slots(f"{path}.{layer}", 0, gated=number == 0)
    mlp = Submodule(
        f"{name}.mlp",
        "mlp",
        (sizes["intermediate_size"],),
        (*slots, *linear_slots(output, 1)),
        constants=(f"{output}.bias",),
        block=path,
        entry=f"{path}.{names.mlp_norm}",
    )
    return attention, mlp


def block_residual_slots(path: str, names: BlockNames = STOCK_NAMES) -> list[Slot]:
    """Return where the block at `path` reads and writes the residual stream."""
    slots: list[Slot] = []
    for layer in (*names.attention_inputs, *names.mlp_inputs):
        slots += linear_slots(f"{path}.{layer}", 1)
    for layer in (names.attention_output, names.mlp_output):
        slots += linear_slots(f"{path}.{layer}", 0, gated=True)
    for norm in names.norms.values():
        slots += norm_slots(f"{path}.{norm}")
    return slots


def block_norms(path: str, sizes: dict[str, int], names: BlockNames = STOCK_NAMES) -> list[str]:
    """Return the paths of the block's norms; a half without width has none."""
    return [f"{path}.{names.norms[half]}" for half in _living_halves(sizes)]


def block_attributes(
    path: str, sizes: dict[str, int], names: BlockNames = STOCK_NAMES
) -> dict[str, dict[str, Any]]:
    """Return what the modules of a block store next to their weights.

    Args:
        path: of the block in the model.
        sizes: as for `block_submodules`.
        names: of its layers.

    Returns:
        {module path: {attribute: value}}: the sizes of the attention, and for a half without width
        what takes the place of its norm and layers.
    """
    attributes: dict[str, dict[str, Any]] = {
        path: {},
        f"{path}.{names.attention}": {
            "num_attention_heads": sizes["num_attention_heads"],
            "head_dim": sizes["head_dim"],
        },
    }
    for half in names.norms.keys() - set(_living_halves(sizes)):
        replaced: dict[str, Any] = dict.fromkeys(names.layers[half])
        replaced[names.norms[half]] = nn.Identity()
        for layer, replacement in replaced.items():
            owner, _, leaf = f"{path}.{layer}".rpartition(".")
            attributes.setdefault(owner, {})[leaf] = replacement
    return attributes


def _living_halves(sizes: dict[str, int]) -> list[str]:
    """Return the halves of a block that have any width."""
    widths = {"attention": sizes["num_attention_heads"], "mlp": sizes["intermediate_size"]}
    return [half for half, width in widths.items() if width]


def block_params(
    width: str, attention: str, mlp: str, qkv_bias: bool, names: BlockNames = STOCK_NAMES
) -> list[Term]:
    """Return the number of parameters of one block, as a sum over terms.

    Args:
        width: submodule of the residual stream.
        attention: name of the block's attention.
        mlp: name of its MLP.
        qkv_bias: whether queries, keys and values have biases.
        names: of its layers.
    """
    qkv_biases = len(names.attention_inputs) if qkv_bias else 0
    return [
        Term(len(names.attention_inputs) + 1, (width, attention)),
        Term(qkv_biases, (attention,)),
        Term(names.mlp_matrices, (width, mlp)),
        Term(len(names.mlp_inputs), (mlp,)),
        # Output bias, and weight and bias of the LayerNorm.
        Term(1 + 2, (width, presence_of(attention))),
        Term(1 + 2, (width, presence_of(mlp))),
    ]


def common_scale(field: str, head_dims: list[int], scale_field: str) -> float:
    """Return the factor on the attention logits that heads of these widths imply.

    Heads of width 0 imply none.

    Raises:
        UnsupportedArchitectureError: for heads of several widths, whose factors differ.
    """
    widths = set(head_dims) - {0} or {1}
    if len(widths) > 1:
        raise UnsupportedArchitectureError(
            f"{field} is {head_dims} and {scale_field} is not given, so each width implies a "
            "factor of its own on the attention logits, which would change when heads shrink; "
            f"only models with {scale_field} are supported."
        )
    return widths.pop() ** -0.5
