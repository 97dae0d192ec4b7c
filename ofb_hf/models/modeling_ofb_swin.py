"""Swin with widths of its own in every stage and block: the result of a bi-mask search.

Parameters, forward passes and outputs are those of transformers' Swin; only the sizes of the layers
differ. With no width lists in the config the model equals the stock one bit for bit.
"""

from torch import Tensor, nn
from transformers import SwinForImageClassification, SwinModel, SwinPreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.swin.modeling_swin import (
    SwinAttention,
    SwinDropPath,
    SwinEmbeddings,
    SwinEncoder,
    SwinLayer,
    SwinMLP,
    SwinPatchMerging,
    SwinRelativePositionBias,
    SwinStage,
)

from .configuration_ofb_swin import OFBSwinConfig


class OFBSwinAttention(SwinAttention):
    """Window attention with this block's heads and head width; its scale may be the dense model's.

    Without heads it has no parameters and is never called.
    """

    def __init__(self, config: OFBSwinConfig, stage: int, block: int):
        nn.Module.__init__(self)
        sizes = config.layer_sizes(stage, block)
        hidden_size = config.stage_width(stage)
        self.config = config
        self.num_attention_heads = sizes["num_attention_heads"]
        self.head_dim = sizes["head_dim"]
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = (self.head_dim or 1) ** -0.5
        if config.attention_scale_per_stage is not None:
            self.scaling = config.attention_scale_per_stage[stage]
        self.is_causal = False

        width = self.num_attention_heads * self.head_dim
        self.q_proj = _linear(hidden_size, width, config.qkv_bias)
        self.k_proj = _linear(hidden_size, width, config.qkv_bias)
        self.v_proj = _linear(hidden_size, width, config.qkv_bias)
        self.o_proj = _linear(width, hidden_size)

        self.relative_position_bias = None
        if width:
            window = (config.window_size, config.window_size)
            self.relative_position_bias = SwinRelativePositionBias(self.num_attention_heads, window)


