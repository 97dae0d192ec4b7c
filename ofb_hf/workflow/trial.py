"""Run single steps of a search on random images, to see what they cost; no file remains."""

import tempfile
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.description import image_sides
from ..search.first_choice import images_to_choose_by
from ..search.trainer import OFBTrainer
from ..space.configuration import BiMaskConfig
from ..training.arguments import OFBTrainingArguments
from .arguments import changed

# Long enough that the phases, retirement and the choice are many steps apart.
STEPS = 10_000


def random_rows(config: PreTrainedConfig, count: int) -> list[dict[str, Any]]:
    """Return rows of random images (C, H, W) and labels, always the same ones.

    Args:
        config: of the model that takes them.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, config.num_channels, *image_sides(config), generator=generator)
    labels = torch.randint(config.num_labels, (count,), generator=generator).tolist()
    rows = zip(images, labels, strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in rows]


class TrialSearch:
    """A search right after its importance phase: all candidates active, patches hidden, all losses.

    Args:
        model: a classifier; it is not changed, and it is the teacher where the preset distils.
        args: of the search; its length and its output folder do not matter.
        config: what to search.
        fits: whether `settle` fits the cut network as a search does. That takes as long as some
            steps, and is no part of any.

    Raises:
        ValueError: for arguments and budgets that a search refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: OFBTrainingArguments,
        config: BiMaskConfig,
        fits: bool = False,
    ):
        images = None
        if not fits:
            config = replace(config, compensate=False)
        elif config.chooses_first:
            images = random_rows(model.config, images_to_choose_by(model))
        # a Trainer creates its output folder at once
        with tempfile.TemporaryDirectory() as folder:
            args = changed(
                args,
                output_dir=folder,
                max_steps=STEPS,
                gradient_accumulation_steps=1,
                report_to=[],
            )
            trainer = OFBTrainer(model, args, config, calibration_dataset=images)
        self.trainer = trainer
        # what `Trainer.train` does before its first step
        trainer.current_gradient_accumulation_steps = 1
        # without a scheduler: see `step` on the learning rate
        trainer.create_optimizer()
        # mixed precision, compilation, DDP
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
        trainer.state.max_steps = STEPS
        trainer.state.global_step = round(config.importance_hold * STEPS) + 1
        # as observed by the importance phase, which is not run here
        trainer.supernet.importance_known.fill_(True)
        trainer.begin_search()

    def batch(self, size: int) -> dict[str, Tensor]:
        """Return random images (B, C, H, W) and labels (B,), where the model is."""
        batch = default_collate(random_rows(self.trainer.supernet.config, size))
        return {name: values.to(self.trainer.args.device) for name, values in batch.items()}

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Run forward, backward and optimizer as the Trainer does, and return the loss, a scalar.

        The learning rate is the optimizer's own, so that weights and alpha move as in the middle of
        a search.
        """
        trainer = self.trainer
        trainer.begin_search_step()
        loss = trainer.training_step(trainer.model_wrapped, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.end_search_step()
        return loss

    def settle(self) -> None:
        """Make the final choice; the following steps are those of the small network.

        Where error curves choose, no step may have been taken before.
        """
        trainer, config = self.trainer, self.trainer.bi_mask_config
        if trainer.calibration_dataset is not None:
            trainer.settle_first()
            return
        trainer.supernet.decisions.settle_()
        if trainer.compensation is not None:
            images = self.batch(trainer.compensation.count)
            trainer.compensation.remember(images["pixel_values"])
        if config.prune_during_search:
            trainer.shrink(fold=True)
        # Not the last step: after that one every search cuts and folds.
        trainer.state.global_step = min(STEPS - 2, trainer.phases.settled_after + 1)
