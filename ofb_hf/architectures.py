"""What a search needs to know about a model family; the only file that spells module paths.

A *submodule* owns units that are kept or removed. Removing one touches many tensors at once: all of them, each with
its axis, form the submodule's unit group (`Slot`s). A slot that is *gated* is multiplied by the bi-mask where the
unit's value is written, which switches the unit off everywhere; the others only read it. Slicing all slots of the
group removes the unit for good. Costs are sums of products of submodule sizes (`Term`s), for integers and for tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification

from .models.configuration_ofb_vit import OFBViTConfig
from .models.modeling_ofb_vit import OFBViTForImageClassification


class UnsupportedArchitectureError(ValueError):
    """The model or config belongs to no family that can be searched."""


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor that runs over a submodule's units."""

    parameter: str
    axis: int
    gated: bool = False


@dataclass(frozen=True)
class Submodule:
    """A place with units to choose from.

    Args:
        name: as in `SubnetSpec.kept`.
        kind: `embedding`, `attention` or `mlp`.
        shape: current units, (U,) or (heads, channels per head).
        slots: every axis of every tensor that runs over the units.
        norms: LayerNorms over the units, whose statistics must skip removed ones.
    """

    name: str
    kind: Literal["embedding", "attention", "mlp"]
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Term:
    """`coefficient` times the product of the sizes (units) of at most two submodules."""

    coefficient: int
    factors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One concrete network: its submodules, what they cost, and where images enter it.

    Args:
        submodules: in the order of the model.
        macs, params: cost of one image, and size, as sums over terms.
        image_size, patch_grid, patch_size, num_channels: pixels (height, width), patches (rows, columns), pixels.
        embeddings: path of the module that owns `mask_token`.
        activation: name of the MLP's activation function.
    """

    submodules: tuple[Submodule, ...]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    image_size: tuple[int, int]
    patch_grid: tuple[int, int]
    patch_size: int
    num_channels: int
    embeddings: str
    activation: str

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Submodule name -> current units, (U,) or (heads, channels per head)."""
        return {submodule.name: submodule.shape for submodule in self.submodules}


@dataclass(frozen=True)
class Family:
    """The functions that connect one model family to everything else.

    Args:
        describe: config -> architecture.
        from_dense: stock classifier -> ours.
        pin: writes into a config what it would otherwise derive from widths that are about to change.
        resize: writes submodule sizes into a config.
        attributes: config -> {module path: {attribute: value}} of sizes that modules keep beside their weights.
        forward_masked: (model, pixel_values, bool_masked_pos) -> logits (B, classes), patch tokens (B, N, C).
        model_class: our classifier.
    """

    describe: Callable[[Any], Architecture]
    from_dense: Callable[[PreTrainedModel], PreTrainedModel]
    pin: Callable[[Any], None]
    resize: Callable[[Any, dict[str, tuple[int, ...]]], None]
    attributes: Callable[[Any], dict[str, dict[str, int]]]
    forward_masked: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    model_class: type[PreTrainedModel]


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _linear(path: str, axis: int, gated: bool = False) -> tuple[Slot, ...]:
    """The slots of a linear or convolution layer: its outputs (axis 0, weight and bias) or its inputs (axis 1)."""
    names = ("weight", "bias") if axis == 0 else ("weight",)
    return tuple(Slot(f"{path}.{name}", axis, gated) for name in names)


def _norm(path: str) -> tuple[Slot, ...]:
    return (Slot(f"{path}.weight", 0), Slot(f"{path}.bias", 0))


