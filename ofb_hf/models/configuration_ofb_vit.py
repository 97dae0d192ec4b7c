"""Configuration of a ViT whose layers may have different widths."""

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig


@strict
class OFBViTConfig(ViTConfig):
    r"""`ViTConfig` plus one list per prunable width; without lists it describes the stock ViT.

    Args:
        num_attention_heads_per_layer (`list[int]`, *optional*):
            Heads of each layer, 1 to `num_attention_heads` (which stays the dense count).
        head_dim_per_layer (`list[int]`, *optional*):
            Channels of each head of each layer; the heads of one layer are equally wide.
        intermediate_size_per_layer (`list[int]`, *optional*):
            Hidden width of each layer's MLP.
        attention_scale (`float`, *optional*):
            Factor on the attention logits. A compressed model keeps `dense_head_dim ** -0.5`, whatever its
            heads were narrowed to; `None` derives it from the head's width as the stock model does.

    Raises:
        ValueError: for a list whose length is not `num_hidden_layers`, for a width below 1, and for more heads
            than `num_attention_heads`. The message names the field, the layer and the value.

    Example:

    ```python
    >>> from ofb_hf import OFBViTConfig

    >>> config = OFBViTConfig(num_hidden_layers=2, intermediate_size_per_layer=[768, 1536])
    >>> config.layer_sizes(1)
    {'num_attention_heads': 12, 'head_dim': 64, 'intermediate_size': 1536}
    ```"""

    model_type = "ofb_vit"

    num_attention_heads_per_layer: list[int] | None = None
    head_dim_per_layer: list[int] | None = None
    intermediate_size_per_layer: list[int] | None = None
    attention_scale: float | None = None

    def layer_sizes(self, layer: int) -> dict[str, int]:
        """Widths of one layer: `num_attention_heads`, `head_dim` and `intermediate_size`."""

        # As in the stock model, a `head_dim` beside the declared fields counts.
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

        def pick(sizes: list[int] | None, default: int) -> int:
            return default if sizes is None else sizes[layer]

        return {
            "num_attention_heads": pick(self.num_attention_heads_per_layer, self.num_attention_heads),
            "head_dim": pick(self.head_dim_per_layer, head_dim),
            "intermediate_size": pick(self.intermediate_size_per_layer, self.intermediate_size),
        }

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for field in ("num_attention_heads_per_layer", "head_dim_per_layer", "intermediate_size_per_layer"):
            self._check_sizes(field, getattr(self, field))
        for layer, heads in enumerate(self.num_attention_heads_per_layer or []):
            if heads > self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads_per_layer[{layer}] is {heads}, but num_attention_heads is "
                    f"{self.num_attention_heads}; a layer has 1 to {self.num_attention_heads} heads."
                )
        if self.attention_scale is not None and not self.attention_scale > 0:
            raise ValueError(f"attention_scale is {self.attention_scale}; it must be positive or None.")

    def _check_sizes(self, field: str, sizes: list[int] | None) -> None:
        if sizes is None:
            return
        if len(sizes) != self.num_hidden_layers:
            raise ValueError(
                f"{field} has {len(sizes)} entries, but num_hidden_layers is {self.num_hidden_layers}; "
                "give one width per layer."
            )
        for layer, size in enumerate(sizes):
            if size < 1:
                raise ValueError(f"{field}[{layer}] is {size}; every width must be at least 1.")


__all__ = ["OFBViTConfig"]
