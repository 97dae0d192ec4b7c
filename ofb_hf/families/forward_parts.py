"""The parts of a forward pass: what they multiply, and what their time is a sum of.

Both are sums of terms, so what is counted and what is measured differ in coefficients only. Numbers
of tokens stand in the coefficients. Where they are searched, they are scalar tensors or arrays
instead of whole numbers.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from .description import Architecture, Part, Term, heads_of, presence_of

# Name of the part, and of the module attribute, that drops and merges tokens between the halves of
# a block.
REDUCTION = "reduction"
# Matrices of an MLP without a gate projection: one that widens, one that narrows.
MLP_MATRICES = 2


def end_part(
    name: str,
    width: str,
    macs: int,
) -> Part:
    """Return what comes before the first block, or after the last one.

    Args:
        name: of the part, `stem` or `head`.
        width: submodule of the residual stream there.
        macs: multiply-accumulates for each of its channels.
    """
    products = {"constant": Term(1), "width": Term(1, (width,))}
    return Part(name, name, (Term(macs, (width,)),), products)


def merging_part(
    stage: int,
    width: str,
    next_width: str,
    tokens: int,
) -> Part:
    """Return the patch merging behind a stage.

    Args:
        stage: its number.
        width: submodule of the residual stream in this stage.
        next_width: the same of the next stage.
        tokens: of an image in the next stage.
    """
    name = f"stages.{stage}.merging"
    products = {
        "constant": Term(1),
        "width": Term(1, (width,)),
        "next width": Term(1, (next_width,)),
        "width x next width": Term(1, (width, next_width)),
    }
    # Four neighbours are concatenated, so a token enters with four times the width.
    return Part(name, name, (Term(4 * tokens, (width, next_width)),), products)


def windowed_block(
    width: str,
    block: str,
    stage: int,
    variant: str,
    tokens: int,
    attending: int,
    window: int,
    mlp_matrices: int = MLP_MATRICES,
) -> tuple[Part, Part]:
    """Return the halves of a block whose tokens nothing changes.

    Args:
        width: submodule of the residual stream.
        block: how the names of the block's submodules begin.
        stage: its number; blocks of one stage are of one kind.
        variant: of this block's attention, as in `Submodule`.
        tokens: of an image.
        attending: tokens that attention works on, padding included.
        window: tokens that one token attends to.
        mlp_matrices: of the MLP; a gate projection is a third one.
    """
    attention, mlp = f"{block}.attention", f"{block}.mlp"
    kind = f"stages.{stage}.attention"
    if variant:
        kind = f"{kind}.{variant}"
    products = _half_products(width, attention)
    products["heads"] = Term(1, (heads_of(attention),))
    macs = _attention_macs(width, attention, attending, window)
    return (
        Part(attention, kind, macs, products),
        Part(
            mlp,
            f"stages.{stage}.mlp",
            _mlp_macs(width, mlp, tokens, mlp_matrices),
            _half_products(width, mlp),
        ),
    )


def _half_products(width: str, name: str) -> dict[str, Term]:
    """Return what the time of a half grows with while its number of tokens is fixed."""
    present = presence_of(name)
    return {
        "presence": Term(1, (present,)),
        "width": Term(1, (width, present)),
        "units": Term(1, (name,)),
        "width x units": Term(1, (width, name)),
    }


def reducing_block(
    width: str,
    block: str,
    before: Any,
    kept: Any,
    merged: Any,
    weighs: Any,
    mlp_matrices: int = MLP_MATRICES,
) -> tuple[Part, ...]:
    """Return the halves of a block, and the token reduction between them if there is one.

    Token counts are whole numbers, scalar tensors, or arrays that broadcast; the coefficients of
    the terms are of the same type.

    Args:
        width: submodule of the residual stream.
        block: how the names of the block's submodules begin.
        before: tokens that enter the block.
        kept: tokens after dropping.
        merged: tokens after merging.
        weighs: whether tokens that enter may stand for several patches, as they do once any were
            merged.
        mlp_matrices: as for `windowed_block`.
    """
    attention, mlp = f"{block}.attention", f"{block}.mlp"
    reduces = 1 * (merged < before)
    first = Part(
        attention,
        "stages.0.attention",
        _attention_macs(width, attention, before, before),
        _attention_products(width, attention, before, reduces, 1 * weighs),
    )
    last = Part(
        mlp,
        "stages.0.mlp",
        _mlp_macs(width, mlp, merged, mlp_matrices),
        _mlp_products(width, mlp, merged),
    )
    # Tensors and arrays keep the reduction: whether there is one differs between their entries.
    if isinstance(reduces, int) and not reduces:
        return first, last
    macs = (
        # The class token's row of the attention map, computed a second time.
        Term(before * reduces, (attention,)),
        # Similarities, and sums of the merged tokens.
        Term(2 * (kept - merged) * (merged - 1), (width,)),
    )
    products = _reduction_products(width, reduces, kept, merged)
    reduction = Part(f"{block}.{REDUCTION}", f"stages.0.{REDUCTION}", macs, products)
    return first, reduction, last


def _attention_macs(
    width: str,
    name: str,
    tokens: Any,
    window: Any,
) -> tuple[Term, ...]:
    return (
        # Projections to queries, keys, values and outputs.
        Term(4 * tokens, (width, name)),
        # The attention map, and its product with the values.
        Term(2 * tokens * window, (name,)),
    )


def _mlp_macs(
    width: str,
    name: str,
    tokens: Any,
    matrices: int,
) -> tuple[Term, ...]:
    return (Term(matrices * tokens, (width, name)),)


def _attention_products(
    width: str,
    name: str,
    tokens: Any,
    ranks: Any,
    weighs: Any,
) -> dict[str, Term]:
    """Return what the time of an attention half grows with.

    Args:
        width: submodule of the residual stream.
        name: of the attention.
        tokens: that attend to each other.
        ranks: 1 where it also ranks its tokens.
        weighs: 1 where they stand for several patches, or may do so.
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
        # Weights are read from memory however few tokens there are.
        "width x units": Term(1, (width, name)),
        "tokens x width x units": Term(tokens, (width, name)),
    }


