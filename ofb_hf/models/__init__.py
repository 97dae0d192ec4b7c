"""Stock transformers classifiers whose widths are read from lists in the config.

The model and configuration files travel to the Hub with a checkpoint, so each is self-contained:
torch, transformers and huggingface_hub only, and of this package their own configuration file.
"""

from .configuration_ofb_swin import OFBSwinConfig
from .configuration_ofb_vit import OFBViTConfig
from .modeling_ofb_swin import OFBSwinForImageClassification, OFBSwinModel
from .modeling_ofb_vit import OFBViTForImageClassification, OFBViTModel

# (config, encoder, classifier) of every family, as the Auto classes want them.
REGISTERED = (
    (OFBViTConfig, OFBViTModel, OFBViTForImageClassification),
    (OFBSwinConfig, OFBSwinModel, OFBSwinForImageClassification),
)

__all__ = [
    "OFBSwinConfig",
    "OFBSwinForImageClassification",
    "OFBSwinModel",
    "OFBViTConfig",
    "OFBViTForImageClassification",
    "OFBViTModel",
]
