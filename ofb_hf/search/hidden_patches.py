"""The part of a search's loss that hides patches and repaints them (PMIM)."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from .pmim import hidden_first, mask_patches, normalize_target, reconstruction_loss, refine_mask
from .supernet import Supernet

# (logits, pixel_values, labels) -> the classification loss, a scalar.
TaskLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class HiddenPatches:
    """Compute classification and reconstruction losses, and balance the two.

    Args:
        supernet: with a decoder.
        generator: draws what is hidden, on the CPU.
        args: of the training, for its device.
    """

    def __init__(self, supernet: Supernet, generator: torch.Generator, args: TrainingArguments):
        self.supernet = supernet
        self.generator = generator
        self.args = args
        # Classification and reconstruction loss, added up over the micro-batches of a step.
        self._sums = torch.zeros(2, device=args.device)

    def begin_step(self) -> None:
        """Forget the losses of the last step."""
        self._sums.zero_()

    def losses(
        self,
        model: nn.Module,
        pixel_values: Tensor,
        labels: Tensor,
        keep_ratio: float,
        task_loss: TaskLoss,
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Compute the losses of one micro-batch.

        Args:
            model: the supernet, perhaps wrapped.
            pixel_values: (B, C, H, W).
            labels: (B,) or (B, classes).
            keep_ratio: fraction of the patches that stay visible.
            task_loss: of the logits.

        Returns:
            As `ClassifierTrainer.training_losses`.
        """
        supernet = self.supernet
        dense = supernet.dense_architecture
        hidden, repainted = self._draw(len(pixel_values), keep_ratio)
        masked_patches = refine_mask(
            hidden, dense.token_grid, dense.patch_grid, dense.token_size // dense.patch_size
        )
        outputs = model(
            pixel_values=pixel_values, bool_masked_pos=masked_patches, repainted=repainted
        )
        task = task_loss(outputs.logits, pixel_values, labels)
        pmim = reconstruction_loss(
            outputs.reconstruction,
            normalize_target(pixel_values, supernet.pmim_window),
            hidden,
            dense.token_grid,
            dense.token_size,
            repainted,
        )
        self._sums += torch.stack([task.detach().float(), pmim.detach().float()])
        loss = task + supernet.bi_mask_config.pmim_weight * supernet.pmim_ratio * pmim
        return outputs, {"task": task, "pmim": pmim}, loss

    def update_ratio(self, accelerator: Accelerator) -> None:
        """Let the next step weigh reconstruction by the loss ratio of this one, on every rank."""
        ratio = self.supernet.pmim_ratio
        task, pmim = accelerator.reduce(self._sums)
        highest = self.supernet.bi_mask_config.pmim_max_ratio
        new = (task / pmim.clamp(min=1e-8)).clamp(max=highest)
        # Nothing hidden says nothing about the ratio.
        ratio.copy_(torch.where(pmim > 0, new, ratio))

    def _draw(self, batch_size: int, keep_ratio: float) -> tuple[Tensor, Tensor]:
        """Draw which final tokens lose their patches (B, N), and which are repainted (B, K).

        A step that hides nothing draws a mask all the same, and K is the same in every step: so
        there is one graph to compile, and every parameter takes part under DDP.
        """
        config = self.supernet.bi_mask_config
        rows, columns = self.supernet.dense_architecture.token_grid
        tokens = rows * columns
        hidden = mask_patches(batch_size, tokens, keep_ratio, self.generator)
        least_visible = int(tokens * min(config.keep_ratio_start, config.keep_ratio_end))
        repainted = hidden_first(hidden, tokens - least_visible)
        return self._sent(hidden), self._sent(repainted)

    def _sent(self, tensor: Tensor) -> Tensor:
        """Send a tensor from the CPU to the device without waiting for it."""
        device = self.args.device
        if device.type == "cuda":
            # A copy from memory that is not pinned waits for all that is queued.
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)
