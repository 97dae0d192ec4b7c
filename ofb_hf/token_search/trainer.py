"""The run in which token counts are learned: a classifier's weights rest, and only the logits of
the counts move."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..models import OFBViTForImageClassification
from ..tokens.schedules import Schedule, full_schedule, rounded_schedule, schedule_cost
from ..training.activation_checkpointing import without_reentry
from ..training.arguments import OFBTrainingArguments
from ..training.distillation import DistillationTrainer
from ..training.losses import flops_loss
from ..training.resumable import require_same_search
from .learned_counts import (
    TokenSearchConfig,
    expected_cost,
    install_learned_counts,
    read_expected_counts,
)

TOKEN_SEARCH_FILE = "token_search_config.json"
# The pull of the budget is strong at first: remembered for long, it would keep all later steps
# small.
BETAS = (0.9, 0.9)


class TokenTrainer(DistillationTrainer):
    """Learns a token schedule for a ViT classifier under a budget (DiffRate, arXiv:2305.17997).

    Args:
        model: a ViT classifier, stock or ours, of any widths. It is copied, and its weights never
            change.
        args: `OFBTrainingArguments`; learning rate, betas and decay in it are for weights, and do
            not count here.
        config: the budget, and how the counts learn.
        teacher: classifier to learn from; by default `model` itself, with all its tokens.
            `distillation_weight` is its share of the loss: 0.5 unless `args` says otherwise.
        kwargs: as for `DistillationTrainer`.

    Raises:
        UnsupportedArchitectureError: for models without a class token.
        ValueError: for a budget out of reach, naming the smallest possible value, and for reentrant
            checkpointing.

    Example:

    ```python
    trainer = TokenTrainer(model, OFBTrainingArguments("out", num_train_epochs=3), TokenSearchConfig(target_macs=0.7),
                           train_dataset=train, eval_dataset=test)
    trainer.train()
    fast = trainer.scheduled()
    ```"""

    def __init__(
        self,
        model: PreTrainedModel,
        args: OFBTrainingArguments,
        config: TokenSearchConfig | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        if args.gradient_checkpointing:
            without_reentry(
                args.gradient_checkpointing_kwargs,
                "only token counts learn: with the weights at rest no input of a block needs a "
                "gradient, and then "
                "reentrant checkpointing passes none to what is inside",
            )
        self.token_config = config or TokenSearchConfig()
        learner = install_learned_counts(model, self.token_config.token_granularity)
        self.target = self.token_config.target_for(learner.config)
        self.dense_cost = schedule_cost(
            learner.config, full_schedule(learner.config), self.token_config.terms_of
        )
        if teacher is None and args.distillation_weight != 0:
            teacher = OFBViTForImageClassification.from_dense(
                model, token_schedule=full_schedule(learner.config)
            )
        super().__init__(
            learner.train(model.training), args, teacher, distillation_weight=0.5, **kwargs
        )

    def training_losses(
        self, model: nn.Module, pixel_values: Tensor, labels: Tensor
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Classification and budget losses of one micro-batch."""
        outputs, parts, loss = super().training_losses(model, pixel_values, labels)
        expected = expected_cost(self.learner, self.token_config.terms_of)
        name, _ = self.token_config.budget
        parts["expected_macs"] = expected_cost(self.learner)
        parts[name.replace("target", "expected")] = expected / self.token_config.unit
        parts["flops"] = flops_loss(expected, self.target, self.dense_cost)
        return outputs, parts, loss + self.token_config.token_macs_weight * parts["flops"]

    @property
    def learner(self) -> OFBViTForImageClassification:
        """The classifier whose counts learn."""
        return self.accelerator.unwrap_model(self.model)

    def schedule(self) -> Schedule:
        """The whole counts that the learned ones stand for now; what they cost is at most the
        budget."""
        counts = read_expected_counts(self.learner)
        return rounded_schedule(
            self.learner.config, counts, self.target, self.token_config.terms_of
        )

    def scheduled(self) -> OFBViTForImageClassification:
        """A classifier with the weights as they were, and the schedule as it is now."""
        learner = self.learner
        config = type(learner.config).from_dict(
            learner.config.to_dict() | {"token_schedule": self.schedule()}
        )
        config._attn_implementation = learner.config._attn_implementation
        result = OFBViTForImageClassification(config).to(learner.device, learner.dtype)
        state = learner.state_dict()
        result.load_state_dict({name: state[name] for name in result.state_dict()})
        return result.train(learner.training)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the logits, without weight decay."""
        if self.optimizer is None:
            logits = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            rate = self.token_config.token_learning_rate
            self.optimizer = torch.optim.AdamW(
                logits, rate, BETAS, self.args.adam_epsilon, weight_decay=0.0
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            content = self.token_config.to_dict() | {"target": self.target}
            (folder / TOKEN_SEARCH_FILE).write_text(
                json.dumps(content, indent=2) + "\n", encoding="utf-8"
            )

    def _require_same_search(self, checkpoint: Path) -> None:
        ours = self.token_config.to_dict() | {"target": self.target}
        if not (checkpoint / TOKEN_SEARCH_FILE).is_file():
            raise ValueError(
                f"the checkpoint {checkpoint} has no {TOKEN_SEARCH_FILE}: it is not one of such a "
                f"search."
            )
        theirs = json.loads((checkpoint / TOKEN_SEARCH_FILE).read_text(encoding="utf-8"))
        require_same_search(theirs, ours, checkpoint)

    def _load_weights(self, checkpoint: Path) -> None:
        self._require_same_search(checkpoint)
        self._load_average(checkpoint)
        # Not by from_pretrained, which would build the model from its config, without learned
        # counts.
        self.learner.load_state_dict(safetensors.torch.load_file(checkpoint / SAFE_WEIGHTS_NAME))
