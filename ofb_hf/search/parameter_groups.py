"""Which parameters of a supernet learn at which rate: the named groups of a search's optimizer."""

from typing import Any

from torch import nn

from ..families.registry import family_of
from ..training.arguments import OFBTrainingArguments
from .supernet import Supernet


def parameter_groups(supernet: Supernet, args: OFBTrainingArguments) -> list[dict[str, Any]]:
    """Groups for an AdamW: weights, weights_no_decay, importance, architecture, pmim_decoder, those
    that exist.

    Each has `params`, `name`, `lr`, `betas` and `weight_decay`. What rests is in none; a group
    whose parameters all rest is there and empty, for a resumed run has to have the same groups.
    """
    config = supernet.bi_mask_config
    weights = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    settings = {
        "weights": weights | {"weight_decay": args.weight_decay},
        "weights_no_decay": weights | {"weight_decay": 0.0},
        "importance": weights | {"lr": config.importance_learning_rate, "weight_decay": 0.0},
        "architecture": {
            "lr": config.architecture_learning_rate,
            "betas": (0.5, 0.999),
            "weight_decay": config.architecture_weight_decay,
        },
        "pmim_decoder": weights | {"weight_decay": args.weight_decay},
    }
    # The decoder goes with the tokens that it repaints, its group stays.
    groups: dict[str, list[nn.Parameter]] = {"pmim_decoder": []} if config.pmim else {}
    undecayed = family_of(supernet.config).undecayed
    for name, parameter in supernet.named_parameters():
        group = groups.setdefault(_group_of(name, parameter, undecayed), [])
        group += [parameter] * parameter.requires_grad
    return [
        {"params": groups[name], "name": name, **settings[name]}
        for name in settings
        if name in groups
    ]


def _group_of(name: str, parameter: nn.Parameter, undecayed: tuple[str, ...]) -> str:
    if name.endswith(".importance_logits"):
        return "importance"
    if name.endswith(".alpha"):
        return "architecture"
    if name.startswith("pmim_decoder."):
        return "pmim_decoder"
    # As in DeiT: vectors (biases, norms) and tokens are not decayed.
    return "weights_no_decay" if parameter.ndim <= 1 or name.endswith(undecayed) else "weights"
