"""The words in which a model family is described: unit groups, and costs as sums of products of
their sizes.

A *submodule* owns units that are kept or removed. Removing one touches many tensors at once: all of
them, each with its axis, form the submodule's unit group (`Slot`s). A slot that is *gated* is
multiplied by the bi-mask where the unit's value is written, which switches the unit off everywhere;
the others only read it. Slicing all slots of the group removes the unit for good. Costs are sums of
products of submodule sizes (`Term`s), for integers and for tensors, over the `Part`s of the forward
pass.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor that runs over a submodule's units.

    Args:
        parameter, axis: the tensor, and which of its axes.
        gated: whether the bi-mask scales it.
        tiles: how many copies of all units follow each other along the axis (patch merging
            concatenates 4).
        per_head: the axis runs over the heads of a grid, not over its (head, channel) pairs.
    """

    parameter: str
    axis: int
    gated: bool = False
    tiles: int = 1
    per_head: bool = False

    def indices(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Positions along the axis that stay.

        Args:
            kept: flat indices of the units that stay.
            shape: all units, (U,) or (heads, channels per head).
        """
        units = math.prod(shape)
        if self.per_head:
            kept, units = torch.unique(kept // shape[1]), shape[0]
        return torch.cat([kept + tile * units for tile in range(self.tiles)])


@dataclass(frozen=True)
class Submodule:
    """A place with units to choose from.

    Args:
        name: as in `SubnetSpec.kept`.
        kind: `embedding`, `attention` or `mlp`.
        shape: current units, (U,) or (heads, channels per head).
        slots: every axis of every tensor that runs over the units.
        norms: LayerNorms over the units, whose statistics must skip removed ones.
        constants: tensors that it adds whichever of its units are kept, and that go with the last
            one of them.
        variant: what it does besides, where not all of its kind in a stage do the same.
    """

    name: str
    kind: Literal["embedding", "attention", "mlp"]
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    norms: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    variant: str = ""

    @property
    def gates(self) -> list[tuple[str, str, int]]:
        """What its bi-mask scales: tensor, the quantity whose gate scales it, and along which
        axis."""
        units = [(slot.parameter, self.name, slot.axis) for slot in self.slots if slot.gated]
        return units + [(tensor, presence_of(self.name), 0) for tensor in self.constants]


@dataclass(frozen=True)
class Term:
    """`coefficient` times the product of at most two quantities, named as in `quantities`."""

    coefficient: int
    factors: tuple[str, ...] = ()


def heads_of(name: str) -> str:
    """The quantity that counts the heads of an attention, whose name alone counts (head, channel)
    pairs."""
    return f"{name}.heads"


def presence_of(name: str) -> str:
    """The quantity that is 1 as long as a submodule has any unit, and 0 afterwards."""
    return f"{name}.presence"


def quantities(sizes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """What cost terms multiply: the units of every submodule by its name, the heads of every
    attention, and whether there is anything left of a submodule.

    Args:
        sizes: submodule name -> (U,) or (heads, channels per head).
    """
    units = {name: math.prod(shape) for name, shape in sizes.items()}
    heads = {heads_of(name): shape[0] for name, shape in sizes.items() if len(shape) == 2}
    return units | heads | {presence_of(name): min(1, count) for name, count in units.items()}


@dataclass(frozen=True)
class Part:
    """A stretch of the forward pass that is timed as one.

    Args:
        name: the submodule, or `layers.3.reduction`, `stem`, `stages.0.merging`, `head`.
        kind: parts of one kind share the coefficients of their time.
        macs: multiply-accumulates of one image.
        products: what its time is a sum of, by name; before each stands a coefficient that is
            measured (`latency.py`).
    """

    name: str
    kind: str
    macs: tuple[Term, ...]
    products: dict[str, Term]


def macs_of(parts: Iterable[Part]) -> tuple[Term, ...]:
    """MACs as a cost."""
    return tuple(term for part in parts for term in part.macs)


@dataclass(frozen=True)
class Architecture:
    """One concrete network: its submodules, what they cost, and where images enter it.

    Args:
        submodules: in the order of the model.
        parts: in the order of the forward pass; together they are all of it.
        params: size as a sum over terms.
        patch_grid, patch_size: the patches that go in, (rows, columns), and pixels along a side of
        one.
        token_grid, token_size: the same for the patch tokens that come out.
        num_channels: colour channels.
        first_width, last_width: submodules of the residual stream where patches enter and tokens
        leave.
        embeddings: path of the module that owns `mask_token`.
        activation: name of the MLP's activation function.
    """

    submodules: tuple[Submodule, ...]
    parts: tuple[Part, ...]
    params: tuple[Term, ...]
    patch_grid: tuple[int, int]
    patch_size: int
    token_grid: tuple[int, int]
    token_size: int
    num_channels: int
    first_width: str
    last_width: str
    embeddings: str
    activation: str

    @property
    def macs(self) -> tuple[Term, ...]:
        """Cost of one image as a sum over terms."""
        return macs_of(self.parts)

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Submodule name -> current units, (U,) or (heads, channels per head)."""
        return {submodule.name: submodule.shape for submodule in self.submodules}

    @property
    def left_out(self) -> list[str]:
        """The submodules that have no units."""
        return [name for name, shape in self.sizes.items() if not math.prod(shape)]

    @property
    def attentions(self) -> list[str]:
        """The submodules of which a network needs one: through them its tokens see each other."""
        return [submodule.name for submodule in self.submodules if submodule.kind == "attention"]


@dataclass(frozen=True)
class Family:
    """The functions that connect one model family to everything else.

    Args:
        describe: config -> architecture.
        from_dense: stock classifier -> ours.
        pin: writes into a config what it would otherwise derive from widths that are about to
            change.
        resize: writes submodule sizes into a config.
        attributes: config -> {module path: {attribute: value}} of what modules keep beside their
            weights: sizes, and what stands in for layers that have no width.
        model_class: our classifier.
        undecayed: how the names of parameters end that weight decay leaves alone, besides vectors.
    """

    describe: Callable[[Any], Architecture]
    from_dense: Callable[[PreTrainedModel], PreTrainedModel]
    pin: Callable[[Any], None]
    resize: Callable[[Any, dict[str, tuple[int, ...]]], None]
    attributes: Callable[[Any], dict[str, dict[str, Any]]]
    model_class: type[PreTrainedModel]
    undecayed: tuple[str, ...]


class UnsupportedArchitectureError(ValueError):
    """The model or config belongs to no family that can be searched."""


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_sides(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images a model was made for, in pixels."""
    return _pair(config.image_size)


def square_patch(config: PreTrainedConfig) -> int:
    height, width = _pair(config.patch_size)
    if height != width:
        raise UnsupportedArchitectureError(
            f"patch_size is {(height, width)}; only square patches are supported."
        )
    return height
