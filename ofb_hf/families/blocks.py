"""A pre-norm transformer block as a table of layer names: its units, slots, norms, parameters."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .bases import HeadBasis, NormReaders
from .description import (
    Attributes,
    Slot,
    Submodule,
    Term,
    UnsupportedArchitectureError,
    presence_of,
)


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
        attention_others: other layers of the attention, which are missing when it has no heads.
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
        """Half of the block -> its layers but the norm, which are missing when it has no units."""
        attention = (*self.attention_inputs, self.attention_output, *self.attention_others)
        return {"attention": attention, "mlp": (*self.mlp_inputs, self.mlp_output)}


STOCK_NAMES = BlockNames()


@dataclass(frozen=True)
class Block:
    """One block of a concrete network.

    Args:
        path: of the module in the model.
        name: how the names of its submodules begin.
        sizes: `num_attention_heads`, `head_dim` and `intermediate_size`.
        names: of its layers.
    """

    path: str
    name: str
    sizes: dict[str, int]
    names: BlockNames = STOCK_NAMES

    @property
    def attention(self) -> str:
        """The name of its attention."""
        return f"{self.name}.attention"

    @property
    def mlp(self) -> str:
        """The name of its MLP."""
        return f"{self.name}.mlp"

    def at(self, layer: str) -> str:
        """Return the path of one of its layers in the model."""
        return f"{self.path}.{layer}"

    def submodules(self, *attention_slots: Slot) -> tuple[Submodule, Submodule]:
        """Return attention and MLP.

        Args:
            attention_slots: of the attention, besides those of its linear layers.
        """
        attention = Submodule(
            self.attention,
            "attention",
            (self.sizes["num_attention_heads"], self.sizes["head_dim"]),
            (*self._unit_slots("attention"), *attention_slots),
            constants=(self.at(f"{self.names.attention_output}.bias"),),
            block=self.path,
            entry=self.at(self.names.attention_norm),
            output=self.at(self.names.attention_output),
        )
        mlp = Submodule(
            self.mlp,
            "mlp",
            (self.sizes["intermediate_size"],),
            self._unit_slots("mlp"),
            constants=(self.at(f"{self.names.mlp_output}.bias"),),
            block=self.path,
            entry=self.at(self.names.mlp_norm),
            output=self.at(self.names.mlp_output),
        )
        return attention, mlp

    def _unit_slots(self, half: str) -> tuple[Slot, ...]:
        """Return the slots of a half's linear layers that run over its units."""
        slots: list[Slot] = []
        if half == "attention":
            output = self.names.attention_output
            for layer in self.names.attention_inputs:
                slots += linear_slots(self.at(layer), 0, gated=True)
        else:
            output = self.names.mlp_output
            # A gate projection multiplies the first layer's outputs: one gate is enough.
            for layer in self.names.mlp_inputs:
                is_gated = layer == self.names.mlp_inputs[0]
                slots += linear_slots(self.at(layer), 0, gated=is_gated)
        # The output layer reads the units. It is not gated as well, or they would be scaled twice.
        slots += linear_slots(self.at(output), 1)
        return tuple(slots)

    @property
    def residual_slots(self) -> list[Slot]:
        """Where it reads and writes the residual stream."""
        names = self.names
        slots: list[Slot] = []
        for layer in (*names.attention_inputs, *names.mlp_inputs):
            slots += linear_slots(self.at(layer), 1)
        # A channel is off only if no layer writes it, so every writer is gated.
        for layer in (names.attention_output, names.mlp_output):
            slots += linear_slots(self.at(layer), 0, gated=True)
        for norm in names.norms.values():
            slots += norm_slots(self.at(norm))
        return slots

    @property
    def norms(self) -> list[str]:
        """The paths of its norms; a half without width has none."""
        norms = self.names.norms.items()
        return [self.at(norm) for half, norm in norms if half not in self.left_out]

    @property
    def left_out(self) -> list[str]:
        """The halves without width."""
        widths = {
            "attention": self.sizes["num_attention_heads"],
            "mlp": self.sizes["intermediate_size"],
        }
        return [half for half, width in widths.items() if not width]

    @property
    def attributes(self) -> Attributes:
        """What its modules store next to their weights.

        These are the sizes of the attention, and for a half without width what takes the place of
        its norm and layers.
        """
        sizes = {name: self.sizes[name] for name in ("num_attention_heads", "head_dim")}
        attributes: Attributes = {self.path: {}, self.at(self.names.attention): sizes}
        for half in self.left_out:
            # None for the layers. The norm may still be called, so it becomes an identity.
            replaced: dict[str, Any] = dict.fromkeys(self.names.layers[half])
            replaced[self.names.norms[half]] = nn.Identity()
            for layer, replacement in replaced.items():
                owner, _, leaf = self.at(layer).rpartition(".")
                attributes.setdefault(owner, {})[leaf] = replacement
        return attributes

    @property
    def head_bases(self) -> list[HeadBasis]:
        """What may change its basis in the attention, if there is one."""
        if "attention" in self.left_out:
            return []
        queries, keys, values = self.names.attention_inputs
        return [
            HeadBasis(
                name=self.attention,
                module=self.at(self.names.attention),
                num_heads=self.sizes["num_attention_heads"],
                head_dim=self.sizes["head_dim"],
                queries=self.at(queries),
                keys=self.at(keys),
                values=self.at(values),
                output=self.at(self.names.attention_output),
            )
        ]

    @property
    def writers(self) -> list[str]:
        """The paths of the layers that write into the residual stream."""
        outputs = {
            "attention": self.names.attention_output,
            "mlp": self.names.mlp_output,
        }
        return [self.at(layer) for half, layer in outputs.items() if half not in self.left_out]

    def norm_readers(self, padded: bool = False) -> list[NormReaders]:
        """Return its norms with the layers that read them.

        Args:
            padded: whether the attention's input may be padded with zeros behind its norm.
        """
        readers = []
        if "attention" not in self.left_out:
            layers = tuple(self.at(layer) for layer in self.names.attention_inputs)
            readers.append(NormReaders(self.at(self.names.attention_norm), layers, padded=padded))
        if "mlp" not in self.left_out:
            layers = tuple(self.at(layer) for layer in self.names.mlp_inputs)
            readers.append(NormReaders(self.at(self.names.mlp_norm), layers))
        return readers

    def params(self, width: str, qkv_bias: bool) -> list[Term]:
        """Return its number of parameters as a sum over terms.

        Args:
            width: submodule of the residual stream.
            qkv_bias: whether queries, keys and values have biases.
        """
        projections = len(self.names.attention_inputs)
        qkv_biases = projections if qkv_bias else 0
        # Bias of the output, and weight and bias of the LayerNorm.
        vectors = 1 + 2
        return [
            Term(projections + 1, (width, self.attention)),
            Term(qkv_biases, (self.attention,)),
            Term(self.names.mlp_matrices, (width, self.mlp)),
            Term(len(self.names.mlp_inputs), (self.mlp,)),
            Term(vectors, (width, presence_of(self.attention))),
            Term(vectors, (width, presence_of(self.mlp))),
        ]


