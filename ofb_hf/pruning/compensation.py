"""Fit the layers that write into the residual stream anew, right after a cut.

A removed MLP or head channel contributed something that others partly know as well. So each linear
layer whose outputs are added to the residual stream is fitted, by ridge regression, to write what
the same layer of the uncut network writes: layer by layer in the order of the forward pass, each on
inputs as the layers before it now produce them. That is the reconstruction step of channel pruning
(arXiv:1707.06168, eq. 1) for residual networks of attentions and MLPs. It takes two forward passes
over some hundred images, no labels and no gradients.
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

from ..families.description import Slot, Submodule
from ..families.evaluation import evaluating
from ..families.registry import describe
from ..families.subnet import Kept, SubnetSpec
from ..families.token_reduction import set_token_reduction_, supports_tokens, token_reductions

# How strongly weights are held where they are, relative to the mean square of the inputs.
RIDGE = 1e-2
# Floats of remembered outputs, 1 GiB. More images than this make the fit hardly better.
MEMORY = 2**28
MOST_IMAGES = 256
IMAGES_FILE = "remembered_images.safetensors"


def writers(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers that write into the residual stream.

    Returns:
        Module path -> the residual width that the layer's outputs belong to.
    """
    found: dict[str, str] = {}
    modules = dict(model.named_modules())
    for submodule in describe(model.config).submodules:
        for slot in submodule.slots:
            path, _, name = slot.parameter.rpartition(".")
            is_linear = isinstance(modules.get(path), nn.Linear)
            if name == "weight" and is_linear and _is_written(submodule, slot):
                found[path] = submodule.name
    return found


def _is_written(submodule: Submodule, slot: Slot) -> bool:
    """Return whether a slot runs over outputs that are added to the residual stream."""
    return submodule.kind == "embedding" and slot.gated and slot.axis == 0


def images_to_remember(model: PreTrainedModel) -> int:
    """Return how many images a fit should use, so that the remembered outputs fit into `MEMORY`."""
    architecture = describe(model.config)
    rows, columns = architecture.patch_grid
    tokens = rows * columns + 1  # and a class token
    channels = 0
    for width in writers(model).values():
        channels += architecture.sizes[width][0]
    # There may be no such layers at all.
    images = MEMORY // max(tokens * channels, 1)
    return max(1, min(MOST_IMAGES, images))


class Compensation:
    """Images of the first steps of a search and the network at that time, until the choice is made.

    Args:
        dense: the uncut classifier, ours.
    """

    def __init__(self, dense: PreTrainedModel):
        self.dense = dense
        self.count = images_to_remember(dense)
        self._images: list[Tensor] = []

    def remember(self, pixel_values: Tensor) -> None:
        """Keep images (B, channels, height, width), as long as there are too few."""
        missing = self.count - sum(map(len, self._images))
        if missing > 0:
            self._images.append(pixel_values[:missing].detach().clone())

    def fit_(self, small: PreTrainedModel, subnet: SubnetSpec) -> dict[str, Tensor]:
        """Fit a cut classifier in place, if any images are remembered.

        Args:
            small: as for `compensate_`.
            subnet: as for `compensate_`.

        Returns:
            The parameters that were fitted, by name, on the CPU.
        """
        if not self._images:
            return {}
        images = torch.cat(self._images)
        fitted = compensate_(small, self.dense.to(small.device), subnet, images)
        return {name: small.get_parameter(name).detach().cpu() for name in fitted}

    def save(self, folder: Path) -> None:
        """Write the images into a checkpoint."""
        if self._images:
            tensors = {"pixel_values": torch.cat(self._images)}
            safetensors.torch.save_file(tensors, folder / IMAGES_FILE)

    def load(self, folder: Path, device: torch.device) -> None:
        """Read the images from a checkpoint; one that was saved after the choice has none."""
        self._images = []
        if (folder / IMAGES_FILE).is_file():
            saved = safetensors.torch.load_file(folder / IMAGES_FILE)
            self._images = [images.to(device) for images in saved.values()]


