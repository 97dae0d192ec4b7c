"""Ranking units and tokens by what the loss says while nothing learns: gradients of a few images at a time, squared.

A unit's score is the sum over small groups of images of its squared first-order change of the loss (arXiv:1906.10771,
eq. 8). Groups matter: gradients of a large batch cancel, and rank units worse.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from .supernet import Supernet

# Gradients of a few images each rank units better than as many of large batches, and of more images no better
# (docs/LOG.md).
OBSERVED_TOGETHER, OBSERVED_IMAGES = 8, 2048


class Observation:
    """Adds up, in a supernet's bi-masks, what the gradients of small groups of images say.

    Args:
        supernet: to observe; its parameters keep their values.
        accelerator: of the run; ranks add up what they saw.

    Attributes:
        images: micro-batches (B, C, H, W) of this step, if tokens are observed.
    """

    def __init__(self, supernet: Supernet, accelerator: Accelerator):
        self.supernet, self.accelerator = supernet, accelerator
        self.images: list[Tensor] = []
        self._pending = 0  # images whose gradients are added up and not observed yet

    def observe(self, inputs: dict[str, Tensor], backward: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Observes one micro-batch. Returns its mean loss, a scalar.

        Args:
            inputs: pixel_values (B, C, H, W), labels (B,).
            backward: computes gradients of a part of the inputs, adds them to those that are there, and returns the
                loss.
        """
        masks, parts = self.supernet.bi_masks, max(1, len(inputs["pixel_values"]) // OBSERVED_TOGETHER)
        squares = torch.zeros(sum(mask.first_order.numel() for mask in masks), device=self.accelerator.device)
        of_tokens = torch.zeros_like(self.supernet.first_order_of_tokens)
        chunks, losses = [inputs[name].tensor_split(parts) for name in ("pixel_values", "labels")], []
        for images, labels in zip(*chunks, strict=True):
            losses.append(self._finite(backward, {"pixel_values": images, "labels": labels}))
            self._pending += len(images)
            scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
            of_tokens += self.supernet.squared_token_changes(scale)
            if self._pending < OBSERVED_TOGETHER and not self.accelerator.sync_gradients:
                continue  # micro-batches smaller than that are looked at together
            squares += torch.cat([mask.squared_gradient(scale).flatten() for mask in masks])
            self.supernet.zero_grad(set_to_none=False)  # so that the optimizer, and a scaler, find that nothing moves
            self._pending = 0
        squares = self.accelerator.reduce(squares)
        for mask, seen in zip(masks, squares.split([m.first_order.numel() for m in masks]), strict=True):
            mask.first_order += seen.view_as(mask.first_order)
        self.supernet.first_order_of_tokens.add_(self.accelerator.reduce(of_tokens))
        return torch.stack(losses).mean()

    def _finite(self, backward: Callable[[dict[str, Tensor]], Tensor], part: dict[str, Tensor]) -> Tensor:
        """One backward pass; with fp16, again under a smaller scale until no gradient overflows."""
        while True:
            loss = backward(part)
            scaler = self.accelerator.scaler
            gradients = [mask.importance_logits.grad for mask in self.supernet.bi_masks]
            finite = scaler is None or all(bool(g.isfinite().all()) for g in gradients if g is not None)
            if finite or scaler.get_scale() <= 1:
                return loss
            self.supernet.zero_grad()
            scaler.update(scaler.get_scale() / 2)
