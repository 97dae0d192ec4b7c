"""How far from the network as it is the networks are that a choice of widths and tokens might
leave.

First-order scores rank units against units and tokens against tokens well; but how much of the
budget each of the two is to give up they tell less reliably (docs/LOG.md). A look at what some
networks answer settles that.
"""

import copy

import torch
from torch import Tensor

from ..choice.knapsack import Choice
from ..training.losses import distillation_loss
from .supernet import Supernet, compress


@torch.no_grad()
def nearest_choice(supernet: Supernet, choices: list[Choice], batches: list[Tensor]) -> Choice:
    """The choice whose network predicts most nearly what the network predicts now.

    Args:
        supernet: observed, and not scaled by its masks to speak of.
        choices: of all of its bi-masks, each with a token schedule. The first is taken if
            others are no nearer.
        batches: images, (B, C, H, W) each.
    """
    was_training = supernet.training
    supernet.eval()
    answers, best, least = (
        [supernet(images).logits for images in batches],
        choices[0],
        torch.inf,
    )
    # new networks draw weights, which are overwritten; the run shall not notice
    with torch.random.fork_rng():
        for choice in choices:
            trial, distance = _cut(supernet, choice), 0.0
            for images, answer in zip(batches, answers, strict=True):
                distance += len(images) * float(
                    distillation_loss(trial(images).logits, answer, temperature=1.0)
                )
            if distance < least:
                best, least = choice, distance
    supernet.train(was_training)
    return best


def _cut(supernet: Supernet, choice: Choice) -> torch.nn.Module:
    """The network that a choice leaves, with the units of the highest first order, as they
    were."""
    trial = copy.deepcopy(supernet)
    trial.decide_tokens_(choice.token_schedule)
    for mask in trial.bi_masks:
        mask.estimate_importance_(choice.candidates[mask.name].units)
        mask.settle_(*choice.candidates[mask.name].size)
    trial.lam.fill_(0.0)  # units that stay count in full
    return compress(trial)
