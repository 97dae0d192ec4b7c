"""ViT with a width of its own in every layer: the result of a bi-mask search.

Parameters, forward passes and outputs are those of transformers' ViT; only the sizes of the linear
layers differ. With no width lists in the config the model equals the stock one bit for bit.

With a `token_schedule`, blocks return fewer tokens than they get. Between attention and MLP, patch
tokens are ranked by the attention that the class token pays them; the last ones are dropped, the
next ones merged into the tokens that are most similar to them (DiffRate, arXiv:2305.17997). Their
numbers are fixed, so all shapes are static.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTModel, ViTPreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTLayer,
    ViTMLP,
    ViTPooler,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ofb_vit import OFBViTConfig

# Attention kernels that take an additive bias, which is how merged tokens count for more than one.
BIASED_ATTENTION = ("eager", "sdpa")


def class_attention(
    query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """Return the attention of the class token to each patch token, averaged over heads.

    That is one row of the attention map; the others are not computed.

    Args:
        query: (B, heads, N, channels per head), class token first.
        key: the same of the keys.
        scaling: factor on the logits.
        bias: (B, 1, 1, N), added to the logits.

    Returns:
        (B, N - 1), in float32 or the inputs' wider type.
    """
    logits = query[:, :, :1] @ key.transpose(-1, -2) * scaling  # (B, heads, 1, N)
    if bias is not None:
        logits = logits + bias
    wide = torch.promote_types(logits.dtype, torch.float32)
    attention = logits.softmax(-1, dtype=wide)
    patches = attention[:, :, 0, 1:]  # (B, heads, N - 1)
    return patches.mean(1)


def take_tokens(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Select tokens of each image.

    Args:
        tokens: (B, N, C).
        chosen: (B, K), their numbers.

    Returns:
        (B, K, C).
    """
    index = chosen[..., None].expand(-1, -1, tokens.shape[-1])  # (B, K, C)
    return tokens.gather(1, index)


def rank_tokens(importance: Tensor, count: int) -> Tensor:
    """Return the numbers of the class token and the most important patch tokens.

    Args:
        importance: of the patch tokens, (B, N - 1).
        count: tokens to choose, class token included.

    Returns:
        (B, count), the class token first, then patch tokens of falling importance.
    """
    patches = importance.topk(count - 1).indices + 1  # (B, count - 1)
    return F.pad(patches, (1, 0))  # the class token is number 0


def is_one_for_all_queries(attention_mask: Tensor | None) -> bool:
    """Return whether a mask, as attention kernels get it, has one row for all queries.

    Then some of the queries may be left out. Masks of flex attention always have a row for each.
    """
    if attention_mask is None:
        return True
    return isinstance(attention_mask, Tensor) and attention_mask.shape[1:3] == (1, 1)


def require_biased_attention(config: ViTConfig) -> None:
    """Raise ValueError unless the attention kernel can count a token by its size."""
    if config._attn_implementation not in BIASED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {config._attn_implementation!r}, which takes no additive "
            "bias; with fewer tokens (token_schedule, and searches for one) it is one of "
            f"{list(BIASED_ATTENTION)}."
        )


def token_directions(tokens: Tensor) -> Tensor:
    """Return tokens (B, N, C) scaled to length 1; features that are all 0 stay 0."""
    # In float16 the smallest divisor of `normalize` would be 0.
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return F.normalize(tokens.detach().to(wide), dim=-1).to(tokens.dtype)


