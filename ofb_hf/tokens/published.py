"""Token schedules that DiffRate published for DeiT-T, S and B (arXiv:2305.17997)."""

from transformers import ViTConfig

from .schedules import Schedule, num_tokens

# From compression_rate.json of github.com/OpenGVLab/DiffRate (commit b380acf), for DeiT-T, S and B
# at 224 pixels: hidden size -> GMACs by the published formula -> tokens kept after dropping, and
# tokens left after merging, of every layer. A count may be larger than the number of tokens that
# enter the layer; then it changes nothing.
PUBLISHED: dict[int, dict[float, tuple[list[int], list[int]]]] = {
    192: {
        0.6: (
            [197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3],
            [197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3],
        ),
        0.7: (
            [197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3],
            [197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3],
        ),
        0.8: (
            [197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3],
            [197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3],
        ),
        0.9: (
            [197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3],
            [197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3],
        ),
        1.0: (
            [197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21],
            [197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21],
        ),
    },
    384: {
        2.3: (
            [197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3],
            [197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3],
        ),
        2.5: (
            [197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3],
            [197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3],
        ),
        2.7: (
            [197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3],
            [197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3],
        ),
        2.9: (
            [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3],
            [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3],
        ),
        3.1: (
            [197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3],
            [197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3],
        ),
    },
    768: {
        8.7: (
            [197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3],
            [197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3],
        ),
        10.0: (
            [197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3],
            [197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3],
        ),
        10.4: (
            [197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3],
            [197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3],
        ),
        11.5: (
            [197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3],
            [197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3],
        ),
        12.5: (
            [197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3],
            [197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3],
        ),
    },
}


def published_schedule(config: ViTConfig, gmacs: float) -> Schedule:
    """Return a token schedule that the authors of DiffRate learned, for use without any training.

    Args:
        config: of a stock ViT or an `OFBViTForImageClassification` with the shape of DeiT-T, S or B
            at 224 pixels: 12 layers, 197 tokens, and 192, 384 or 768 channels.
        gmacs: published cost of the schedule.

    Raises:
        ValueError: for other shapes, and for a cost without a published schedule.

    Example:

    ```python
    >>> from ofb_hf.models.shapes import SHAPES
    >>> from ofb_hf.tokens import published_schedule

    >>> published_schedule(SHAPES["deit_small"].config(["cat", "dog"]), 2.9)[:3]
    [[197, 197], [196, 194], [190, 176]]
    ```"""
    layers = config.num_hidden_layers
    tokens = num_tokens(config)
    channels = config.hidden_size
    if (layers, tokens) != (12, 197) or channels not in PUBLISHED:
        raise ValueError(
            f"(layers, tokens, channels) are {(layers, tokens, channels)}; schedules were "
            f"published for 12 layers, 197 tokens and {sorted(PUBLISHED)} channels. Learn one for "
            "this model with `ofb-hf search-tokens`."
        )
    known = PUBLISHED[channels]
    if gmacs not in known:
        raise ValueError(
            f"gmacs is {gmacs}; for {channels} channels there are schedules of {sorted(known)}."
        )
    kept, left = known[gmacs]
    return [list(pair) for pair in zip(kept, left, strict=True)]
