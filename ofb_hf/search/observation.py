"""Ranking units and tokens by gradients while nothing learns: small groups of images, squared.

A unit's score is the sum over small groups of images of its squared first-order change of the loss
(arXiv:1906.10771, eq. 8). Groups matter: gradients of a large batch cancel, and rank units worse.
They need no passes of their own: while only gates have gradients, every image can have gates of its
own.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from .supernet import Supernet

# Gradients of a few images each rank units better than the same number of large batches
# (docs/LOG.md). `phases.OBSERVED_IMAGES` says how many images are observed in all.
OBSERVED_TOGETHER = 8

# Runs the gradients of the mean loss of some inputs and returns that loss.
Backward = Callable[[dict[str, Tensor]], Tensor]


class Observation:
    """Add up, in a supernet's bi-masks and tokens, the squared gradients of small groups of images.

    Args:
        supernet: to observe; its parameters keep their values.
        accelerator: of the run; ranks add up what they saw.

    Attributes:
        images: micro-batches (B, C, H, W) of this step, if tokens are observed.
        repeats: whether a micro-batch is being run again, because its gradients overflowed.
    """

    def __init__(self, supernet: Supernet, accelerator: Accelerator):
        self.supernet = supernet
        self.accelerator = accelerator
        self.images: list[Tensor] = []
        self.repeats = False
        # Changes of micro-batches that are too small for a group, (B, U) and (B, T) each.
        self._waiting: list[tuple[Tensor, Tensor]] = []
        # Sums of squares in this step, (U + T,) each.
        self._seen: list[Tensor] = []

    def observe(
        self, inputs: dict[str, Tensor], backward: Backward, accumulation: int = 1
    ) -> Tensor:
        """Observe one micro-batch and return its loss, a scalar.

        Args:
            inputs: pixel_values (B, C, H, W), labels (B,).
            backward: runs the gradients of the mean loss of the inputs, and returns it.
            accumulation: what `backward` divides the loss by, the number of micro-batches in this
                step.
        """
        with self.supernet.separate_images():
            loss, (units, tokens) = self._finite(inputs, backward)
        # The loss is a mean over images and micro-batches: this makes it each image's own loss.
        images = len(inputs["labels"])
        of_one = images * accumulation / self._loss_scale
        # What overflows without any scale says nothing.
        units = (units * of_one).nan_to_num(0.0, 0.0, 0.0)  # (B, U)
        tokens = (tokens * of_one).nan_to_num(0.0, 0.0, 0.0)  # (B, T)
        self._waiting.append((units, tokens))
        for mask in self.supernet.bi_masks:
            # The optimizer, and a gradient scaler, need gradients, and find that nothing moves.
            logits = mask.importance_logits
            logits.grad = torch.zeros_like(logits)
        waiting = sum(len(units) for units, _ in self._waiting)
        ends_step = self.accelerator.sync_gradients
        if ends_step or waiting >= OBSERVED_TOGETHER:
            self._square()
        if ends_step:
            self._add_up()
        return loss

    def _square(self) -> None:
        """Turn the changes that are waiting into sums of squares."""
        units, tokens = zip(*self._waiting, strict=True)
        squares = sum_of_squares(torch.cat(units), torch.cat(tokens))
        self._seen.append(squares)
        self._waiting = []

    def _add_up(self) -> None:
        """End a step: add what all ranks saw to the buffers of bi-masks and tokens."""
        of_rank = torch.stack(self._seen).sum(0)  # (U + T,)
        self._seen = []
        of_all = self.accelerator.reduce(of_rank)
        buffers = [mask.first_order for mask in self.supernet.bi_masks]
        buffers.append(self.supernet.first_order_of_tokens)
        squares = of_all.split([buffer.numel() for buffer in buffers])
        for buffer, of_buffer in zip(buffers, squares, strict=True):
            buffer += of_buffer.view_as(buffer)
        if self.accelerator.scaler:
            # Other ranks saw other images and may have lowered their scale further; gradients will
            # be averaged over ranks, so from now on all use the same one.
            scale = torch.tensor([self._loss_scale], device=of_all.device)
            smallest = self.accelerator.gather(scale).min()
            self.accelerator.scaler.update(float(smallest))

    @property
    def _loss_scale(self) -> float:
        """What the loss is multiplied by before its gradients are computed: above 1 in fp16."""
        scaler = self.accelerator.scaler
        return scaler.get_scale() if scaler else 1.0

    def _finite(
        self, inputs: dict[str, Tensor], backward: Backward
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss and the changes of its images.

        In fp16 the scale is lowered until no gradient overflows: no image may be left out.
        """
        loss = backward(inputs)
        changes = self.supernet.changes_of_images()
        self.repeats = True
        try:
            while self._loss_scale > 1 and not _are_finite(changes):
                self.accelerator.scaler.update(self._loss_scale / 2)
                loss = backward(inputs)
                changes = self.supernet.changes_of_images()
        finally:
            self.repeats = False
        return loss, changes


def _are_finite(changes: tuple[Tensor, Tensor]) -> bool:
    """Return whether the changes with the gates are finite; tokens overflow with them."""
    units, _ = changes
    return bool(units.isfinite().all())


def sum_of_squares(units: Tensor, tokens: Tensor) -> Tensor:
    """Add up squared changes over groups of about `OBSERVED_TOGETHER` images.

    Args:
        units: changes of each image's loss with the gates, (B, U). They are averaged over a group
            before they are squared, because all images have to do without the same units.
        tokens: changes with what each image would merge, (B, T). Each image loses tokens of its
            own: they are squared one by one, with the weight that the image has in the mean loss of
            the group.

    Returns:
        (U + T,)
    """
    groups = max(1, len(units) // OBSERVED_TOGETHER)
    of_units = units.tensor_split(groups)  # (b, U) each
    of_tokens = tokens.tensor_split(groups)  # (b, T) each
    total = units.new_zeros(units.shape[1] + tokens.shape[1])
    for together, alone in zip(of_units, of_tokens, strict=True):
        squared_mean = together.mean(0).square()  # (U,)
        parts = alone / len(alone)
        squares = parts.square().sum(0)  # (T,)
        total += torch.cat([squared_mean, squares])
    return total