@torch.no_grad()
def compensate_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    subnet: SubnetSpec,
    pixel_values: Tensor,
) -> list[str]:
    """Fit the layers of a cut classifier that write into the residual stream, in place.

    Args:
        small: `dense` cut to `subnet`, and perhaps trained since.
        dense: the uncut classifier, ours or stock.
        subnet: the units of `dense` that `small` has.
        pixel_values: (B, channels, height, width), images as in training; see `images_to_remember`.

    Returns:
        The names of the parameters that were fitted.
    """
    layers = writers(small)
    fitted: list[str] = []
    for path in layers:
        layer = small.get_submodule(path)
        fitted += [f"{path}.{name}" for name, _ in layer.named_parameters()]
    kept = {path: subnet.kept.get(width) for path, width in layers.items()}
    written = _outputs(dense, kept, pixel_values)
    hooks = []
    for path in layers:
        fit = partial(_fit_first, wanted=written[path])
        hooks.append(small.get_submodule(path).register_forward_pre_hook(fit))
    _run(small, pixel_values, hooks)
    return fitted


def _outputs(
    model: PreTrainedModel,
    kept: dict[str, Kept | None],
    pixel_values: Tensor,
) -> dict[str, Tensor]:
    """Return what layers write.

    Args:
        model: the classifier.
        kept: module path -> the output channels to return, None for all.
        pixel_values: (B, channels, height, width).

    Returns:
        Module path -> (rows, channels), a row for each token of each image.
    """
    outputs: dict[str, Tensor] = {}

    def remember(
        module: nn.Module,
        args: tuple,
        output: Tensor,
        path: str,
    ) -> None:
        rows = output.flatten(0, -2)  # (B * N, channels)
        channels = kept[path]
        if channels is not None:
            rows = rows[:, list(channels)]
        outputs[path] = rows

    hooks = []
    for path in kept:
        hook = partial(remember, path=path)
        hooks.append(model.get_submodule(path).register_forward_hook(hook))
    _run(model, pixel_values, hooks)
    return outputs


def _run(
    model: PreTrainedModel,
    pixel_values: Tensor,
    hooks: list[torch.utils.hooks.RemovableHandle],
) -> None:
    """Run one forward pass in evaluation mode, and remove the hooks."""
    try:
        # Both networks have to see the same tokens, row by row.
        with evaluating(model), _all_tokens(model):
            model(pixel_values=pixel_values)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _all_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Let all tokens pass through a model with a token schedule, for the time of a block."""
    reductions: dict[int, nn.Module] = {}
    if supports_tokens(model.config):
        for layer, reduction in enumerate(token_reductions(model)):
            if reduction is not None:
                reductions[layer] = reduction
    for layer in reductions:
        set_token_reduction_(model, layer, None)
    try:
        yield
    finally:
        for layer, reduction in reductions.items():
            set_token_reduction_(model, layer, reduction)


def _fit_first(
    layer: nn.Linear,
    args: tuple[Tensor],
    wanted: Tensor,
) -> None:
    """Fit a layer right before it runs, on the inputs that it is about to get.

    It gets the (W, b) that minimise |inputs W' + b - wanted|^2 + ridge |(W, b) - (W, b) before|^2.

    Args:
        layer: the layer.
        args: its inputs, (..., in features).
        wanted: (rows, out features).
    """
    inputs = args[0].flatten(0, -2).float()  # (rows, in features)
    if layer.bias is not None:
        # The bias is the weight of an input that is always 1.
        ones = inputs.new_ones(len(inputs), 1)
        inputs = torch.cat([inputs, ones], 1)
    present = F.linear(args[0], layer.weight, layer.bias)
    present = present.flatten(0, -2).float()
    missing = wanted.float() - present  # (rows, out features)
    # In double precision where it counts, and on the CPU: not every device has it.
    gram = (inputs.mT @ inputs).cpu().double()  # (in, in)
    cross = (inputs.mT @ missing).cpu().double()  # (in, out)
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    gram += ridge * torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram, cross).mT.to(layer.weight)  # (out, in)
    layer.weight += change[:, : layer.in_features]
    if layer.bias is not None:
        layer.bias += change[:, -1]
