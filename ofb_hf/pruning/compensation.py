"""After a cut, what stays makes up for what went: layers that write into the residual stream are
fitted anew.

A removed MLP or head channel said something that the others partly know as well. So each linear
layer whose outputs are added to the residual stream is fitted, by ridge regression, to write what
the same layer of the uncut network writes:
layer by layer in the order of the forward pass, each on inputs as the layers before it now produce
them. That is the reconstruction step of channel pruning (arXiv:1707.06168, eq. 1) for residual
networks of attentions and MLPs. It takes two forward passes over some hundred images, no labels and
no gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..families.description import Architecture
from ..families.registry import describe
from ..families.subnet import SubnetSpec
from ..models.modeling_ofb_vit import OFBViTLayer

# How strongly weights are held where they are, relative to the mean square of the inputs.
RIDGE = 1e-2
# Floats of remembered outputs, 1 GiB; with more images than this many the fit is hardly better.
MEMORY, MOST_IMAGES = 2**28, 256
IMAGES_FILE = "remembered_images.safetensors"


def writers(model: PreTrainedModel) -> dict[str, str]:
    """The linear layers that write into the residual stream: module path -> the submodule of its
    outputs."""
    found, modules = {}, dict(model.named_modules())
    for submodule in describe(model.config).submodules:
        for slot in submodule.slots:
            path, _, name = slot.parameter.rpartition(".")
            written = (
                submodule.kind == "embedding" and slot.gated and slot.axis == 0 and name == "weight"
            )
            if written and isinstance(modules.get(path), nn.Linear):
                found[path] = submodule.name
    return found


def images_to_remember(model: PreTrainedModel) -> int:
    """How many images a fit should have, so that what the layers write for them fits into
    `MEMORY`."""
    architecture: Architecture = describe(model.config)
    tokens = architecture.patch_grid[0] * architecture.patch_grid[1] + 1
    floats = tokens * sum(architecture.sizes[of][0] for of in writers(model).values())
    return max(1, min(MOST_IMAGES, MEMORY // max(floats, 1)))


class Compensation:
    """Images of the first steps of a search and the network as it was then, until the choice is
    made.

    Args:
        dense: the uncut classifier, ours.
    """

    def __init__(self, dense: PreTrainedModel):
        self.dense, self.count = dense, images_to_remember(dense)
        self._images: list[Tensor] = []

    def remember(self, pixel_values: Tensor) -> None:
        """Keeps images (B, channels, height, width), as long as there are too few."""
        missing = self.count - sum(map(len, self._images))
        if missing > 0:
            self._images.append(pixel_values[:missing].detach().clone())

    def fit_(self, small: PreTrainedModel, subnet: SubnetSpec) -> dict[str, Tensor]:
        """Fits a cut classifier, in place, if any images are remembered; arguments as for
        `compensate_`.

        Returns:
            The parameters that were fitted, by name, on the CPU.
        """
        if not self._images:
            return {}
        fitted = compensate_(small, self.dense.to(small.device), subnet, torch.cat(self._images))
        return {name: small.get_parameter(name).detach().cpu() for name in fitted}

    def save(self, folder: Path) -> None:
        """Writes the images into a checkpoint."""
        if self._images:
            safetensors.torch.save_file(
                {"pixel_values": torch.cat(self._images)}, folder / IMAGES_FILE
            )

    def load(self, folder: Path, device: torch.device) -> None:
        """Reads them from a checkpoint; one that was saved after the choice has none."""
        file = folder / IMAGES_FILE
        saved = safetensors.torch.load_file(file).values() if file.is_file() else []
        self._images = [images.to(device) for images in saved]


@torch.no_grad()
def compensate_(
    small: PreTrainedModel, dense: PreTrainedModel, subnet: SubnetSpec, pixel_values: Tensor
) -> list[str]:
    """Fits the layers of a cut classifier that write into the residual stream, in place.

    Args:
        small: `dense` cut to `subnet`, and perhaps trained since.
        dense: the uncut classifier, ours or stock.
        subnet: which units of `dense` are left.
        pixel_values: (B, channels, height, width), images as in training; see `images_to_remember`.

    Returns:
        The names of the parameters that were fitted.
    """
    layers = writers(small)
    fitted = [
        f"{path}.{name}"
        for path in layers
        for name, _ in small.get_submodule(path).named_parameters()
    ]
    written = _outputs(
        dense, {path: subnet.kept.get(of) for path, of in layers.items()}, pixel_values
    )
    hooks = [
        small.get_submodule(path).register_forward_pre_hook(
            partial(_fit_first, wanted=written[path])
        )
        for path in layers
    ]
    _run(small, pixel_values, hooks)
    return fitted


def _outputs(
    model: PreTrainedModel, kept: dict[str, tuple[int, ...] | None], pixel_values: Tensor
) -> dict[str, Tensor]:
    """What layers give out, channels that are left only: module path -> (rows, channels)."""
    outputs: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: tuple, output: Tensor, path: str) -> None:
        rows, channels = output.flatten(0, -2), kept[path]
        outputs[path] = rows if channels is None else rows[:, list(channels)]

    hooks = [
        model.get_submodule(path).register_forward_hook(partial(remember, path=path))
        for path in kept
    ]
    _run(model, pixel_values, hooks)
    return outputs


def _run(
    model: PreTrainedModel, pixel_values: Tensor, hooks: list[torch.utils.hooks.RemovableHandle]
) -> None:
    was_training = model.training
    try:
        with _all_tokens(model):  # row by row the same tokens in both networks
            model.eval()(pixel_values=pixel_values)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


@contextmanager
def _all_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Lets all tokens pass through a model with a token schedule."""
    reductions = [
        (layer, layer.reduction) for layer in model.modules() if isinstance(layer, OFBViTLayer)
    ]
    for layer, _ in reductions:
        layer.reduction = None
    try:
        yield
    finally:
        for layer, reduction in reductions:
            layer.reduction = reduction


def _fit_first(layer: nn.Linear, args: tuple[Tensor], wanted: Tensor) -> None:
    """Before a layer runs: solves min |inputs W' + b - wanted|^2 + ridge |(W, b) - (W, b) as they
    are|^2."""
    inputs = args[0].flatten(0, -2).float()
    if layer.bias is not None:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    missing = wanted.float() - F.linear(args[0], layer.weight, layer.bias).flatten(0, -2).float()
    # In double precision where it counts, and on the CPU, for not every device has it.
    gram, cross = ((inputs.mT @ other).cpu().double() for other in (inputs, missing))
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram, cross).mT.to(layer.weight)
    layer.weight += change[:, : layer.in_features]
    if layer.bias is not None:
        layer.bias += change[:, -1]
