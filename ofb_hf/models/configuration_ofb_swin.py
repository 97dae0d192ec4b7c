"""Configuration of a Swin whose stages and blocks may have widths of their own."""

import json

from huggingface_hub.dataclasses import strict
from transformers import SwinConfig


@strict
class OFBSwinConfig(SwinConfig):
    r"""`SwinConfig` plus one list per prunable width; without lists it describes the stock Swin.

    Args:
        hidden_size_per_stage (`list[int]`, *optional*):
            Channels of each stage's residual stream. The first entry is `embed_dim`; the others
            need not double.
        num_heads_per_block (`list[list[int]]`, *optional*):
            Heads of each block of each stage, up to the stage's `num_heads` (which stays the dense
            count). 0 = the block has no attention, nor the norm before it: tokens pass by.
        head_dim_per_block (`list[list[int]]`, *optional*):
            Channels of each head of each block; the heads of one block are equally wide. 0 where
            there are none.
        intermediate_size_per_block (`list[list[int]]`, *optional*):
            Hidden width of each block's MLP. 0 = the block has no MLP, nor the norm before it.
        attention_scale_per_stage (`list[float]`, *optional*):
            Factor on the attention logits. A compressed model keeps `dense_head_dim ** -0.5`,
            whatever the present width of its heads; `None` derives it from the head's width as the
            stock model does.
        basis (`str`, *optional*):
            The basis that the network, or the one that it was cut from, was rewritten in:
            `"heads"` or `"equivalent"`; `None` if it never was. The indices of a cut count units
            in it. It does not change what the model computes.

    Raises:
        ValueError: for a list that does not match `depths`, for a negative width and a stage of
            width 0, for more heads than `num_heads`, and for a first width other than `embed_dim`.
            The message names the field, the place and the value. For an unknown basis.

    Example:

    ```python
    >>> from ofb_hf import OFBSwinConfig

    >>> config = OFBSwinConfig(depths=[1, 2], num_heads=[3, 6], hidden_size_per_stage=[96, 160])
    >>> config.layer_sizes(1, 0)
    {'num_attention_heads': 6, 'head_dim': 26, 'intermediate_size': 640}
    ```"""

    model_type = "ofb_swin"

    hidden_size_per_stage: list[int] | None = None
    num_heads_per_block: list[list[int]] | None = None
    head_dim_per_block: list[list[int]] | None = None
    intermediate_size_per_block: list[list[int]] | None = None
    attention_scale_per_stage: list[float] | None = None
    # A number that only decoders read; text in files for which `stock_difference` has an answer.
    encoder_stride: int | str = 32
    # No field of the dataclass: configs of networks that were never rewritten do not hold it.
    basis = None

    def stage_width(self, stage: int) -> int:
        """Return the channels of one stage's residual stream."""
        if self.hidden_size_per_stage is None:
            return int(self.embed_dim * 2**stage)
        return self.hidden_size_per_stage[stage]

    def layer_sizes(self, stage: int, block: int) -> dict[str, int]:
        """Return `num_attention_heads`, `head_dim` and `intermediate_size` of one block.

        No heads, or heads without channels, are both 0: the block has no attention.
        """

        def pick(sizes: list[list[int]] | None, default: int) -> int:
            return default if sizes is None else sizes[stage][block]

        width = self.stage_width(stage)
        # What the stock model derives, where there are no lists.
        heads = pick(self.num_heads_per_block, self.num_heads[stage])
        head_dim = pick(self.head_dim_per_block, width // self.num_heads[stage])
        mlp_width = pick(self.intermediate_size_per_block, int(self.mlp_ratio * width))
        return {
            "num_attention_heads": heads if head_dim else 0,
            "head_dim": head_dim if heads else 0,
            "intermediate_size": mlp_width,
        }

    def stock_difference(self) -> str | None:
        """Return what a `SwinForImageClassification` would ignore; None if it computes the same."""
        for stage, depth in enumerate(self.depths):
            width = int(self.embed_dim * 2**stage)
            heads = self.num_heads[stage]
            stock = {
                "num_attention_heads": heads,
                "head_dim": width // heads,
                "intermediate_size": int(self.mlp_ratio * width),
            }
            scales = self.attention_scale_per_stage
            if scales is not None and scales[stage] != (width // heads) ** -0.5:
                return "an attention_scale_per_stage"
            if any(self.layer_sizes(stage, block) != stock for block in range(depth)):
                return "widths per block"
        return None

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the content of `config.json`.

        Where the stock class would compute something else, it stops at `encoder_stride`, a field
        of a decoder, which is text then: `SwinForImageClassification.from_pretrained` would load
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
        if getattr(self, "token_schedule", None) is not None:
            raise ValueError(
                "token_schedule is given, but Swin has no class token to rank patches by, and its "
                "windows need the whole grid; leave it out, or take a ViT."
            )
        if self.basis not in (None, "heads", "equivalent"):
            raise ValueError(
                f"basis is {self.basis!r}; allowed are 'heads', 'equivalent' and None."
            )
        stages = len(self.depths)
        self._check_list("hidden_size_per_stage", self.hidden_size_per_stage, stages, "stage")
        self._check_list(
            "attention_scale_per_stage", self.attention_scale_per_stage, stages, "stage"
        )
        self._check_rows("num_heads_per_block", self.num_heads_per_block)
        self._check_rows("head_dim_per_block", self.head_dim_per_block)
        self._check_rows("intermediate_size_per_block", self.intermediate_size_per_block)
        self._check_heads()
        widths = self.hidden_size_per_stage
        if widths is not None and widths[0] != self.embed_dim:
            raise ValueError(
                f"hidden_size_per_stage[0] is {widths[0]}, but embed_dim is {self.embed_dim}; both "
                "are the width of the first stage and must agree."
            )
        # The stock config puts the doubled width here, which other libraries read as the width of
        # the output.
        self.hidden_size = self.stage_width(stages - 1)

    def _check_heads(self) -> None:
        """Raise ValueError for more heads than the dense model has, and for heads without
        channels."""
        for stage, row in enumerate(self.num_heads_per_block or []):
            largest = self.num_heads[stage]
            for block, heads in enumerate(row):
                if heads > largest:
                    raise ValueError(
                        f"num_heads_per_block[{stage}][{block}] is {heads}, but "
                        f"num_heads[{stage}] is {largest}; a block has 0 to {largest} heads."
                    )
        if self.head_dim_per_block is not None:
            return
        for stage, width in enumerate(self.hidden_size_per_stage or []):
            heads = self.num_heads[stage]
            if width < heads:
                raise ValueError(
                    f"hidden_size_per_stage[{stage}] is {width}, but num_heads[{stage}] is "
                    f"{heads}; without head_dim_per_block these heads would be 0 channels wide."
                )

    def _check_rows(self, field: str, rows: list[list[int]] | None) -> None:
        """Raise ValueError unless there is one width of 0 or more for each block."""
        if rows is None:
            return
        self._check_list(field, rows, len(self.depths), "stage")
        for stage, row in enumerate(rows):
            self._check_list(f"{field}[{stage}]", row, self.depths[stage], "block", smallest=0)

    def _check_list(
        self, field: str, values: list | None, length: int, place: str, smallest: int = 1
    ) -> None:
        if values is None:
            return
        if len(values) != length:
            raise ValueError(
                f"{field} has {len(values)} entries, but depths is {list(self.depths)}; give one "
                f"per {place}, {length}."
            )
        # Rows of a list of lists are neither: they are checked one by one.
        for index, value in enumerate(values):
            if isinstance(value, int) and value < smallest:
                raise ValueError(
                    f"{field}[{index}] is {value}; every width must be at least {smallest}."
                )
            if isinstance(value, float) and not value > 0:
                raise ValueError(f"{field}[{index}] is {value}; every factor must be positive.")


__all__ = ["OFBSwinConfig"]