def _describe_vit(config: ViTConfig) -> Architecture:
    image_size, patch = _pair(config.image_size), _pair(config.patch_size)
    if patch[0] != patch[1]:
        raise UnsupportedArchitectureError(f"patch_size is {patch}; only square patches are supported.")
    grid = (image_size[0] // patch[0], image_size[1] // patch[0])
    patches, pixels = grid[0] * grid[1], config.num_channels * patch[0] ** 2
    tokens = patches + 1

    residual = [
        *_linear("vit.embeddings.patch_embeddings.projection", 0, gated=True),
        *(Slot(f"vit.embeddings.{name}", 2, gated=True) for name in ("cls_token", "position_embeddings", "mask_token")),
        *_norm("vit.layernorm"),
        *_linear("classifier", 1),
    ]
    norms = ["vit.layernorm"]
    submodules: list[Submodule] = []
    macs = [Term(patches * pixels, ("embeddings",)), Term(config.num_labels, ("embeddings",))]
    params = [Term(pixels + 1 + 1 + tokens + 2 + config.num_labels, ("embeddings",)), Term(config.num_labels)]
    for layer in range(config.num_hidden_layers):
        path = f"vit.layers.{layer}"
        attention, mlp = _vit_submodules(config, layer)
        submodules += [attention, mlp]
        residual += _vit_residual_slots(path)
        norms += [f"{path}.layernorm_before", f"{path}.layernorm_after"]
        macs += [
            Term(4 * tokens, ("embeddings", attention.name)),  # q, k, v and output projections
            Term(2 * tokens**2, (attention.name,)),  # attention map, and its product with v
            Term(2 * tokens, ("embeddings", mlp.name)),
        ]
        params += [
            Term(4, ("embeddings", attention.name)),
            Term(3 * bool(config.qkv_bias), (attention.name,)),
            Term(2, ("embeddings", mlp.name)),
            Term(1, (mlp.name,)),
            Term(1 + 1 + 2 * 2, ("embeddings",)),  # biases of o_proj and fc2, two LayerNorms
        ]
    embedding = Submodule("embeddings", "embedding", (config.hidden_size,), tuple(residual), tuple(norms))
    return Architecture(
        submodules=(embedding, *submodules),
        macs=tuple(macs),
        params=tuple(params),
        image_size=image_size,
        patch_grid=grid,
        patch_size=patch[0],
        num_channels=config.num_channels,
        embeddings="vit.embeddings",
        activation=config.hidden_act,
    )


def _vit_submodules(config: ViTConfig, layer: int) -> tuple[Submodule, Submodule]:
    """Attention and MLP of one layer."""
    path = f"vit.layers.{layer}"
    sizes = (OFBViTConfig.layer_sizes if isinstance(config, OFBViTConfig) else _dense_vit_layer_sizes)(config, layer)
    rows = [slot for name in "qkv" for slot in _linear(f"{path}.attention.{name}_proj", 0, gated=True)]
    attention = Submodule(
        f"layers.{layer}.attention",
        "attention",
        (sizes["num_attention_heads"], sizes["head_dim"]),
        (*rows, *_linear(f"{path}.attention.o_proj", 1)),
    )
    mlp = Submodule(
        f"layers.{layer}.mlp",
        "mlp",
        (sizes["intermediate_size"],),
        (*_linear(f"{path}.mlp.fc1", 0, gated=True), *_linear(f"{path}.mlp.fc2", 1)),
    )
    return attention, mlp


def _vit_residual_slots(path: str) -> list[Slot]:
    """Where one layer reads and writes the residual stream."""
    readers = [f"{path}.attention.{name}_proj" for name in "qkv"] + [f"{path}.mlp.fc1"]
    writers = [f"{path}.attention.o_proj", f"{path}.mlp.fc2"]
    slots = [slot for reader in readers for slot in _linear(reader, 1)]
    slots += [slot for writer in writers for slot in _linear(writer, 0, gated=True)]
    return slots + [slot for norm in ("layernorm_before", "layernorm_after") for slot in _norm(f"{path}.{norm}")]


def _dense_vit_layer_sizes(config: ViTConfig, layer: int) -> dict[str, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_attention_heads": config.num_attention_heads,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
    }


def _pin_vit(config: OFBViTConfig) -> None:
    """Writes down what the stock config derives from widths, so that it survives when widths change."""
    config.attention_scale = config.attention_scale or config.layer_sizes(0)["head_dim"] ** -0.5
    _resize_vit(config, _describe_vit(config).sizes)


def _resize_vit(config: OFBViTConfig, sizes: dict[str, tuple[int, ...]]) -> None:
    layers = range(config.num_hidden_layers)
    config.hidden_size = sizes["embeddings"][0]
    config.num_attention_heads_per_layer = [sizes[f"layers.{layer}.attention"][0] for layer in layers]
    config.head_dim_per_layer = [sizes[f"layers.{layer}.attention"][1] for layer in layers]
    config.intermediate_size_per_layer = [sizes[f"layers.{layer}.mlp"][0] for layer in layers]


def _vit_attributes(config: OFBViTConfig) -> dict[str, dict[str, int]]:
    attributes = {}
    for layer in range(config.num_hidden_layers):
        sizes = config.layer_sizes(layer)
        attributes[f"vit.layers.{layer}.attention"] = {
            "num_attention_heads": sizes["num_attention_heads"],
            "head_dim": sizes["head_dim"],
        }
    return attributes


def _forward_masked_vit(model: OFBViTForImageClassification, pixel_values: Tensor, masked_patches: Tensor):
    tokens = model.vit(pixel_values, bool_masked_pos=masked_patches).last_hidden_state
    return model.classifier(tokens[:, 0]), tokens[:, 1:]


_VIT = Family(
    describe=_describe_vit,
    from_dense=OFBViTForImageClassification.from_dense,
    pin=_pin_vit,
    resize=_resize_vit,
    attributes=_vit_attributes,
    forward_masked=_forward_masked_vit,
    model_class=OFBViTForImageClassification,
)

FAMILIES: dict[type[PreTrainedConfig], Family] = {ViTConfig: _VIT}
CLASSIFIERS: tuple[type[PreTrainedModel], ...] = (ViTForImageClassification,)


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
