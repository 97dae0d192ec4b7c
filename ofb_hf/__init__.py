"""Once-for-Both for Hugging Face: make vision transformers small without leaving the ecosystem.

Importing this package registers our models with the Auto classes, so that `AutoModel.from_pretrained` knows them.
Everything else is imported when it is first used; nothing touches an accelerator or the network.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from ._version import __version__
from .models.configuration_ofb_vit import OFBViTConfig
from .models.modeling_ofb_vit import OFBViTForImageClassification, OFBViTModel

_LAZY = {
    "ViTBiMaskConfig": "configuration",
    "OFBTrainer": "trainer",
    "DistillationTrainer": "distillation",
    "OFBTrainingArguments": "training_args",
    "install_bi_masks": "supernet",
    "read_subnet": "supernet",
    "compress": "supernet",
    "SearchSpace": "search_space",
    "SubmoduleSpace": "search_space",
    "SubnetSpec": "search_space",
    "count_macs": "flops",
    "count_params": "flops",
}

if TYPE_CHECKING:
    from .configuration import ViTBiMaskConfig
    from .distillation import DistillationTrainer
    from .flops import count_macs, count_params
    from .search_space import SearchSpace, SubmoduleSpace, SubnetSpec
    from .supernet import compress, install_bi_masks, read_subnet
    from .trainer import OFBTrainer
    from .training_args import OFBTrainingArguments

AutoConfig.register(OFBViTConfig.model_type, OFBViTConfig)
AutoModel.register(OFBViTConfig, OFBViTModel)
AutoModelForImageClassification.register(OFBViTConfig, OFBViTForImageClassification)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "DistillationTrainer",
    "OFBTrainer",
    "OFBTrainingArguments",
    "OFBViTConfig",
    "OFBViTForImageClassification",
    "OFBViTModel",
    "SearchSpace",
    "SubmoduleSpace",
    "SubnetSpec",
    "ViTBiMaskConfig",
    "__version__",
    "compress",
    "count_macs",
    "count_params",
    "install_bi_masks",
    "read_subnet",
]
