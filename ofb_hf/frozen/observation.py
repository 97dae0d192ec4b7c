"""Watch a frozen network on calibration images: what its units give out, and what the loss minds.

One forward and one backward pass over all images. Weights get no gradients, so that the backward
pass costs about what the forward pass does, and no true label is needed: it is drawn from the
network's own prediction. The expected squared change of the loss is then (twice) the divergence
between the predictions before and after (the Fisher information). A network without a head
gives out features: its targets are drawn around them.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..families.bases import Bases, HeadBasis
from ..families.description import Architecture
from ..families.registry import describe, family_of
from ..pruning.sums import Sums, with_ones

# An attention is run once more for each of its smaller heads. That many images are enough for it.
REPLAYED_IMAGES = 96
# Of so many tokens one is drawn to measure errors where the loss minds them.
DRAWN = 8
# Images whose activations are in memory at the same time.
TOGETHER = 2
# Rows for each column of a matrix of second moments.
ROWS_PER_COLUMN = 40


class Observation:
    """Second moments of a network's units, their effects and their gradients.

    Args:
        model: an OFB classifier in the basis that is cut; its weights need no gradients
            afterwards.
        channels: attention -> the numbers of first channels of a head to try.
        streams: residual widths whose first channels are to be tried.
        num_images: how many images will be observed, about, on all processes together.

    Attributes:
        sums: of all images, by (submodule or norm, what is summed).
        heads: attention -> its heads and layers.
        outputs: layer that writes into the residual stream -> its submodule.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        channels: dict[str, list[int]],
        streams: Sequence[str],
        num_images: int,
    ):
        self.model = model
        self.num_images = num_images
        self.channels = channels
        # They rank units and sizes, all at the same time in memory; no weight is computed of them.
        self.sums = Sums(torch.float32)
        family = family_of(model.config)
        self.architecture: Architecture = describe(model.config)
        bases: Bases = family.bases(model.config)
        self.heads: dict[str, HeadBasis] = {head.name: head for head in bases.heads}
        self.outputs: dict[str, str] = {}  # layer that writes -> submodule
        for submodule in self.architecture.submodules:
            if submodule.output and submodule.output in dict(model.named_modules()):
                self.outputs[submodule.output] = submodule.name
        self.norms = {
            norm.norm: norm.tiles
            for stream in bases.streams
            if stream.name in streams
            for norm in stream.norms
        }
        self._calls: dict[str, tuple] = {}
        self._are_watched = True

    def add(self, pixel_values: Tensor, generator: torch.Generator, replay: bool) -> None:
        """Observe a batch.

        Args:
            pixel_values: (B, channels, height, width).
            generator: draws the targets, on the CPU.
            replay: whether to try smaller heads on this batch.

        Raises:
            ValueError: if the network gives out numbers that are not finite.
        """
        handles = self._watch(replay)
        self._generator = generator
        try:
            # What a backward pass needs is much more than what a forward pass holds.
            for images in pixel_values.split(TOGETHER):
                with torch.enable_grad():
                    self._observe(images)
        finally:
            for handle in handles:
                handle.remove()
        self.sums.add(("images",), len(pixel_values))

    def _observe(self, pixel_values: Tensor) -> None:
        model = self.model
        self._calls = {}
        self._together = len(pixel_values)
        # The images carry the gradients: weights have none.
        pixel_values = pixel_values.to(model.device, model.dtype).requires_grad_()
        outputs = model(pixel_values=pixel_values).logits
        if not bool(outputs.isfinite().all()):
            raise ValueError(
                "the model's outputs for the calibration images are not finite; check the "
                "checkpoint and how the images are normalized."
            )
        drawn_loss(outputs, model.config.num_labels, self._generator).backward()
        self._are_watched = False
        try:
            with torch.no_grad():
                self._replay()
        finally:
            self._are_watched = True

    # ----------------------------------------------------------------------------------- watching

    def _watch(self, replay: bool) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for path, name in self.outputs.items():
            layer = self.model.get_submodule(path)
            handles.append(layer.register_forward_hook(partial(self._writes, name=name)))
        for path, tiles in self.norms.items():
            norm = self.model.get_submodule(path)
            handles.append(
                norm.register_forward_hook(partial(self._normalizes, path=path, tiles=tiles))
            )
        if not replay:
            return handles
        for name, head in self.heads.items():
            module = self.model.get_submodule(head.module)
            handles.append(
                module.register_forward_pre_hook(
                    partial(self._attends, name=name), with_kwargs=True
                )
            )
        return handles

    def _attends(self, module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
        if self._are_watched:
            self._calls[name] = (_detached(args), _detached(kwargs))

    def _writes(self, layer: nn.Linear, args: tuple, output: Tensor, name: str) -> None:
        if not self._are_watched:
            return
        inputs = args[0].detach()

        def add(gradient: Tensor) -> None:
            rows = _rows(gradient).float()
            weights = rows.square().sum(-1)  # (N,)
            self.sums.add((name, "gradients"), rows.mT @ rows)
            self.sums.add((name, "weight"), weights.sum())
            if name in self._calls:
                self._calls[name] += (weights, _rows(inputs))
            if name not in self.heads:
                self._add_units((name,), _rows(inputs), weights, self.num_images)

        output.register_hook(add)

    def _normalizes(
        self, norm: nn.LayerNorm, args: tuple, output: Tensor, path: str, tiles: int
    ) -> None:
        normed = output.detach()

        def add(gradient: Tensor) -> None:
            for name, tensor in (("normed", normed), ("gradients", gradient)):
                rows = _rows(tensor.unflatten(-1, (tiles, -1))).float()  # (N * tiles, D)
                self.sums.add((path, name), rows.mT @ rows)
            self.sums.add((path, "rows"), normed[..., 0].numel() * tiles)

        output.register_hook(add)

    def _add_units(self, key: tuple, rows: Tensor, weights: Tensor, images: int) -> None:
        """Add the moments of rows (N, D), and those of rows drawn by how much the loss minds them.

        Drawn rows instead of weighted ones cost little, and their moments are the same in the mean.

        Args:
            key: of the sums.
            rows: of the images in work.
            weights: how much the loss minds each row, (N,).
            images: of how many images rows will be added in all.
        """
        rows = with_ones(rows.float())
        # No more rows than the moments of so many columns need.
        rows_of_all = len(rows) // self._together * images
        stride = max(1, rows_of_all // (ROWS_PER_COLUMN * rows.shape[1]))
        some = rows[::stride]
        self.sums.add((*key, "all"), some.mT @ some)
        count = max(1, len(some) // DRAWN)
        total = weights.sum()
        # Where no gradient arrives at all, the loss minds all rows alike: not at all.
        weights = torch.where(total > 0, weights, 1.0)
        drawn = torch.multinomial(weights.cpu(), count, True, generator=self._generator)
        drawn = rows[drawn.to(rows.device)]
        self.sums.add((*key, "minded"), drawn.mT @ drawn * (total / count))

    # ---------------------------------------------------------------------------------- replaying

    def _replay(self) -> None:
        """Run each attention again with fewer channels in its heads."""
        replayed = min(REPLAYED_IMAGES, self.num_images)
        for name, call in self._calls.items():
            if len(call) == 2:
                continue  # no gradient reached it
            args, kwargs, weights, units = call
            head = self.heads[name]
            output = self.model.get_submodule(head.output)
            written = F.linear(units, output.weight)  # (N, D)
            for channels in sorted(self.channels[name], reverse=True):
                if channels < head.head_dim:
                    units = self._with_channels(head, channels, args, kwargs)
                rows = torch.cat([units, written], 1)  # (N, H * C + D)
                self._add_units((name, channels), rows, weights, replayed)
        self._calls = {}

    def _with_channels(self, head: HeadBasis, channels: int, args: tuple, kwargs: dict) -> Tensor:
        """Return what the output layer reads if heads have their first channels, (N, H * C)."""
        seen: list[Tensor] = []

        def cut(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            grid = output.unflatten(-1, (head.num_heads, head.head_dim)).clone()
            grid[..., channels:] = 0
            return grid.flatten(-2)

        def see(layer: nn.Module, args: tuple) -> None:
            seen.append(args[0])

        handles = [
            self.model.get_submodule(path).register_forward_hook(cut)
            for path in (head.queries, head.keys, head.values)
        ]
        handles.append(self.model.get_submodule(head.output).register_forward_pre_hook(see))
        try:
            self.model.get_submodule(head.module)(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        grid = _rows(seen[0]).unflatten(-1, (head.num_heads, head.head_dim))  # (N, H, D)
        return grid[..., :channels].flatten(1)


def drawn_loss(outputs: Tensor, num_labels: int, generator: torch.Generator) -> Tensor:
    """Return the loss of a batch for targets drawn from the network's own outputs, a sum.

    Args:
        outputs: logits (B, classes), or features (B, C) of a network without a head.
        num_labels: 0 without a head.
        generator: on the CPU.
    """
    outputs = outputs.float()
    if num_labels:
        predicted = outputs.detach().softmax(-1).cpu()
        labels = torch.multinomial(predicted, 1, generator=generator)[:, 0]
        return F.cross_entropy(outputs, labels.to(outputs.device), reduction="sum")
    # The gradient of half the squared distance from a point drawn around them is the noise itself.
    noise = torch.randn(outputs.shape, generator=generator).to(outputs.device)
    return (outputs * noise).sum()


def _rows(tensor: Tensor) -> Tensor:
    """Return the last axis in rows, (N, D)."""
    return tensor.flatten(0, -2)


def _detached(values):
    """Return arguments of a call whose tensors are cut off from the graph."""
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, dict):
        return {key: _detached(value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_detached(value) for value in values)
    return values
