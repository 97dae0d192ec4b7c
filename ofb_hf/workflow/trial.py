"""Single steps of a search on random images, to see what they cost: no data, and no file is left
behind."""

import tempfile
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..families.description import image_sides
from ..search import phases as schedule
from ..search.trainer import OFBTrainer
from ..space.configuration import BiMaskConfig
from ..training.arguments import OFBTrainingArguments
from .arguments import changed

# Long enough that phases, retirement and choice lie steps apart.
STEPS = 10_000


class TrialSearch:
    """A search that stands right after its importance phase: everything in the race, patches
    hidden, all losses on.

    Args:
        model: a classifier; it stays as it is, and is the teacher where the preset distils.
        args: of the search; how long it is and where it would write do not matter.
        config: what to search.

    Raises:
        ValueError: for arguments and budgets that a search refuses.
    """

    def __init__(self, model: PreTrainedModel, args: OFBTrainingArguments, config: BiMaskConfig):
        changes = {"max_steps": STEPS, "gradient_accumulation_steps": 1, "report_to": []}
        config = replace(config, compensate=False)  # that is done once, and no part of a step
        # a Trainer makes its output folder as soon as it is made
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer = OFBTrainer(
                model, changed(args, output_dir=folder, **changes), config
            )
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        # mixed precision, compilation, DDP
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
        trainer.state.max_steps = STEPS
        trainer.state.global_step = round(config.importance_hold * STEPS) + 1
        trainer.supernet.importance_known.fill_(True)
        trainer.begin_search()

    def batch(self, size: int) -> dict[str, Tensor]:
        """Random images (B, C, H, W) and labels (B,) where the model is."""
        config, device = self.trainer.supernet.config, self.trainer.args.device
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, config.num_channels, *image_sides(config), generator=generator)
        labels = torch.randint(config.num_labels, (size,), generator=generator)
        return {"pixel_values": images.to(device), "labels": labels.to(device)}

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward, backward and optimizer, as the Trainer does them. Returns the loss, scalar.

        The learning rate is the optimizer's own, so that weights, importance and alpha move as in
        mid-search.
        """
        trainer = self.trainer
        trainer.begin_search_step()
        loss = trainer.training_step(trainer.model_wrapped, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.end_search_step()
        return loss

    def settle(self) -> None:
        """Makes the final choice; the steps that follow are those after it, with the small
        network."""
        trainer, config = self.trainer, self.trainer.bi_mask_config
        trainer.supernet.settle_()
        if config.prune_during_search:
            trainer.shrink(fold=True)
        trainer.state.global_step = min(
            STEPS - 1, schedule.settlement_step(config.settle_at, STEPS) + 1
        )