def linear_slots(
    path: str,
    axis: int,
    gated: bool = False,
) -> tuple[Slot, ...]:
    """Return the slots of a linear or convolution layer.

    Args:
        path: of the layer.
        axis: 0 for its outputs (weight and bias), 1 for its inputs (weight).
        gated: whether the bi-mask scales them.
    """
    weight = Slot(f"{path}.weight", axis, gated)
    if axis == 1:
        return (weight,)
    return weight, Slot(f"{path}.bias", axis, gated)


def norm_slots(
    path: str,
    gated: bool = False,
    tiles: int = 1,
) -> tuple[Slot, ...]:
    """Return the slots of a LayerNorm; arguments as for `Slot`."""
    return (
        Slot(f"{path}.weight", 0, gated, tiles),
        Slot(f"{path}.bias", 0, gated, tiles),
    )


def common_scale(
    field: str,
    head_dims: list[int],
    scale_field: str,
) -> float:
    """Return the factor on the attention logits that heads of these widths imply.

    Heads of width 0 imply none.

    Raises:
        UnsupportedArchitectureError: for heads of several widths, whose factors differ.
    """
    # Without any heads the factor does not matter.
    widths = set(head_dims) - {0} or {1}
    if len(widths) > 1:
        raise UnsupportedArchitectureError(
            f"{field} is {head_dims} and {scale_field} is not given, so each width implies a "
            "factor of its own on the attention logits, which would change when heads shrink; "
            f"only models with {scale_field} are supported."
        )
    return widths.pop() ** -0.5
