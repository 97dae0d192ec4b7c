"""Named shapes with random weights, for trials, demonstrations and training from scratch."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, SwinConfig, ViTConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Shape:
    """A stock config without labels, and how its pixels are normalised."""

    config_class: type[PreTrainedConfig]
    fields: dict[str, Any]
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    def config(self, label_names: list[str]) -> PreTrainedConfig:
        """Return the config of a classifier for these labels, in this order."""
        labels = {name: index for index, name in enumerate(label_names)}
        return self.config_class(
            **self.fields, id2label=dict(enumerate(label_names)), label2id=labels
        )


def _deit(width: int) -> Shape:
    fields = {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }
    return Shape(ViTConfig, fields | {"layer_norm_eps": 1e-6, "image_size": 224})


def _swin(width: int, depth: int, drop_path_rate: float) -> Shape:
    fields = {
        "embed_dim": width,
        "depths": [2, 2, depth, 2],
        "num_heads": [width // 32 * 2**s for s in range(4)],
    }
    return Shape(SwinConfig, fields | {"drop_path_rate": drop_path_rate, "image_size": 224})


SHAPES: dict[str, Shape] = {
    # arXiv:2012.12877, table 1
    "deit_tiny": _deit(192),
    "deit_small": _deit(384),
    "deit_base": _deit(768),
    # arXiv:2103.14030, section 3.3 and appendix A2
    "swin_tiny": _swin(96, 6, 0.2),
    "swin_small": _swin(96, 18, 0.3),
    "swin_base": _swin(128, 18, 0.5),
    # For images of 32 pixels, and for the handwritten digits of the demonstrations (8 pixels).
    "swin_32px": Shape(
        SwinConfig,
        {
            "embed_dim": 48,
            "depths": [2, 2, 2],
            "num_heads": [3, 6, 12],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 2,
        },
    ),
    "digits_vit": Shape(
        ViTConfig,
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 8,
            "patch_size": 2,
        },
        (0.5,) * 3,
        (0.5,) * 3,
    ),
    "digits_swin": Shape(
        SwinConfig,
        {
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "mlp_ratio": 2.0,
            "image_size": 8,
            "patch_size": 1,
        },
        (0.5,) * 3,
        (0.5,) * 3,
    ),
}
