"""ViT with a width of its own in every layer: what a bi-mask search leaves behind.

Parameters, forward passes and outputs are those of transformers' ViT; only the sizes of the linear layers differ.
With no width lists in the config the model equals the stock one bit for bit.
"""

from torch import nn
from transformers import ViTForImageClassification, ViTModel, ViTPreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTLayer, ViTMLP, ViTPooler

from .configuration_ofb_vit import OFBViTConfig


class OFBViTAttention(ViTAttention):
    """Self-attention with this layer's number of heads and head width; its scale may be the dense model's."""

    def __init__(self, config: OFBViTConfig, layer: int):
        nn.Module.__init__(self)
        sizes = config.layer_sizes(layer)
        self.config = config
        self.num_attention_heads = sizes["num_attention_heads"]
        self.head_dim = sizes["head_dim"]
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.is_causal = False

        width = self.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=True)


class OFBViTMLP(ViTMLP):
    """MLP with this layer's hidden width."""

    def __init__(self, config: OFBViTConfig, layer: int):
        nn.Module.__init__(self)
        width = config.layer_sizes(layer)["intermediate_size"]
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)


class OFBViTLayer(ViTLayer):
    """Pre-norm transformer block built from `config.layer_sizes(layer)`."""

    def __init__(self, config: OFBViTConfig, layer: int):
        nn.Module.__init__(self)
        self.attention = OFBViTAttention(config, layer)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OFBViTMLP(config, layer)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class OFBViTPreTrainedModel(ViTPreTrainedModel):
    """What the OFB ViT classes share: their config class; weights and outputs are handled as in the stock ViT."""

    config: OFBViTConfig
    config_class = OFBViTConfig
    _no_split_modules = ["ViTEmbeddings", "OFBViTLayer"]


class OFBViTModel(OFBViTPreTrainedModel, ViTModel):
    """ViT encoder with per-layer widths. Inputs and outputs as `transformers.ViTModel`.

    There is no pooling layer unless asked for: a classifier's checkpoint holds none, and
    `AutoModel.from_pretrained(classifier_checkpoint)` should load clean.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: OFBViTConfig, add_pooling_layer: bool = False, use_mask_token: bool = False):
        OFBViTPreTrainedModel.__init__(self, config)
        self.config = config
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([OFBViTLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()


class OFBViTForImageClassification(OFBViTPreTrainedModel, ViTForImageClassification):
    """ViT classifier with per-layer widths. Inputs and outputs as `transformers.ViTForImageClassification`.

    Example:

    ```python
    >>> from transformers import ViTForImageClassification
    >>> from ofb_hf import OFBViTForImageClassification

    >>> dense = ViTForImageClassification.from_pretrained("facebook/deit-small-patch16-224")  # doctest: +SKIP
    >>> same = OFBViTForImageClassification.from_dense(dense)  # doctest: +SKIP
    ```"""

    # The losses of a batch are means: the Trainer has to divide them by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: OFBViTConfig):
        OFBViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = OFBViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @classmethod
    def from_dense(cls, model: ViTForImageClassification) -> "OFBViTForImageClassification":
        """Copies a stock ViT classifier into this class; `model` is left as it is.

        Args:
            model: any `ViTForImageClassification`, also one loaded from a checkpoint with old key names.

        Returns:
            A model with the same weights, dtype, device, attention implementation and training mode, whose logits
            equal those of `model` bit for bit.

        Raises:
            TypeError: if `model` is no ViT classifier.
        """
        if not isinstance(model, ViTForImageClassification):
            raise TypeError(
                f"from_dense got a {type(model).__name__}; it copies a transformers ViTForImageClassification. "
                "Load one with ViTForImageClassification.from_pretrained(...)."
            )
        fields = model.config.to_dict()
        for key in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(key, None)
        config = OFBViTConfig(**fields, attn_implementation=model.config._attn_implementation)
        copy = cls(config)
        copy.load_state_dict(model.state_dict(), strict=True)
        for parameter, original in zip(copy.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(original.requires_grad)
        copy.to(device=model.device, dtype=model.dtype)
        copy.config.dtype = model.config.dtype
        return copy.train(model.training)


__all__ = ["OFBViTForImageClassification", "OFBViTModel", "OFBViTPreTrainedModel"]
