"""Once-for-Both for Hugging Face: make vision transformers small without leaving the ecosystem.

Importing this package registers our models with the Auto classes, so that
`AutoModel.from_pretrained` knows them. Everything else is imported when it is first used; nothing
touches an accelerator or the network.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from . import _moved, models
from ._version import __version__
from .models import *  # noqa: F403

_LAZY = {
    "OFBTrainer": "search.trainer",
    "ClassifierTrainer": "training.classifier",
    "DistillationTrainer": "training.distillation",
    "TokenSearchConfig": "token_search.learned_counts",
    "TokenTrainer": "token_search.trainer",
    "OFBTrainingArguments": "training.arguments",
    "install_bi_masks": "search.supernet",
    "read_subnet": "search.supernet",
    "compress": "search.supernet",
    "compress_frozen": "frozen.compression",
    "equivalent_basis": "pruning.equivalent_basis",
    "SearchSpace": "space.search_space",
    "SubmoduleSpace": "space.search_space",
    "SubnetSpec": "families.subnet",
    "count_macs": "cost.counting",
    "count_params": "cost.counting",
    "publish": "release.hub",
}

# A family without a search configuration of its own takes `BiMaskConfig`.
_SEARCH_CONFIGS = ["ViTBiMaskConfig", "SwinBiMaskConfig"]
_LAZY |= dict.fromkeys(_SEARCH_CONFIGS, "space.configuration")

if TYPE_CHECKING:
    from .cost.counting import count_macs, count_params
    from .families.subnet import SubnetSpec
    from .frozen.compression import compress_frozen
    from .pruning.equivalent_basis import equivalent_basis
    from .release.hub import publish
    from .search.supernet import compress, install_bi_masks, read_subnet
    from .search.trainer import OFBTrainer
    from .space.configuration import *  # noqa: F403
    from .space.search_space import SearchSpace, SubmoduleSpace
    from .token_search.learned_counts import TokenSearchConfig
    from .token_search.trainer import TokenTrainer
    from .training.arguments import OFBTrainingArguments
    from .training.classifier import ClassifierTrainer
    from .training.distillation import DistillationTrainer

_moved.install()

for _config, _encoder, _classifier in models.REGISTERED:
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _encoder)
    AutoModelForImageClassification.register(_config, _classifier)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "ClassifierTrainer",
    "DistillationTrainer",
    "OFBTrainer",
    "OFBTrainingArguments",
    "SearchSpace",
    "SubmoduleSpace",
    "SubnetSpec",
    "TokenSearchConfig",
    "TokenTrainer",
    "__version__",
    "compress",
    "compress_frozen",
    "count_macs",
    "count_params",
    "equivalent_basis",
    "install_bi_masks",
    "publish",
    "read_subnet",
]
__all__ += models.__all__
__all__ += _SEARCH_CONFIGS
