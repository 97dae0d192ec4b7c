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
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.registry import describe
from ..families.subnet import SubnetSpec
from ..families.token_reduction import set_token_reduction_, supports_tokens, token_reductions
from .fit import fit_, writers

# Floats that all fitted layers together may give out, 1 GiB; a fit itself holds less of them.
MEMORY = 2**28
MOST_IMAGES = 256
IMAGES_FILE = "remembered_images.safetensors"


def images_to_remember(model: PreTrainedModel) -> int:
    """Return how many images a fit should use, `MOST_IMAGES` or what `MEMORY` allows."""
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
    # The search has cut no token yet when it fits.
    with _all_tokens(small), _all_tokens(dense):
        return fit_(small, dense, subnet, [pixel_values], readers=False)


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