class OFBSwinMLP(SwinMLP):
    """MLP with this block's hidden width; without any it has no parameters and adds 0."""

    def __init__(self, config: OFBSwinConfig, stage: int, block: int):
        nn.Module.__init__(self)
        hidden_size = config.stage_width(stage)
        width = config.layer_sizes(stage, block)["intermediate_size"]
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = _linear(hidden_size, width)
        self.fc2 = _linear(width, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.fc1 is None:
            return hidden_states.new_zeros(())  # the stock block adds what is returned
        return super().forward(hidden_states)


class OFBSwinLayer(SwinLayer):
    """Swin block with the sizes of its place; a half without width is skipped.

    A block without attention returns a map of no heads, (B * windows, 0, T, T) with T tokens in a
    window. The stock layer gives up its shift for good at the first image that is no larger than
    one window. This one decides for every image, so its outputs do not depend on earlier images.
    """

    def __init__(
        self,
        config: OFBSwinConfig,
        stage: int,
        block: int,
        input_resolution: tuple[int, int],
        drop_path_rate: float = 0.0,
    ):
        nn.Module.__init__(self)
        sizes = config.layer_sizes(stage, block)
        self.attention = OFBSwinAttention(config, stage, block)
        self.layernorm_before = _norm(config, stage, sizes["num_attention_heads"] > 0)
        self.layernorm_after = _norm(config, stage, sizes["intermediate_size"] > 0)
        self.mlp = OFBSwinMLP(config, stage, block)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        shift = config.window_size // 2 if block % 2 else 0
        self.configured_windows = (config.window_size, shift)
        self.window_size, self.shift_size = self.configured_windows
        self.input_resolution = input_resolution
        self.drop_path = SwinDropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        self.window_size, self.shift_size = self.configured_windows
        if self.attention.num_attention_heads:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        if self.mlp.fc1 is not None:
            added = self.mlp(self.layernorm_after(hidden_states))
            hidden_states = hidden_states + self.dropout(added)
        if self.attention.config._attn_implementation != "eager":  # which alone returns maps
            return hidden_states, None
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        # Windows of an image, rounded up: the stock layer pads the last ones.
        rows = -(-input_dimensions[0] // self.window_size)
        columns = -(-input_dimensions[1] // self.window_size)
        windows = hidden_states.shape[0] * rows * columns
        tokens = self.window_size**2
        return hidden_states, hidden_states.new_empty(windows, 0, tokens, tokens)


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear | None:
    """Return a linear layer, None where it would be empty."""
    if not inputs or not outputs:
        return None
    return nn.Linear(inputs, outputs, bias=bias)


def _norm(config: OFBSwinConfig, stage: int, is_needed: bool) -> nn.Module:
    """Return a LayerNorm over a stage's residual stream, or what stands in for it."""
    if not is_needed:
        return nn.Identity()
    return nn.LayerNorm(config.stage_width(stage), eps=config.layer_norm_eps)


class OFBSwinPatchMerging(SwinPatchMerging):
    """Merge 2 x 2 patches, from the width of one stage to that of the next one."""

    def __init__(self, width: int, next_width: int):
        nn.Module.__init__(self)
        self.reduction = nn.Linear(4 * width, next_width, bias=False)
        self.norm = nn.LayerNorm(4 * width)


class OFBSwinStage(SwinStage):
    """Blocks of one width, and the merging to the next stage's width."""

    def __init__(
        self,
        config: OFBSwinConfig,
        stage: int,
        input_resolution: tuple[int, int],
        drop_path: list[float],
    ):
        nn.Module.__init__(self)
        self.config = config
        self.blocks = nn.ModuleList()
        for block, rate in enumerate(drop_path):
            self.blocks.append(OFBSwinLayer(config, stage, block, input_resolution, rate))
        self.downsample = None
        if stage < len(config.depths) - 1:
            widths = config.stage_width(stage), config.stage_width(stage + 1)
            self.downsample = OFBSwinPatchMerging(*widths)


class OFBSwinPreTrainedModel(SwinPreTrainedModel):
    """Base of the OFB Swin classes; weights and outputs are handled as in the stock Swin."""

    config: OFBSwinConfig
    config_class = OFBSwinConfig
    _no_split_modules = ["OFBSwinStage"]


class OFBSwinEncoder(OFBSwinPreTrainedModel, SwinEncoder):
    """The stages of an OFB Swin."""

    def __init__(self, config: OFBSwinConfig, grid_size: tuple[int, int]):
        OFBSwinPreTrainedModel.__init__(self, config)
        self.num_layers = len(config.depths)
        self.config = config
        # The rate rises linearly over all blocks.
        total = sum(config.depths)
        last = max(total - 1, 1)
        drop_path = [config.drop_path_rate * index / last for index in range(total)]
        self.layers = nn.ModuleList()
        first = 0  # block of the stage, counted over all stages
        for stage, depth in enumerate(config.depths):
            scale = 2**stage
            resolution = (grid_size[0] // scale, grid_size[1] // scale)
            rates = drop_path[first : first + depth]
            self.layers.append(OFBSwinStage(config, stage, resolution, rates))
            first += depth
        self.post_init()


class OFBSwinModel(OFBSwinPreTrainedModel, SwinModel):
    """Swin encoder with widths per stage and block. Inputs and outputs as `transformers.SwinModel`.

    `AutoModel.from_pretrained(classifier_checkpoint)` loads without warnings.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(
        self, config: OFBSwinConfig, add_pooling_layer: bool = True, use_mask_token: bool = False
    ):
        OFBSwinPreTrainedModel.__init__(self, config)
        self.config = config
        self.num_layers = len(config.depths)
        self.num_features = config.stage_width(self.num_layers - 1)
        self.embeddings = SwinEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = OFBSwinEncoder(config, self.embeddings.patch_grid)
        self.layernorm = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.pooler = nn.AdaptiveAvgPool1d(1) if add_pooling_layer else None
        self.post_init()


class OFBSwinForImageClassification(OFBSwinPreTrainedModel, SwinForImageClassification):
    """Swin classifier with free widths, used as `transformers.SwinForImageClassification`.

    Example:

    ```python
    >>> from transformers import SwinForImageClassification
    >>> from ofb_hf import OFBSwinForImageClassification

    >>> name = "microsoft/swin-tiny-patch4-window7-224"
    >>> dense = SwinForImageClassification.from_pretrained(name)  # doctest: +SKIP
    >>> same = OFBSwinForImageClassification.from_dense(dense)  # doctest: +SKIP
    ```"""

    # The losses of a batch are means: the Trainer has to divide them by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: OFBSwinConfig):
        OFBSwinPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.swin = OFBSwinModel(config)
        self.classifier = nn.Identity()
        if config.num_labels > 0:
            self.classifier = nn.Linear(self.swin.num_features, config.num_labels)
        self.post_init()

    def forward_chosen(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute logits, and return some of the final tokens; logits depend on all of them.

        Args:
            pixel_values: (B, channels, height, width).
            bool_masked_pos: (B, N) bool, patches to hide, or None.
            chosen: (B, K) indices of final tokens.

        Returns:
            Logits (B, classes) and tokens (B, K, C).
        """
        outputs = self.swin(pixel_values, bool_masked_pos=bool_masked_pos)
        tokens = outputs.last_hidden_state  # (B, N, C)
        index = chosen[..., None].expand(-1, -1, tokens.shape[-1])  # (B, K, C)
        return self.classifier(outputs.pooler_output), tokens.gather(1, index)

    @classmethod
    def from_dense(
        cls, model: SwinForImageClassification, token_schedule: list[list[int]] | None = None
    ) -> "OFBSwinForImageClassification":
        """Copy a stock Swin classifier, or one of this class; `model` is left as it is.

        Args:
            model: any `SwinForImageClassification`, also one loaded from a checkpoint with old key
                names.
            token_schedule: for ViTs only; refused here with an explanation.

        Returns:
            A model with the same weights, dtype, device, attention implementation and training
            mode, whose logits equal those of `model` bit for bit.

        Raises:
            TypeError: if `model` is no Swin classifier.
            ValueError: for a `token_schedule`, as `OFBSwinConfig` says.
        """
        if not isinstance(model, SwinForImageClassification):
            raise TypeError(
                f"from_dense got a {type(model).__name__}; it copies a transformers "
                "SwinForImageClassification. Load one with "
                "SwinForImageClassification.from_pretrained(...)."
            )
        fields = model.config.to_dict()
        # These belong to the stock class, or are set below.
        for key in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(key, None)
        if token_schedule is not None:
            fields["token_schedule"] = token_schedule
        config = OFBSwinConfig(**fields, attn_implementation=model.config._attn_implementation)
        copy = cls(config)
        copy.load_state_dict(model.state_dict(), strict=True)
        for parameter, original in zip(copy.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(original.requires_grad)
        copy.to(device=model.device, dtype=model.dtype)
        copy.config.dtype = model.config.dtype
        return copy.train(model.training)


__all__ = ["OFBSwinForImageClassification", "OFBSwinModel", "OFBSwinPreTrainedModel"]