def match_tokens(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find for each token from number `count` on the most similar patch token before `count`.

    Args:
        tokens: (B, N, C), class token first.
        count: 2 to N - 1.

    Returns:
        Cosine similarity (B, N - count), and the number of the match (B, N - count), 1 to
        count - 1. The class token is no match.
    """
    directions = token_directions(tokens)
    leaving = directions[:, count:]
    staying = directions[:, 1:count]
    similarities = leaving @ staying.transpose(-1, -2)  # (B, N - count, count - 1)
    similarity, match = similarities.max(-1)
    return similarity, match + 1


def merge_tokens(tokens: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge each token from number `count` on into its match.

    Features become the mean of all tokens that meet. Sizes add up, each merged one multiplied by
    its similarity, as in DiffRate's published code. Deviation: a negative similarity counts as 0,
    so a size never falls below 1.

    Args:
        tokens: (B, N, C), most important first.
        sizes: (B, N), how many patches each token stands for.
        count: tokens that stay.

    Returns:
        Tokens (B, count, C) and sizes (B, count).
    """
    return _join_tokens(tokens, sizes, count, *match_tokens(tokens, count))


def _join_tokens(
    tokens: Tensor, sizes: Tensor, count: int, similarity: Tensor, match: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge each token from number `count` on into its match; see `merge_tokens`."""
    # Which token joins which: (B, N - count, count - 1). A product with this 0/1 matrix is
    # deterministic on every device, which scattered sums are not.
    joins = match[..., None] == torch.arange(1, count, device=match.device)
    weights = joins.to(tokens.dtype)
    members = 1 + weights.sum(1)  # (B, count - 1)
    joining = weights.transpose(-1, -2) @ tokens[:, count:]  # (B, count - 1, C), sums
    patches = (tokens[:, 1:count] + joining) / members[..., None]
    similarity = similarity.to(sizes.dtype).clamp(min=0)
    merged = sizes[:, count:] * similarity  # (B, N - count)
    gained = (joins * merged[..., None]).sum(1)  # (B, count - 1)
    # The class token takes no part: (B, 1 + count - 1, C) and (B, 1 + count - 1).
    tokens = torch.cat([tokens[:, :1], patches.to(tokens.dtype)], 1)
    sizes = torch.cat([sizes[:, :1], sizes[:, 1:count] + gained], 1)
    return tokens, sizes


@dataclass
class TokenDecision:
    """What a token reduction does to the tokens of one layer.

    Args:
        chosen: the tokens after dropping, (B, K), most important first.
        count: tokens after merging.
        similarity: of each chosen token from number `count` on to its match, (B, K - count); None
            if nothing is merged.
        match: number of its match, (B, K - count).
    """

    chosen: Tensor
    count: int
    similarity: Tensor | None = None
    match: Tensor | None = None

    def reduce(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return fewer tokens (B, count, C) and their sizes (B, count).

        Args:
            tokens: (B, N, C), those that the decision was made for, or others of the same images.
            sizes: (B, N), None = all 1.
        """
        tokens = take_tokens(tokens, self.chosen)
        if sizes is not None:
            sizes = sizes.gather(1, self.chosen)
        if self.match is None:
            return tokens, sizes
        if sizes is None:
            wide = torch.promote_types(tokens.dtype, torch.float32)
            sizes = torch.ones_like(self.chosen, dtype=wide)
        return _join_tokens(tokens, sizes, self.count, self.similarity, self.match)


class TokenReduction(nn.Module):
    """Drop and merge the patch tokens of one layer.

    Args:
        kept: tokens after dropping, at most; class token included.
        merged: the same after merging.
    """

    def __init__(self, kept: int, merged: int):
        super().__init__()
        self.kept = kept
        self.merged = merged

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return fewer tokens, and their sizes.

        Args:
            tokens: (B, N, C).
            sizes: (B, N), None = all 1.
            importance: of the patch tokens, (B, N - 1).
        """
        return self.decide(tokens, importance).reduce(tokens, sizes)

    def decide(self, tokens: Tensor, importance: Tensor) -> "TokenDecision":
        """Return which tokens stay and which of them the others join.

        Args:
            tokens: (B, N, C).
            importance: of the patch tokens, (B, N - 1).
        """
        kept = min(self.kept, tokens.shape[1])
        chosen = rank_tokens(importance.detach(), kept)
        if self.merged >= kept:
            return TokenDecision(chosen, kept)
        match = match_tokens(take_tokens(tokens, chosen), self.merged)
        return TokenDecision(chosen, self.merged, *match)

    def extra_repr(self) -> str:
        """Return what is shown when the model is printed."""
        return f"kept={self.kept}, merged={self.merged}"


class OFBViTAttention(ViTAttention):
    """Self-attention with this layer's heads and head width; its scale may be the dense model's.

    Without heads it has no parameters and adds nothing. Its entry in `attentions` is then a map of
    no heads, (B, 0, N, N), so that there is one per layer.
    """

    def __init__(self, config: OFBViTConfig, layer: int):
        nn.Module.__init__(self)
        sizes = config.layer_sizes(layer)
        self.config = config
        self.num_attention_heads = sizes["num_attention_heads"]
        self.head_dim = sizes["head_dim"]
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = config.attention_scale
        if self.scaling is None:
            self.scaling = (self.head_dim or 1) ** -0.5
        self.is_causal = False

        width = self.num_attention_heads * self.head_dim
        self.q_proj = _linear(config.hidden_size, width, config.qkv_bias)
        self.k_proj = _linear(config.hidden_size, width, config.qkv_bias)
        self.v_proj = _linear(config.hidden_size, width, config.qkv_bias)
        self.o_proj = _linear(width, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        with_importance: bool = False,
        attending: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Attend as the stock attention does, for all tokens or for some of them.

        Args:
            hidden_states: (B, N, C), the tokens that are attended to.
            attention_mask: as for the stock attention.
            with_importance: whether to return the importance of the patches.
            attending: (B, K, C), the tokens whose attention to compute; by default all.
            kwargs: for the attention kernel.

        Returns:
            Outputs (B, K, C), None without heads; attention maps (B, heads, K, N), where the kernel
            returns them; and the importance of the patches (B, N - 1), if asked for.
        """
        attending = hidden_states if attending is None else attending
        if not self.num_attention_heads:
            batch, tokens, _ = hidden_states.shape
            weights = None
            if self.config._attn_implementation == "eager":  # which alone returns maps
                weights = hidden_states.new_empty(batch, 0, attending.shape[1], tokens)
            return None, weights, None
        query = self._split(self.q_proj(attending))
        key = self._split(self.k_proj(hidden_states))
        value = self._split(self.v_proj(hidden_states))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        importance = None
        if with_importance:
            importance = class_attention(query, key, self.scaling, attention_mask)
        output = output.flatten(2).contiguous()  # (B, K, heads, channels) -> (B, K, width)
        return self.o_proj(output), weights, importance

    def _split(self, projected: Tensor) -> Tensor:
        """Return projected tokens (B, N, width) as (B, heads, N, channels per head)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class OFBViTMLP(ViTMLP):
    """MLP with this layer's hidden width; without any it has no parameters."""

    def __init__(self, config: OFBViTConfig, layer: int):
        nn.Module.__init__(self)
        width = config.layer_sizes(layer)["intermediate_size"]
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = _linear(config.hidden_size, width)
        self.fc2 = _linear(width, config.hidden_size)


class OFBViTLayer(ViTLayer):
    """Pre-norm transformer block with the sizes of its layer; a half without width is skipped."""

    def __init__(self, config: OFBViTConfig, layer: int):
        nn.Module.__init__(self)
        sizes = config.layer_sizes(layer)
        self.attention = OFBViTAttention(config, layer)
        self.layernorm_before = _norm(config, sizes["num_attention_heads"] > 0)
        self.layernorm_after = _norm(config, sizes["intermediate_size"] > 0)
        self.mlp = OFBViTMLP(config, layer)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        before, kept, merged = config.token_counts(layer)
        self.reduction = TokenReduction(kept, merged) if merged < before else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sizes: Tensor | None = None,
        wanted: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block.

        Args:
            hidden_states: (B, N, C).
            attention_mask: as for the stock block.
            sizes: (B, N), how many patches each token stands for; None before the first merging.
            wanted: (B, K), which tokens to compute; by default, and where the schedule reduces them
                here, all.
            kwargs: for the attention kernel.

        Returns:
            Tokens and their sizes; fewer than came in where the schedule or `wanted` says so.
        """
        if sizes is not None:
            # Proportional attention: a token of n patches is attended to n times
            # (arXiv:2210.09461).
            attention_mask = sizes.log().to(hidden_states.dtype)[:, None, None]  # (B, 1, 1, N)
        normed = self.layernorm_before(hidden_states)
        attending = normed
        if self.reduction is not None:
            wanted = None
        asks_less = wanted is not None and is_one_for_all_queries(attention_mask)
        if asks_less:
            attending = take_tokens(normed, wanted)
        attended, _, importance = self.attention(
            normed,
            attention_mask,
            with_importance=self.reduction is not None,
            attending=attending,
            **kwargs,
        )
        if wanted is not None:
            hidden_states = take_tokens(hidden_states, wanted)
            if attended is not None and not asks_less:
                attended = take_tokens(attended, wanted)
        if attended is not None:
            hidden_states = hidden_states + self.dropout(attended)
        if self.reduction is not None:
            hidden_states, sizes = self.reduction(hidden_states, sizes, importance)
        if self.mlp.fc1 is not None:
            added = self.mlp(self.layernorm_after(hidden_states))
            hidden_states = hidden_states + self.dropout(added)
        return hidden_states, sizes


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear | None:
    """Return a linear layer, None where it would be empty."""
    if not inputs or not outputs:
        return None
    return nn.Linear(inputs, outputs, bias=bias)


def _norm(config: OFBViTConfig, is_needed: bool = True) -> nn.Module:
    """Return a LayerNorm over the residual stream, or what stands in for it."""
    if not is_needed:
        return nn.Identity()
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class OFBViTPreTrainedModel(ViTPreTrainedModel):
    """Base of the OFB ViT classes; weights and outputs are handled as in the stock ViT."""

    config: OFBViTConfig
    config_class = OFBViTConfig
    _no_split_modules = ["ViTEmbeddings", "OFBViTLayer"]


class OFBViTModel(OFBViTPreTrainedModel, ViTModel):
    """ViT encoder with per-layer widths. Inputs and outputs as `transformers.ViTModel`.

    With a `token_schedule`, `last_hidden_state`, `hidden_states` and `attentions` have the tokens
    that remain at their place: the class token first, then patches of falling importance, not in
    the order of the image.

    By default there is no pooling layer: a classifier's checkpoint holds none, and
    `AutoModel.from_pretrained(classifier_checkpoint)` should load without warnings.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(
        self, config: OFBViTConfig, add_pooling_layer: bool = False, use_mask_token: bool = False
    ):
        OFBViTPreTrainedModel.__init__(self, config)
        self.config = config
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList(
            [OFBViTLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.layernorm = _norm(config)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        wanted: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images as `transformers.ViTModel.forward` does.

        Args:
            pixel_values: as there.
            bool_masked_pos: as there.
            interpolate_pos_encoding: as there.
            attention_mask: as there.
            wanted: (B, K), the tokens to return: the last layer computes no others. With a
                `token_schedule`, the class token at most.
            kwargs: for the layers.

        Raises:
            ValueError: with a `token_schedule`, for an `attention_mask`, and for attention without
                additive bias.
        """
        self._check_schedule(attention_mask)
        hidden_states = self.embeddings(
            pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype),
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        sizes = None
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            computed = wanted if number == last else None
            hidden_states, sizes = layer(hidden_states, attention_mask, sizes, computed, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = self.pooler(hidden_states) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def _check_schedule(self, attention_mask: Tensor | None) -> None:
        if self.config.token_schedule is None:
            return
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is given, but token_schedule moves and removes tokens, which it "
                "would no longer fit; leave it out, or load the model with token_schedule=None."
            )
        require_biased_attention(self.config)


class OFBViTForImageClassification(OFBViTPreTrainedModel, ViTForImageClassification):
    """ViT classifier with per-layer widths, used as `transformers.ViTForImageClassification`.

    Example:

    ```python
    >>> from transformers import ViTForImageClassification
    >>> from ofb_hf import OFBViTForImageClassification

    >>> name = "facebook/deit-small-patch16-224"
    >>> dense = ViTForImageClassification.from_pretrained(name)  # doctest: +SKIP
    >>> same = OFBViTForImageClassification.from_dense(dense)  # doctest: +SKIP
    ```"""

    # The losses of a batch are means: the Trainer has to divide them by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: OFBViTConfig):
        OFBViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = OFBViTModel(config)
        self.classifier = nn.Identity()
        if config.num_labels > 0:
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward_chosen(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute logits, and in the last layer no tokens but the class token and the chosen ones.

        Args:
            pixel_values: (B, channels, height, width).
            bool_masked_pos: (B, N) bool, patches to hide, or None.
            chosen: (B, K) indices of patches; K = 0 with a `token_schedule`.

        Returns:
            Logits (B, classes) and tokens (B, K, C).
        """
        wanted = F.pad(chosen + 1, (1, 0))  # (B, 1 + K), the class token is number 0
        outputs = self.vit(pixel_values, bool_masked_pos=bool_masked_pos, wanted=wanted)
        tokens = outputs.last_hidden_state  # (B, 1 + K, C)
        return self.classifier(tokens[:, 0]), tokens[:, 1:]

    @classmethod
    def from_dense(
        cls, model: ViTForImageClassification, token_schedule: list[list[int]] | None = None
    ) -> "OFBViTForImageClassification":
        """Copy a stock ViT classifier, or one of this class; `model` is left as it is.

        Args:
            model: any `ViTForImageClassification`, also one loaded from a checkpoint with old key
                names.
            token_schedule: as in `OFBViTConfig`; by default that of `model`, if it has one.

        Returns:
            A model with the same weights, dtype, device, attention implementation and training
            mode. Without a schedule, and with one that keeps all tokens, its logits equal those of
            `model` bit for bit.

        Raises:
            TypeError: if `model` is no ViT classifier.
            ValueError: for a schedule that `OFBViTConfig` refuses.
        """
        if not isinstance(model, ViTForImageClassification):
            raise TypeError(
                f"from_dense got a {type(model).__name__}; it copies a transformers "
                "ViTForImageClassification. Load one with "
                "ViTForImageClassification.from_pretrained(...)."
            )
        fields = model.config.to_dict()
        # These belong to the stock class, or are set below.
        for key in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(key, None)
        if token_schedule is not None:
            fields["token_schedule"] = token_schedule
        config = OFBViTConfig(**fields, attn_implementation=model.config._attn_implementation)
        copy = cls(config)
        copy.load_state_dict(model.state_dict(), strict=True)
        for parameter, original in zip(copy.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(original.requires_grad)
        copy.to(device=model.device, dtype=model.dtype)
        copy.config.dtype = model.config.dtype
        return copy.train(model.training)


__all__ = ["OFBViTForImageClassification", "OFBViTModel", "OFBViTPreTrainedModel"]
