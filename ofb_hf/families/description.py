"""The data classes that describe a model family: unit groups, and costs as sums of products.

A *submodule* owns units that are kept or removed. Removing one touches many tensors at once: all of
them, each with its axis, form the submodule's unit group (`Slot`s). A slot that is *gated* is
multiplied by the bi-mask where the unit's value is written, which switches the unit off everywhere;
the other slots only read it. Slicing all slots of the group removes the unit for good. Costs are
sums of products of submodule sizes (`Term`s), for integers and for tensors, over the forward parts
(`Part`s).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .bases import Bases

# Units of a submodule: (U,), or (heads, channels per head).
Shape = tuple[int, ...]
# Submodule name -> its units.
Sizes = dict[str, Shape]
# Module path -> {attribute: value}.
Attributes = dict[str, dict[str, Any]]


class UnsupportedArchitectureError(ValueError):
    """The model or config belongs to no family that can be searched."""


# ------------------------------------------------------------------------------------------- units


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor that runs over a submodule's units.

    Args:
        parameter: name of the tensor.
        axis: which of its axes.
        gated: whether the bi-mask scales it.
        tiles: how many copies of all units follow each other along the axis (patch merging
            concatenates 4).
        per_head: whether the axis runs over the heads of a grid instead of its (head, channel)
            pairs.
    """

    parameter: str
    axis: int
    gated: bool = False
    tiles: int = 1
    per_head: bool = False

    def indices(self, kept: Tensor, shape: Shape) -> Tensor:
        """Return the positions along the axis to keep.

        Args:
            kept: (K,) flat indices of the units to keep.
            shape: all units, (U,) or (heads, channels per head).
        """
        units = math.prod(shape)
        if self.per_head:
            heads, channels = shape
            kept = torch.unique(kept // channels)
            units = heads
        copies = [kept + tile * units for tile in range(self.tiles)]
        return torch.cat(copies)  # (tiles * K,)


@dataclass(frozen=True)
class Submodule:
    """A place that owns units to choose from.

    Args:
        name: as in `SubnetSpec.kept`.
        kind: `embedding`, `attention` or `mlp`.
        shape: current units, (U,) or (heads, channels per head).
        slots: every axis of every tensor that runs over the units.
        norms: paths of the LayerNorms over the units, whose statistics must skip removed units.
        constants: tensors that it adds whichever of its units are kept, and that go with the last
            of them (biases of output projections).
        variant: tells apart submodules of one kind and stage whose computation differs (shifted
            windows).
        block: path of the module that this attention or MLP is one half of; "" for residual widths.
        entry: path of the module that this half of a block calls first, its norm.
        output: path of the layer by which this half of a block writes into the residual stream.
    """

    name: str
    kind: Literal["embedding", "attention", "mlp"]
    shape: Shape
    slots: tuple[Slot, ...]
    norms: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    variant: str = ""
    block: str = ""
    entry: str = ""
    output: str = ""

    @property
    def gates(self) -> list[tuple[str, str, int]]:
        """What its bi-mask scales: (tensor, quantity whose gate scales it, axis)."""
        gates: list[tuple[str, str, int]] = []
        for slot in self.slots:
            if slot.gated:
                gates.append((slot.parameter, self.name, slot.axis))
        # As present as the submodule's best unit.
        presence = presence_of(self.name)
        gates += [(tensor, presence, 0) for tensor in self.constants]
        return gates


# ------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Term:
    """`coefficient` times the product of at most two quantities, named as in `quantities`."""

    coefficient: int
    factors: tuple[str, ...] = ()


def heads_of(name: str) -> str:
    """Name the quantity that counts the heads of an attention.

    The attention's own name counts its (head, channel) pairs.
    """
    return f"{name}.heads"


def presence_of(name: str) -> str:
    """Name the quantity that is 1 as long as a submodule has any unit, and 0 afterwards."""
    return f"{name}.presence"


def quantities(sizes: Sizes) -> dict[str, int]:
    """Return everything that cost terms multiply.

    Args:
        sizes: submodule name -> (U,) or (heads, channels per head).

    Returns:
        The units of every submodule by its name, then the heads of every attention, then the
        presence of every submodule.
    """
    amounts = {name: math.prod(shape) for name, shape in sizes.items()}
    for name, shape in sizes.items():
        if len(shape) == 2:
            amounts[heads_of(name)] = shape[0]
    for name in sizes:
        amounts[presence_of(name)] = min(1, amounts[name])
    return amounts


@dataclass(frozen=True)
class Part:
    """A forward part: a piece of the forward pass that is timed as one.

    Args:
        name: the submodule, or `layers.3.reduction`, `stem`, `stages.0.merging`, `head`.
        kind: parts of one kind share the coefficients of their time.
        macs: multiply-accumulates of one image.
        products: the terms that its time is a sum of, by name; each gets a measured coefficient
            (`cost/latency.py`).
    """

    name: str
    kind: str
    macs: tuple[Term, ...]
    products: dict[str, Term]


def macs_of(parts: Iterable[Part]) -> tuple[Term, ...]:
    """Return the MACs of some forward parts as a sum over terms."""
    return tuple(term for part in parts for term in part.macs)


# ----------------------------------------------------------------------------- models and families


@dataclass(frozen=True)
class Architecture:
    """One concrete network: its submodules, what they cost, and where images enter it.

    Args:
        submodules: in the order of the model.
        parts: in the order of the forward pass; together they are all of it.
        params: number of parameters as a sum over terms.
        patch_grid: patches of an image, (rows, columns).
        patch_size: pixels along a side of a patch.
        token_grid: final patch tokens of an image, (rows, columns).
        token_size: pixels along a side of the square that a final token stands for.
        num_channels: colour channels.
        first_width: submodule of the residual stream where patches enter.
        last_width: submodule of the residual stream where tokens leave.
        mask_token: name of the parameter that stands in for hidden patches.
        owns_mask_token: whether the classifier has that parameter anyway; otherwise a search adds
            it and removes it again.
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
    mask_token: str
    activation: str
    owns_mask_token: bool = False

    @property
    def macs(self) -> tuple[Term, ...]:
        """MACs of one image as a sum over terms."""
        return macs_of(self.parts)

    @property
    def sizes(self) -> Sizes:
        """Submodule name -> current units, (U,) or (heads, channels per head)."""
        return {submodule.name: submodule.shape for submodule in self.submodules}

    @property
    def embeddings(self) -> str:
        """Path of the module that makes tokens of pixels; it has the mask token."""
        return self.mask_token.rpartition(".")[0]

    @property
    def left_out(self) -> list[str]:
        """Names of the submodules that have no units."""
        return [name for name, shape in self.sizes.items() if not math.prod(shape)]

    @property
    def attentions(self) -> list[str]:
        """Names of the attentions. A network needs one of them, or no token sees another."""
        return [submodule.name for submodule in self.submodules if submodule.kind == "attention"]


@dataclass(frozen=True)
class TokenReductions:
    """What a family offers whose classifiers can follow a token schedule.

    Its tokens begin with one class token, by whose attention patch tokens are ranked. Our config
    class has `token_schedule`, `token_counts(layer)` and `stored_schedule(schedule)`, and its
    attentions are called `layers.0.attention`, `layers.1.attention`, ...: see `OFBViTConfig`.

    Args:
        parts: (config, schedule) -> the forward parts of the classifier under a token schedule
            whose counts do not rise; counts may be scalar tensors.
        layer_parts: (layer, before, kept, merged, weighs) -> the forward parts of one layer;
            counts as for `reducing_block`.
        layers: classifier -> its layers in order; each holds its token reduction, or None, as the
            attribute `reduction`.
    """

    parts: Callable[[Any, Any], tuple[Part, ...]]
    layer_parts: Callable[..., tuple[Part, ...]]
    layers: Callable[[PreTrainedModel], Iterable[nn.Module]]


@dataclass(frozen=True)
class StockTwin:
    """How our classifier becomes one of transformers' own, with equal widths in all layers.

    Our config class has `attention_scale`, `layer_sizes(layer)` and, for each of `sizes`, a list
    called `SIZE_per_layer`; the stock config has one field of each name.

    Args:
        sizes: names of the widths of a layer, `head_dim` among them.
        query_parameters: number of a layer -> names of the tensors that make queries out of its
            tokens.
        with_layers: (state, numbers of layers) -> the state of a classifier that has these layers
            only.
    """

    sizes: tuple[str, ...]
    query_parameters: Callable[[int], list[str]]
    with_layers: Callable[[dict[str, Tensor], list[int]], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """The functions that connect one model family to the rest of the package.

    Args:
        stock_class: the classifier of transformers.
        model_class: our classifier, a subclass of it whose widths are read from its config. Its
            `from_dense(stock classifier)` copies one.
        describe: config, stock or ours, -> architecture.
        pin: writes into a config what it would otherwise derive from widths that are about to
            change.
        resize: writes submodule sizes into a config.
        attributes: config -> {module path: {attribute: value}} of what modules store next to their
            weights: sizes, and what stands in for layers without width.
        undecayed: endings of the names of parameters without weight decay, besides vectors.
        bases: config of one of our classifiers -> where it may be rotated without a change of its
            function.
        tokens: None if the family's classifiers cannot follow a token schedule.
        stock_twin: None if stock classifiers cannot have our widths, padded or not.
        only_logits: pixel values (B, C, H, W) -> what our classifier is called with in addition
            where nothing but its logits is needed; None for nothing.
    """

    stock_class: type[PreTrainedModel]
    model_class: type[PreTrainedModel]
    describe: Callable[[Any], Architecture]
    pin: Callable[[Any], None]
    resize: Callable[[Any, Sizes], None]
    attributes: Callable[[Any], Attributes]
    undecayed: tuple[str, ...]
    bases: Callable[[Any], Bases]
    tokens: TokenReductions | None = None
    stock_twin: StockTwin | None = None
    only_logits: Callable[[Tensor], dict[str, Any]] | None = None

    def from_dense(self, model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
        """Copy a stock classifier, or one of this package, into our class; see its `from_dense`."""
        return self.model_class.from_dense(model, **changes)


# ------------------------------------------------------------------------------------------- images


def image_sides(config: PreTrainedConfig) -> tuple[int, int]:
    """Return height and width, in pixels, of the images a model was made for."""
    return _pair(config.image_size)


def square_patch(config: PreTrainedConfig) -> int:
    """Return the pixels along a side of a model's patches.

    Raises:
        UnsupportedArchitectureError: for patches that are not square.
    """
    height, width = _pair(config.patch_size)
    if height != width:
        raise UnsupportedArchitectureError(
            f"patch_size is {(height, width)}; only square patches are supported."
        )
    return height


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
