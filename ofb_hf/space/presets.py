"""Every constant that the presets of a search disagree about.

- "default": the choice is made before the first step, from error curves in an equivalent basis, and
  all steps train what was chosen.
- "bi_mask": units are ranked by observed gradients, and bi-masks choose while the weights train.
- "paper": the published code (arXiv:2403.15835 and its repository).

benchmarks/QUALITY.md compares them. A field of `BiMaskConfig` that is None is taken from here.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        # Kernels are slow for channel counts that are no multiples of 8.
        "multiple_of": 8,
        # Components that little is lost with go far down.
        "smallest_share": 0.125,
        "basis": "equivalent",
        "importance_source": "error_curves",
        # Before the first step: what bi-masks learn adds nothing to that (benchmarks/QUALITY.md).
        "settle_at": 0.0,
        "compensate": True,
        # Labels of a training set that is fitted already pull away from what was kept.
        "distillation_weight": 1.0,
        "pmim": False,
        # What follows would decide later: nothing reads it.
        "pmim_until_settled": True,
        "importance_init_mean": 1.5,
        "importance_init_std": 0.0,
        "alpha_init": "zeros",
        "normalize_importance": True,
        "flops_weight": 5.0,
        "importance_hold": 0.0,
        "importance_learning_rate": 0.0,
        "importance_penalty": 0.0,
        "architecture_learning_rate": 0.01,
        "architecture_weight_decay": 0.0,
        "masks_follow_schedule": False,
        "warmup": 0.0,
        "retire_begin": 0.0,
        "one_hot_begin": 0.0,
        "one_hot_end": 0.0,
        "one_hot_weight": 0.2,
    },
    "bi_mask": {
        # Kernels are slow for channel counts that are no multiples of 8.
        "multiple_of": 8,
        "smallest_share": 0.25,
        "basis": "given",
        "importance_source": "gradients",
        # sigmoid(1.5) = 0.82: near the given network, but not where the sigmoid is flat.
        "importance_init_mean": 1.5,
        "importance_init_std": 0.0,
        "alpha_init": "zeros",
        # A LayerNorm does not see a common factor of all residual gates: without this they could
        # sink together and make the network look cheap.
        "normalize_importance": True,
        "flops_weight": 5.0,
        # Importance is observed in the first steps, and no loss moves it afterwards.
        "importance_hold": 0.05,
        "importance_learning_rate": 0.0,
        "importance_penalty": 0.0,
        "architecture_learning_rate": 0.01,
        "architecture_weight_decay": 0.0,
        "masks_follow_schedule": False,
        # The choice comes early: the remaining steps train the chosen network.
        "warmup": 0.06,
        "retire_begin": 0.06,
        "one_hot_begin": 0.08,
        "one_hot_end": 0.12,
        "one_hot_weight": 0.2,
        "settle_at": 0.15,
        "compensate": True,
        # The dense model as the teacher still says something where all labels are fitted.
        "distillation_weight": 0.5,
        "pmim": True,
        "pmim_until_settled": True,
    },
    "paper": {
        "multiple_of": 1,
        "smallest_share": 0.5,
        "basis": "given",
        "importance_source": "gradients",
        "importance_init_mean": 0.0,
        "importance_init_std": 0.2,
        "alpha_init": "uniform",
        "normalize_importance": False,
        "flops_weight": 5.0,
        "importance_hold": 0.0,
        "importance_learning_rate": 1e-3,
        "importance_penalty": 1.0,
        "architecture_learning_rate": 1e-3,
        "architecture_weight_decay": 1e-3,
        "masks_follow_schedule": True,
        "warmup": 0.2,
        "retire_begin": 0.0,
        # One-hot pressure has its full weight from the first step on.
        "one_hot_begin": 0.0,
        "one_hot_end": 0.0,
        "one_hot_weight": 0.5,
        # Alpha decides until the last step.
        "settle_at": 1.0,
        "compensate": False,
        "distillation_weight": 0.0,
        "pmim": True,
        "pmim_until_settled": False,
    },
}
# Fields that version 0.2 removed -> values that changed nothing, None for any. Files of version 0.1
# hold all of them.
REMOVED: dict[str, Any] = {
    "importance_from": None,  # checked together with importance_hold
    "dual_step": None,
    "hold_learning_rate": None,
    "budget_ramp": 0,
}
# Fields that version 0.2 added -> values that change nothing. Files of version 0.1 lack them.
ADDED: dict[str, Any] = {
    "basis": "given",
    "importance_source": "gradients",
    "freeze_weights": False,
}
# Earlier names of presets: files that were written with them can still be read.
ALIASES = {"ours": "bi_mask"}


def require_one_preset(preset: str, given: dict[str, Any]) -> None:
    """Refuse the values of one preset under the name of another.

    `dataclasses.replace(config, preset=...)` makes such a mixture: it passes on all fields of the
    old config, and those that came from its preset look as if the user had given them.

    Args:
        preset: the name that is given.
        given: fields as they are given, None for those that are left to the preset.

    Raises:
        ValueError: naming the other preset and what to write instead.
    """
    own = PRESETS[preset]
    if any(given.get(name, own[name]) is None for name in own):
        return  # something is left to the preset, so this is no whole config that was passed on
    taken: dict[str, list[str]] = {}  # another preset -> what has its value and not ours
    for other, values in PRESETS.items():
        telling = [name for name in own if name in given and own[name] != values[name]]
        same = [name for name in telling if given[name] == values[name]]
        # Some fields may have been set by hand before.
        if telling and len(same) > len(telling) / 2:
            taken[other] = same
    if taken:
        other = max(taken, key=lambda name: len(taken[name]))
        raise ValueError(
            f"preset is {preset!r}, but {len(taken[other])} fields have the values of preset "
            f"{other!r} ({', '.join(taken[other][:3])}, ...). dataclasses.replace keeps them: "
            f"write config.with_preset({preset!r}) instead, or leave out the fields that come from "
            "the preset."
        )


def without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored config without those that version 0.2 removed.

    Raises:
        ValueError: for a removed field whose value changed what a search computed.
    """
    descends = values.get("importance_from") == "descent" and values.get("importance_hold") != 0
    if descends and "importance_from" in values:
        raise ValueError(
            "importance_from is 'descent', which version 0.2 removed; leave it out to learn "
            'importance from first-order information, or take preset="paper".'
        )
    for name, harmless in REMOVED.items():
        if harmless is not None and values.get(name, harmless) != harmless:
            raise ValueError(
                f"{name} is {values[name]}, but version 0.2 removed this field; leave it out."
            )
    return {name: value for name, value in values.items() if name not in REMOVED}
