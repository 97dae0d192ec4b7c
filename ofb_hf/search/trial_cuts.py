"""Trial cuts: how far from the network as it is several choices of widths and tokens would lead.

First-order scores rank units against units and tokens against tokens well; but how much of the
budget units and tokens should each give up they say less reliably (docs/LOG.md). Comparing what
some cut networks predict settles that.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..choice.problem import Choice
from ..families.evaluation import evaluating
from ..training.losses import distillation_loss
from .supernet import Supernet, compress


@torch.no_grad()
def nearest_choice(supernet: Supernet, choices: list[Choice], batches: list[Tensor]) -> Choice:
    """Return the choice whose network predicts most nearly what the network predicts now.

    Args:
        supernet: observed, with bi-masks that are all close to 1.
        choices: of all of its bi-masks, each with a token schedule. The first is taken if
            others are no nearer.
        batches: images, (B, C, H, W) each.
    """
    best = choices[0]
    least = torch.inf
    # New networks draw random weights, which are overwritten: the run must not depend on that.
    with evaluating(supernet), torch.random.fork_rng():
        answers = [supernet(images).logits for images in batches]  # (B, classes) each
        for choice in choices:
            trial = _cut(supernet, choice)
            distance = 0.0
            for images, answer in zip(batches, answers, strict=True):
                divergence = distillation_loss(trial(images).logits, answer, temperature=1.0)
                distance += len(images) * float(divergence)
            if distance < least:
                best = choice
                least = distance
    return best


def _cut(supernet: Supernet, choice: Choice) -> PreTrainedModel:
    """Return the network that a choice leaves: the units of the highest first order, unscaled."""
    trial = copy.deepcopy(supernet)
    trial.decisions.decide_tokens_(choice.token_schedule)
    for mask in trial.bi_masks:
        candidate = choice.candidates[mask.name]
        mask.estimate_importance_(candidate.units)
        mask.settle_(*candidate.size)
    trial.lam.fill_(0.0)  # without importance in the bi-mask, units that stay count in full
    return compress(trial)