def _reduction_products(
    width: str,
    reduces: Any,
    kept: Any,
    merged: Any,
) -> dict[str, Term]:
    merges = 1 * (merged < kept)
    # Each merged token is compared with every patch token that stays.
    pairs = (kept - merged) * (merged - 1)
    return {
        "presence": Term(reduces),
        "kept x width": Term(reduces * kept, (width,)),
        "merging": Term(merges),
        "merging x kept x width": Term(merges * kept, (width,)),
        "pairs": Term(pairs),
        "pairs x width": Term(pairs, (width,)),
    }


def _mlp_products(
    width: str,
    name: str,
    tokens: Any,
) -> dict[str, Term]:
    return {
        "presence": Term(1, (presence_of(name),)),
        "tokens x width": Term(tokens, (width, presence_of(name))),
        "tokens x units": Term(tokens, (name,)),
        "width x units": Term(1, (width, name)),
        "tokens x width x units": Term(tokens, (width, name)),
    }


class PartEnd(NamedTuple):
    """Where a forward part ends: as `module` is entered, or as it returns."""

    part: str
    module: str
    is_entered: bool


def part_ends(architecture: Architecture) -> Iterator[PartEnd]:
    """Yield where every forward part ends, in the order of the forward pass.

    The last part is missing, it ends with the pass; so are the halves of blocks without units.
    """
    halves = {submodule.name: submodule for submodule in architecture.submodules if submodule.block}
    paths = {_block_of(name): half.block for name, half in halves.items()}
    blocks: dict[str, list[str]] = {}
    between = ""  # a part between blocks, until the next block begins
    for part in architecture.parts[:-1]:
        path = paths.get(_block_of(part.name))
        if path is None:
            between = part.name
            continue
        if between:
            yield PartEnd(between, path, is_entered=True)
            between = ""
        blocks.setdefault(path, [])
        if part.name not in architecture.left_out:
            blocks[path].append(part.name)
    for path, names in blocks.items():
        for name, following in pairwise(names):
            entry = halves[following].entry if following in halves else f"{path}.{REDUCTION}"
            yield PartEnd(name, entry, is_entered=True)
        if names:
            yield PartEnd(names[-1], path, is_entered=False)


def _block_of(name: str) -> str:
    """Return what the names of a block's parts begin with: `layers.3.mlp` -> `layers.3`."""
    return name.rpartition(".")[0]
