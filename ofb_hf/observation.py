"""Ranking units and tokens by what the loss says while nothing learns: gradients of a few images at a time, squared.

A unit's score is the sum over small groups of images of its squared first-order change of the loss (arXiv:1906.10771,
eq. 8). Groups matter: gradients of a large batch cancel, and rank units worse.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
        self._together: list[dict[str, Tensor]] = []  # images whose gradients are added up and not observed yet
        self._of_tokens = torch.zeros_like(supernet.first_order_of_tokens)  # what is known of their tokens

    def observe(
        self, inputs: dict[str, Tensor], backward: Callable[[dict[str, Tensor]], Tensor], accumulation: int = 1
    ) -> Tensor:
        """Observes one micro-batch. Returns its mean loss, a scalar.

        Args:
            inputs: pixel_values (B, C, H, W), labels (B,).
            backward: adds the gradients of a part of the inputs to those that are there, and returns the loss.
            accumulation: what `backward` divides the loss by, the number of micro-batches in this step.
        """
        masks, parts = self.supernet.bi_masks, max(1, len(inputs["pixel_values"]) // OBSERVED_TOGETHER)
        squares = torch.zeros(sum(mask.first_order.numel() for mask in masks), device=self.accelerator.device)
        of_tokens = torch.zeros_like(self.supernet.first_order_of_tokens)
        chunks, losses = [inputs[name].tensor_split(parts) for name in ("pixel_values", "labels")], []
        with self._resting():
            for images, labels in zip(*chunks, strict=True):
                self._together.append({"pixel_values": images, "labels": labels})
                losses.append(self._finite(backward))
                self._of_tokens += self.supernet.squared_token_changes(self._loss_scale / accumulation)
                together = sum(len(part["labels"]) for part in self._together)
                if together < OBSERVED_TOGETHER and not self.accelerator.sync_gradients:
                    continue  # micro-batches smaller than that are looked at together
                mean = len(self._together)  # of so many losses, which are added up so far
                scale = mean * self._loss_scale / accumulation
                squares += torch.cat([mask.squared_gradient(scale).flatten() for mask in masks])
                of_tokens += self._of_tokens / mean**2
                self.supernet.zero_grad(set_to_none=False)  # the optimizer, and a scaler, find that nothing moves
                self._of_tokens.zero_()
                self._together = []
        if self.accelerator.sync_gradients and self.accelerator.scaler:
            # Other ranks saw other images, and their gradients will be averaged: under one scale.
            scale = torch.tensor([self._loss_scale], device=squares.device)
            self.accelerator.scaler.update(float(self.accelerator.gather(scale).min()))
        squares = self.accelerator.reduce(squares)
        for mask, seen in zip(masks, squares.split([m.first_order.numel() for m in masks]), strict=True):
            mask.first_order += seen.view_as(mask.first_order)
        self.supernet.first_order_of_tokens.add_(self.accelerator.reduce(of_tokens))
        return torch.stack(losses).mean()

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """Everything but importance without gradients: nobody would look at them."""
        observed = {mask.importance_logits for mask in self.supernet.bi_masks}
        resting = [p for p in self.supernet.parameters() if p.requires_grad and p not in observed]
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

    @property
    def _loss_scale(self) -> float:
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def _finite(self, backward: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Adds the gradients of the last part; with fp16, those of all parts again under a smaller scale until none
        overflows. Returns the loss of the last part."""
        loss = backward(self._together[-1])
        while self._loss_scale > 1 and not self._is_finite():
            self.supernet.zero_grad()
            self.accelerator.scaler.update(self._loss_scale / 2)
            loss = [backward(part) for part in self._together][-1]
        return loss

    def _is_finite(self) -> bool:
        gradients = [mask.importance_logits.grad for mask in self.supernet.bi_masks]
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
