"""Configuration of a ViT whose layers may have different widths."""

import json
from collections.abc import Sequence
from operator import index
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig


@strict
class OFBViTConfig(ViTConfig):
    r"""`ViTConfig` plus one list per prunable width; without lists it describes the stock ViT.

    Args:
        num_attention_heads_per_layer (`list[int]`, *optional*):
            Heads of each layer, up to `num_attention_heads` (which stays the dense count). 0 = the
            layer has no attention, nor the norm before it: tokens pass by.
        head_dim_per_layer (`list[int]`, *optional*):
            Channels of each head of each layer; the heads of one layer are equally wide. 0 where
            there are none.
        intermediate_size_per_layer (`list[int]`, *optional*):
            Hidden width of each layer's MLP. 0 = the layer has no MLP, nor the norm before it.
        attention_scale (`float`, *optional*):
            Factor on the attention logits. A compressed model keeps `dense_head_dim ** -0.5`,
            whatever the present width of its heads; `None` derives it from the head's width as the
            stock model does.
        token_schedule (`list[list[int]]`, *optional*):
            For each layer `[kept after dropping, kept after merging]`: at most this many tokens,
            the class token included, go on to its MLP and to the next layer. Tokens never come
            back, so an entry above an earlier one has the effect of the earlier one; the running
            minimum is what is stored. `None` keeps all tokens everywhere, and so does a schedule of
            full counts only, which is stored as `None`.
        basis (`str`, *optional*):
            The basis that the network, or the one that it was cut from, was rewritten in:
            `"heads"` or `"equivalent"`; `None` if it never was. The indices of a cut count units
            in it. It does not change what the model computes.

    Raises:
        ValueError: for a list whose length is not `num_hidden_layers`, for a negative width, for
            more heads than `num_attention_heads`, and for token counts that are no pair of whole
            numbers, below 2 (the class token and a patch), above the tokens of an image, or falling
            in a layer without attention. The message names the field, the layer and the value.
            For an unknown basis.

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
    # A number that only decoders read; text in files for which `stock_difference` has an answer.
    encoder_stride: int | str = 16
    # Not `list[list[int]]`: tuples and numbers of numpy are accepted as well, and converted.
    token_schedule: Any = None
    # No field of the dataclass: configs of networks that were never rewritten do not hold it.
    basis = None

    @property
    def num_tokens(self) -> int:
        """Tokens of one image at `image_size`, class token included."""
        height, width = _pair(self.image_size)
        rows, columns = _pair(self.patch_size)
        return (height // rows) * (width // columns) + 1

    def token_counts(self, layer: int) -> tuple[int, int, int]:
        """Return the tokens that enter a layer, those after dropping, and those after merging.

        The class token is included.
        """
        if self.token_schedule is None:
            return self.num_tokens, self.num_tokens, self.num_tokens
        # Checked again: `from_pretrained(..., token_schedule=...)` sets it after construction.
        schedule = self._falling_schedule(self.token_schedule)
        before = schedule[layer - 1][1] if layer > 0 else self.num_tokens
        kept, merged = schedule[layer]
        return before, kept, merged

    def stored_schedule(self, schedule: Sequence[Sequence[int]]) -> list[list[int]] | None:
        """Return a schedule as `token_schedule` stores it.

        Returns:
            Its running minimum, or None if it keeps all tokens.

        Raises:
            ValueError: for one that this model cannot follow; see the class.
        """
        falling = self._falling_schedule(schedule)
        return falling if falling[-1][1] < self.num_tokens else None

    def layer_sizes(self, layer: int) -> dict[str, int]:
        """Return `num_attention_heads`, `head_dim` and `intermediate_size` of one layer.

        No heads, or heads without channels, are both 0: the layer has no attention.
        """

        def pick(sizes: list[int] | None, default: int) -> int:
            return default if sizes is None else sizes[layer]

        # As the stock model does: a `head_dim` that is not a declared field counts.
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        heads = pick(self.num_attention_heads_per_layer, self.num_attention_heads)
        head_dim = pick(self.head_dim_per_layer, head_dim)
        return {
            "num_attention_heads": heads if head_dim else 0,
            "head_dim": head_dim if heads else 0,
            "intermediate_size": pick(self.intermediate_size_per_layer, self.intermediate_size),
        }

    def stock_difference(self) -> str | None:
        """Return what a `ViTForImageClassification` would ignore; None if it computes the same."""
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        stock = {
            "num_attention_heads": self.num_attention_heads,
            "head_dim": head_dim,
            "intermediate_size": self.intermediate_size,
        }
        if self.token_schedule is not None:
            return "a token_schedule"
        if self.attention_scale not in (None, (head_dim or 1) ** -0.5):
            return "an attention_scale"
        if any(self.layer_sizes(layer) != stock for layer in range(self.num_hidden_layers)):
            return "widths per layer"
        return None

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the content of `config.json`.

        Where the stock class would compute something else, it stops at `encoder_stride`, a field
        of a decoder, which is text then: `ViTForImageClassification.from_pretrained` would load
        the weights with no more than a general warning.
        """
        text = super().to_json_string(use_diff)
        difference = self.stock_difference()
        if difference is None:
            return text
        fields = json.loads(text)
        fields["encoder_stride"] = (
            f"{self.encoder_stride} in a decoder. This model has {difference}, which the class of "
            "transformers does not follow: import ofb_hf and use the Auto classes, or load it with "
            "trust_remote_code=True."
        )
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def __post_init__(self, **kwargs):
        # its first word is the number in any case
        self.encoder_stride = int(str(self.encoder_stride).split()[0])
        super().__post_init__(**kwargs)
        self._check_sizes("num_attention_heads_per_layer", self.num_attention_heads_per_layer)
        self._check_sizes("head_dim_per_layer", self.head_dim_per_layer)
        self._check_sizes("intermediate_size_per_layer", self.intermediate_size_per_layer)
        if self.head_dim_per_layer is None and 0 < self.hidden_size < self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but num_attention_heads is "
                f"{self.num_attention_heads}; without head_dim_per_layer these heads would be 0 "
                "channels wide."
            )
        for layer, heads in enumerate(self.num_attention_heads_per_layer or []):
            if heads > self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads_per_layer[{layer}] is {heads}, but num_attention_heads "
                    f"is {self.num_attention_heads}; a layer has 0 to {self.num_attention_heads} "
                    "heads."
                )
        if self.attention_scale is not None and not self.attention_scale > 0:
            raise ValueError(
                f"attention_scale is {self.attention_scale}; it must be positive or None."
            )
        if self.basis not in (None, "heads", "equivalent"):
            raise ValueError(
                f"basis is {self.basis!r}; allowed are 'heads', 'equivalent' and None."
            )
        if self.token_schedule is not None:
            self.token_schedule = self.stored_schedule(self.token_schedule)

    def _falling_schedule(self, schedule: Sequence[Sequence[int]]) -> list[list[int]]:
        """Check a schedule and return its running minimum."""
        schedule = self._whole_counts(schedule)
        if len(schedule) != self.num_hidden_layers:
            raise ValueError(
                f"token_schedule has {len(schedule)} entries, but num_hidden_layers is "
                f"{self.num_hidden_layers}; give [kept after dropping, kept after merging] for "
                "each layer."
            )
        falling: list[list[int]] = []
        left = self.num_tokens
        for layer, counts in enumerate(schedule):
            in_range = [2 <= count <= self.num_tokens for count in counts]
            if len(counts) != 2 or not all(in_range):
                raise ValueError(
                    f"token_schedule[{layer}] is {counts}; give [kept after dropping, kept after "
                    "merging], each from 2 (the class token and one patch) to the "
                    f"{self.num_tokens} tokens of an image."
                )
            # Tokens never come back.
            before = left
            kept = min(before, counts[0])
            left = min(kept, counts[1])
            if left < before and not self.layer_sizes(layer)["num_attention_heads"]:
                raise ValueError(
                    f"token_schedule[{layer}] is {counts}, fewer than the {before} tokens that "
                    "come in, but that layer has no attention to rank them by; let them pass."
                )
            falling.append([kept, left])
        return falling

    def _whole_counts(self, schedule: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return a schedule as lists of whole numbers."""
        converted: list[list[int]] = []
        try:
            # `index` takes whole numbers of any type, and refuses 3.0 and "3".
            for counts in schedule:
                converted.append([index(count) for count in counts])
        except TypeError:
            raise ValueError(
                f"token_schedule is {schedule!r}; give two whole numbers for each layer, [kept "
                "after dropping, kept after merging]."
            ) from None
        return converted

    def _check_sizes(self, field: str, sizes: list[int] | None) -> None:
        """Raise ValueError unless there is one width of 0 or more for each layer."""
        if sizes is None:
            return
        if len(sizes) != self.num_hidden_layers:
            raise ValueError(
                f"{field} has {len(sizes)} entries, but num_hidden_layers is "
                f"{self.num_hidden_layers}; give one width per layer."
            )
        for layer, size in enumerate(sizes):
            if size < 0:
                raise ValueError(
                    f"{field}[{layer}] is {size}; a width is 1 or more, or 0 for none."
                )


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


__all__ = ["OFBViTConfig"]
