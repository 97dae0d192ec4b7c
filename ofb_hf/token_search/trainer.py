"""Trainer that learns token counts: all weights are frozen, only the logits of the counts move."""

import json
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..families.loading import rebuild_classifier
from ..families.registry import family_of
from ..tokens.schedules import Schedule, full_schedule, rounded_schedule, schedule_cost
from ..training.activation_checkpointing import without_reentry
from ..training.arguments import OFBTrainingArguments
from ..training.distillation import DistillationTrainer
from ..training.full_precision import in_full_precision
from ..training.losses import flops_loss
from ..training.resumable import require_same_search
from .learned_counts import (
    TokenSearchConfig,
    expected_cost,
    install_learned_counts,
    read_expected_counts,
)

logger = logging.get_logger(__name__)

TOKEN_SEARCH_FILE = "token_search_config.json"
# Of Adam, both low: at first the budget pulls hard, and a long memory of those gradients would keep
# all later steps small.
BETAS = (0.9, 0.9)


class TokenTrainer(DistillationTrainer):
    """Learn a token schedule for a ViT classifier under a budget (DiffRate, arXiv:2305.17997).

    Args:
        model: a ViT classifier, of transformers or of this package, of any widths. It is copied,
            and its weights never change.
        args: `OFBTrainingArguments`. Learning rate, betas and weight decay in it are for weights
            and have no effect here.
        config: the budget, and how the counts learn.
        teacher: classifier to learn from; by default `model` itself with all its tokens.
            `args.distillation_weight` is its fraction of the loss, 0.5 if None.
        kwargs: as for `DistillationTrainer`.

    Raises:
        UnsupportedArchitectureError: for models without a class token.
        ValueError: for a budget out of reach, with the smallest possible one, for reentrant
            activation checkpointing, and as `DistillationTrainer`.

    Example:

    ```python
    trainer = TokenTrainer(
        model,
        OFBTrainingArguments("out", num_train_epochs=3),
        TokenSearchConfig(target_macs=0.7),
        train_dataset=train,
        eval_dataset=test,
    )
    trainer.train()
    fast = trainer.scheduled()
    ```"""

    unserved: ClassVar[dict[str, str]] = DistillationTrainer.unserved | dict.fromkeys(
        ("optimizers", "optimizer_cls_and_kwargs"),
        "has an optimizer of its own, for nothing but token counts learns; leave it out, and set "
        "token_learning_rate in the config",
    )

    def __init__(
        self,
        model: PreTrainedModel,
        args: OFBTrainingArguments,
        config: TokenSearchConfig | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        self.require_arguments(model, args, kwargs)
        if args.gradient_checkpointing:
            without_reentry(
                args.gradient_checkpointing_kwargs,
                "only token counts learn: with frozen weights no input of a block needs a "
                "gradient, and then reentrant checkpointing passes none to the counts inside",
            )
        stored_type = model.dtype
        model = in_full_precision(model)
        self.token_config = config or TokenSearchConfig()
        learner = install_learned_counts(model, self.token_config.token_granularity)
        every = full_schedule(learner.config)
        self.target = self.token_config.target_for(learner.config)
        self.dense_cost = schedule_cost(learner.config, every, self.token_config.terms_of)
        if teacher is None and args.distillation_weight != 0:
            teacher = family_of(model.config).from_dense(model, token_schedule=every)
        learner.train(model.training)
        super().__init__(learner, args, teacher, distillation_weight=0.5, **kwargs)
        self.stored_type = stored_type

    def training_losses(
        self, model: nn.Module, pixel_values: Tensor, labels: Tensor
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Compute the classification and budget losses of one micro-batch."""
        outputs, parts, loss = super().training_losses(model, pixel_values, labels)
        expected = expected_cost(self.learner, self.token_config.terms_of)
        gap = flops_loss(expected, self.target, self.dense_cost)

        # MACs are logged for every budget, next to what the budget counts.
        parts["expected_macs"] = expected_cost(self.learner)
        budget, _ = self.token_config.budget
        parts[budget.replace("target", "expected")] = expected / self.token_config.unit
        parts["flops"] = gap
        return outputs, parts, loss + self.token_config.token_macs_weight * gap

    @property
    def learner(self) -> PreTrainedModel:
        """Return the classifier whose counts learn."""
        return self.accelerator.unwrap_model(self.model)

    def schedule(self) -> Schedule:
        """Return the token schedule of the present counts, whose cost is at most the budget."""
        config = self.learner.config
        expected = read_expected_counts(self.learner)
        return rounded_schedule(config, expected, self.target, self.token_config.terms_of)

    def scheduled(self) -> PreTrainedModel:
        """Return a classifier with the unchanged weights and the present token schedule."""
        if not self.state.global_step:
            logger.warning("no token count has learned yet: train() comes before scheduled().")
        learner = self.learner
        fields = learner.config.to_dict() | {"token_schedule": self.schedule()}
        config = type(learner.config).from_dict(fields)
        config._attn_implementation = learner.config._attn_implementation  # not in the dict
        # The result does not have the logits of the counts, and leaves them out.
        return rebuild_classifier(learner, config, learner.state_dict()).to(self.stored_type)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW over the logits of the counts, without weight decay."""
        if self.optimizer is None:
            logits = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(
                logits,
                lr=self.token_config.token_learning_rate,
                betas=BETAS,
                eps=self.args.adam_epsilon,
                weight_decay=0.0,
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            content = json.dumps(self._search_settings(), indent=2) + "\n"
            (folder / TOKEN_SEARCH_FILE).write_text(content, encoding="utf-8")

    def _search_settings(self) -> dict[str, Any]:
        """Return what a checkpoint and a resumed run have to agree on."""
        return self.token_config.to_dict() | {"target": self.target}

    def _require_same_search(self, checkpoint: Path) -> None:
        file = checkpoint / TOKEN_SEARCH_FILE
        if not file.is_file():
            raise ValueError(
                f"the checkpoint {checkpoint} has no {TOKEN_SEARCH_FILE}, so it is not one of a "
                "search for tokens; give a checkpoint that this trainer saved."
            )
        saved = json.loads(file.read_text(encoding="utf-8"))
        require_same_search(saved, self._search_settings(), checkpoint)

    def _load_weights(self, checkpoint: Path) -> None:
        self._require_same_search(checkpoint)
        self._load_average(checkpoint)
        # Not by from_pretrained: the config knows nothing of learned counts, so a model built from
        # it has no place for their logits.
        self.learner.load_state_dict(safetensors.torch.load_file(checkpoint / SAFE_WEIGHTS_NAME))
