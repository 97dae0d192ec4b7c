"""Ranking units and tokens by what the loss says while nothing learns: gradients of a few images at
a time, squared.

A unit's score is the sum over small groups of images of its squared first-order change of the loss
(arXiv:1906.10771, eq. 8). Groups matter: gradients of a large batch cancel, and rank units worse.
They need no passes of their own: while nothing but gates has gradients, every image can have gates
of its own.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from .supernet import Supernet

# Gradients of a few images each rank units better than as many of large batches, and of more images
# no better (docs/LOG.md).
OBSERVED_TOGETHER, OBSERVED_IMAGES = 8, 2048


class Observation:
    """Adds up, in a supernet's bi-masks, what the gradients of small groups of images say.

    Args:
        supernet: to observe; its parameters keep their values.
        accelerator: of the run; ranks add up what they saw.

    Attributes:
        images: micro-batches (B, C, H, W) of this step, if tokens are observed.
        repeats: whether a micro-batch is being looked at again, because its gradients overflowed.
    """

    def __init__(self, supernet: Supernet, accelerator: Accelerator):
        self.supernet, self.accelerator = supernet, accelerator
        self.images: list[Tensor] = []
        self.repeats = False
        # micro-batches that are too small for a group
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._seen: list[Tensor] = []  # in this step

    def observe(
        self,
        inputs: dict[str, Tensor],
        backward: Callable[[dict[str, Tensor]], Tensor],
        accumulation: int = 1,
    ) -> Tensor:
        """Observes one micro-batch. Returns its loss, a scalar.

        Args:
            inputs: pixel_values (B, C, H, W), labels (B,).
            backward: runs the gradients of the mean loss of the inputs, and returns it.
            accumulation: what `backward` divides the loss by, the number of micro-batches in this
                step.
        """
        masks = self.supernet.bi_masks
        with self.supernet.separate_images():
            loss, changes = self._finite(inputs, backward)
        # the loss is a mean: this makes sums of it
        of_one = len(inputs["labels"]) * accumulation / self._loss_scale
        self._waiting.append(
            tuple((change * of_one).nan_to_num(0.0, 0.0, 0.0) for change in changes)
        )
        for mask in masks:  # the optimizer, and a scaler, find that nothing moves
            mask.importance_logits.grad = torch.zeros_like(mask.importance_logits)
        if (
            sum(len(units) for units, _ in self._waiting) >= OBSERVED_TOGETHER
            or self.accelerator.sync_gradients
        ):
            self._seen.append(sum_of_squares(*map(torch.cat, zip(*self._waiting, strict=True))))
            self._waiting = []
        if self.accelerator.sync_gradients:
            self._add_up()
        return loss

    def _add_up(self) -> None:
        """Ends a step: every rank knows what all of them saw."""
        seen, self._seen = self.accelerator.reduce(torch.stack(self._seen).sum(0)), []
        observed = [
            *(mask.first_order for mask in self.supernet.bi_masks),
            self.supernet.first_order_of_tokens,
        ]
        for buffer, squares in zip(
            observed, seen.split([each.numel() for each in observed]), strict=True
        ):
            buffer += squares.view_as(buffer)
        if self.accelerator.scaler:
            # Other ranks saw other images, and their gradients will be averaged: under one scale.
            scale = torch.tensor([self._loss_scale], device=seen.device)
            self.accelerator.scaler.update(float(self.accelerator.gather(scale).min()))

    @property
    def _loss_scale(self) -> float:
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def _finite(
        self, inputs: dict[str, Tensor], backward: Callable[[dict[str, Tensor]], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss, and the changes of its images; with fp16 under a scale so small that none
        overflows."""
        loss, changes = backward(inputs), self.supernet.changes_of_images()
        self.repeats = True
        try:
            while self._loss_scale > 1 and not bool(changes[0].isfinite().all()):
                self.accelerator.scaler.update(self._loss_scale / 2)
                loss, changes = backward(inputs), self.supernet.changes_of_images()
        finally:
            self.repeats = False
        return loss, changes


def sum_of_squares(units: Tensor, tokens: Tensor) -> Tensor:
    """What groups of about `OBSERVED_TOGETHER` images say, added up: (U + T,).

    Args:
        units: changes of each image's loss with the gates, (B, U). They are averaged over a group
            before they are squared, for all images are to do without the same units.
        tokens: with what each image would merge, (B, T). Each loses tokens of its own: they are
            squared one by one, in the same share of the group's mean loss.
    """
    groups = max(1, len(units) // OBSERVED_TOGETHER)
    squares = units.new_zeros(units.shape[1] + tokens.shape[1])
    for together, alone in zip(
        units.tensor_split(groups), tokens.tensor_split(groups), strict=True
    ):
        squares += torch.cat([together.mean(0).square(), (alone / len(alone)).square().sum(0)])
    return squares
