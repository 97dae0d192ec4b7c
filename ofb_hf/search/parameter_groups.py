"""Which parameters of a supernet learn at which rate: the groups of a search's optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from ..families.registry import family_of
from ..space.configuration import BiMaskConfig
from ..training.arguments import OFBTrainingArguments
from .phases import Phases
from .supernet import Supernet


def parameter_groups(supernet: Supernet, args: OFBTrainingArguments) -> list[dict[str, Any]]:
    """Return the parameter groups of a search's AdamW.

    They are weights, weights_no_decay, importance, architecture and pmim_decoder, those that exist.
    Each has `params`, `name`, `lr`, `betas` and `weight_decay`. Parameters that rest are in none; a
    group whose parameters all rest is there and empty, because a resumed run has to have the same
    groups.
    """
    config = supernet.bi_mask_config
    weights = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    settings = {
        "weights": weights | {"weight_decay": args.weight_decay},
        "weights_no_decay": weights | {"weight_decay": 0.0},
        "importance": weights | {"lr": config.importance_learning_rate, "weight_decay": 0.0},
        "architecture": {
            "lr": config.architecture_learning_rate,
            "betas": (0.5, 0.999),  # published code
            "weight_decay": config.architecture_weight_decay,
        },
        "pmim_decoder": weights | {"weight_decay": args.weight_decay},
    }
    groups: dict[str, list[nn.Parameter]] = {}
    if config.pmim:
        # The decoder may have been removed with the tokens that it repaints; its group stays.
        groups["pmim_decoder"] = []
    undecayed = family_of(supernet.config).undecayed
    for name, parameter in supernet.named_parameters():
        group = groups.setdefault(_group_of(name, parameter, undecayed), [])
        if parameter.requires_grad:
            group.append(parameter)
    return [
        {"params": groups[name], "name": name, **settings[name]}
        for name in settings
        if name in groups
    ]


def _group_of(name: str, parameter: nn.Parameter, undecayed: tuple[str, ...]) -> str:
    """Return the group of a parameter of a supernet."""
    if name.endswith(".importance_logits"):
        return "importance"
    if name.endswith(".alpha"):
        return "architecture"
    if name.startswith("pmim_decoder."):
        return "pmim_decoder"
    # As in DeiT: vectors (biases, norms) and tokens are not decayed.
    if parameter.ndim <= 1 or name.endswith(undecayed):
        return "weights_no_decay"
    return "weights"


def learning_rate_factors(
    config: BiMaskConfig, args: OFBTrainingArguments, phases: Phases
) -> dict[str, Callable[[int], float]]:
    """Return what every group's learning rate is multiplied by in a step.

    Nothing learns while gradients are observed: they are comparable only as long as the function is
    the given one. Then weights and decoder follow `lr_scheduler_type` from its beginning, and
    importance and alpha do so or stay constant, as `masks_follow_schedule` says. Frozen weights
    begin after the choice.

    Returns:
        Group name -> function of the number of complete steps.
    """
    scheduled = _after(phases.observed_steps, args, phases)
    weights = scheduled
    if config.freeze_weights:
        weights = _after(phases.settled_after, args, phases)

    def masks(step: int) -> float:
        if step < phases.observed_steps:
            return 0.0
        return scheduled(step) if config.masks_follow_schedule else 1.0

    return {
        "weights": weights,
        "weights_no_decay": weights,
        "importance": masks,
        "architecture": masks,
        "pmim_decoder": scheduled,
    }


def _after(rests: int, args: OFBTrainingArguments, phases: Phases) -> Callable[[int], float]:
    """Return the factor of `lr_scheduler_type` as a function of complete steps.

    Args:
        rests: steps in which nothing is learned before; the factor is 0 there.
    """
    # Some schedules end at a given learning rate: they read the first one from an optimizer.
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        reference,
        # A warm-up that is given as a fraction is one of the whole search.
        num_warmup_steps=args.get_warmup_steps(phases.total_steps),
        # a search that ends with the choice has none, and some schedules divide by them
        num_training_steps=max(1, phases.total_steps - rests),
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    (learning,) = scheduler.lr_lambdas
    return lambda step: 0.0 if step < rests else learning(step - rests)
