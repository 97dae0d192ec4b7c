"""Every constant that the two presets of a search disagree about.

"default": led by data and budget, docs/ARCHITECTURE.md tells why; "paper": the published code
(arXiv:2403.15835 and its repository). A field of `BiMaskConfig` that is None is taken from here.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "multiple_of": 8,
        "smallest_share": 0.25,
        "importance_init_mean": 1.5,
        "importance_init_std": 0.0,
        "alpha_init": "zeros",
        "normalize_importance": True,
        "flops_weight": 5.0,
        "importance_penalty": 0.0,
        "one_hot_weight": 0.2,
        "one_hot_begin": 0.08,
        "one_hot_end": 0.12,
        "importance_learning_rate": 0.0,
        "architecture_learning_rate": 0.01,
        "architecture_weight_decay": 0.0,
        "masks_follow_schedule": False,
        "distillation_weight": 0.5,
        "retire_begin": 0.06,
        "settle_at": 0.15,
        "compensate": True,
        "importance_hold": 0.05,
        "pmim_until_settled": True,
        "warmup": 0.06,
    },
    "paper": {
        "multiple_of": 1,
        "smallest_share": 0.5,
        "importance_init_mean": 0.0,
        "importance_init_std": 0.2,
        "alpha_init": "uniform",
        "normalize_importance": False,
        "flops_weight": 5.0,
        "importance_penalty": 1.0,
        "one_hot_weight": 0.5,
        "one_hot_begin": 0.0,
        "one_hot_end": 0.0,
        "importance_learning_rate": 1e-3,
        "architecture_learning_rate": 1e-3,
        "architecture_weight_decay": 1e-3,
        "masks_follow_schedule": True,
        "distillation_weight": 0.0,
        "retire_begin": 0.0,
        "settle_at": 1.0,
        "compensate": False,
        "importance_hold": 0.0,
        "pmim_until_settled": False,
        "warmup": 0.2,
    },
}
# Names that presets had before: files that were written with them can still be read.
ALIASES = {"ours": "default"}
