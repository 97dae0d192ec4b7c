"""What the parts of the forward pass multiply, and what the time that they take is a sum of.

Both are sums of terms, so what is counted and what is measured differ in coefficients only. Numbers
of tokens stand in the coefficients. Where they are searched, they are scalar tensors or arrays
instead of whole numbers.
"""

from typing import Any

from .description import Part, Term, heads_of, presence_of

# the part, and the module, that drops and merges tokens between the halves of a block
REDUCTION = "reduction"


def end_part(name: str, width: str, macs: int) -> Part:
    """What comes before the first block, or after the last one.

    Args:
        width: the residual stream there. macs: for each of its channels.
    """
    return Part(
        name, name, (Term(macs, (width,)),), {"constant": Term(1), "width": Term(1, (width,))}
    )


def merging_part(stage: int, width: str, next_width: str, tokens: int) -> Part:
    """Patch merging behind a stage; `tokens` are those of the next one."""
    products = {
        "constant": Term(1),
        "width": Term(1, (width,)),
        "next width": Term(1, (next_width,)),
        "width x next width": Term(1, (width, next_width)),
    }
    name = f"stages.{stage}.merging"
    return Part(name, name, (Term(4 * tokens, (width, next_width)),), products)


def windowed_block(
    width: str, block: str, stage: int, variant: str, tokens: int, attending: int, window: int
) -> tuple[Part, Part]:
    """The halves of a block whose tokens nothing changes.

    Args:
        width: the residual stream. block: the submodules' names begin with it.
        stage: whose blocks are of one kind. variant: of this block's attention, as in `Submodule`.
        tokens, attending: tokens of the image, and those that attention works on (padding
        included).
        window: tokens that one token attends to.
    """
    attention, mlp = f"{block}.attention", f"{block}.mlp"
    kind = ".".join(filter(None, [f"stages.{stage}.attention", variant]))
    heads = {"heads": Term(1, (heads_of(attention),))}
    macs = _attention_macs(width, attention, attending, window)
    return (
        Part(attention, kind, macs, _half_products(width, attention) | heads),
        Part(mlp, f"stages.{stage}.mlp", _mlp_macs(width, mlp, tokens), _half_products(width, mlp)),
    )


def _half_products(width: str, name: str) -> dict[str, Term]:
    return {
        "presence": Term(1, (presence_of(name),)),
        "width": Term(1, (width, presence_of(name))),
        "units": Term(1, (name,)),
        "width x units": Term(1, (width, name)),
    }


def reducing_block(
    width: str, block: str, before: Any, kept: Any, merged: Any, weighs: Any
) -> tuple[Part, ...]:
    """The halves of a block that may drop and merge tokens, and that reduction between them unless
    it does not.

    Args:
        width, block: as for `windowed_block`.
        before, kept, merged: tokens that come in, that are left after dropping, and after merging.
            Whole numbers, scalar tensors, or arrays that broadcast; the coefficients are what these
            are.
        weighs: whether those that come in may stand for several patches, as they do once any were
            merged; likewise.
    """
    attention, mlp, reduces = f"{block}.attention", f"{block}.mlp", 1 * (merged < before)
    parts = [
        Part(
            attention,
            "stages.0.attention",
            _attention_macs(width, attention, before, before),
            _attention_products(width, attention, before, reduces, 1 * weighs),
        ),
        Part(mlp, "stages.0.mlp", _mlp_macs(width, mlp, merged), _mlp_products(width, mlp, merged)),
    ]
    if not isinstance(reduces, int) or reduces:
        macs = (
            Term(before * reduces, (attention,)),  # the class token's row of the map, once more
            # similarities, and sums of what is merged
            Term(2 * (kept - merged) * (merged - 1), (width,)),
        )
        products = _reduction_products(width, reduces, kept, merged)
        parts.insert(1, Part(f"{block}.{REDUCTION}", f"stages.0.{REDUCTION}", macs, products))
    return tuple(parts)


def _attention_macs(width: str, name: str, tokens: Any, window: Any) -> tuple[Term, ...]:
    return (
        Term(4 * tokens, (width, name)),  # q, k, v and output projections
        Term(2 * tokens * window, (name,)),  # attention map, and its product with v
    )


def _mlp_macs(width: str, name: str, tokens: Any) -> tuple[Term, ...]:
    return (Term(2 * tokens, (width, name)),)


def _attention_products(
    width: str, name: str, tokens: Any, ranks: Any, weighs: Any
) -> dict[str, Term]:
    """What the time of an attention half grows with.

    Args:
        ranks: 1 where it also ranks its tokens. weighs: 1 where they stand for several patches (or
            may do so).
    """
    present = presence_of(name)
    return {
        "presence": Term(1, (present,)),
        "weighing": Term(weighs, (present,)),
        "ranking": Term(ranks, (present,)),
        "ranking x tokens x units": Term(ranks * tokens, (name,)),
        "tokens x width": Term(tokens, (width, present)),
        "tokens x units": Term(tokens, (name,)),
        "tokens^2 x heads": Term(tokens * tokens, (heads_of(name),)),
        "tokens^2 x units": Term(tokens * tokens, (name,)),
        "width x units": Term(1, (width, name)),  # weights are read however few tokens there are
        "tokens x width x units": Term(tokens, (width, name)),
    }


def _reduction_products(width: str, reduces: Any, kept: Any, merged: Any) -> dict[str, Term]:
    merges, pairs = 1 * (merged < kept), (kept - merged) * (merged - 1)
    return {
        "presence": Term(reduces),
        "kept x width": Term(reduces * kept, (width,)),
        "merging": Term(merges),
        "merging x kept x width": Term(merges * kept, (width,)),
        "pairs": Term(pairs),
        "pairs x width": Term(pairs, (width,)),
    }


def _mlp_products(width: str, name: str, tokens: Any) -> dict[str, Term]:
    return {
        "presence": Term(1, (presence_of(name),)),
        "tokens x width": Term(tokens, (width, presence_of(name))),
        "tokens x units": Term(tokens, (name,)),
        "width x units": Term(1, (width, name)),
        "tokens x width x units": Term(tokens, (width, name)),
    }
