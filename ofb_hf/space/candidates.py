"""The sizes that submodules may get: given by lists, or made from the full size by a preset."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..families.description import Submodule
from .search_space import SubmoduleSpace

# Kind of submodule -> the fields of a config that list its candidates, one for each axis.
LISTS = {
    "embedding": ("embedding_candidates",),
    "attention": ("head_candidates", "head_dim_candidates"),
    "mlp": ("mlp_candidates",),
}


def submodule_space(config: Any, submodule: Submodule, may_vanish: bool) -> SubmoduleSpace:
    """Return the candidates of one submodule.

    Args:
        config: a `BiMaskConfig`.
        submodule: of the dense model.
        may_vanish: whether it may be left out.
    """
    absent = (0,) if may_vanish else ()
    if submodule.kind == "attention":
        heads, channels = submodule.shape
        head_sizes = up_to(heads, config.head_candidates) or _head_sizes(config, heads)
        channel_sizes = up_to(channels, config.head_dim_candidates)
        # From a quarter to all channels of a head, in both presets.
        if not channel_sizes:
            channel_sizes = _channel_sizes(config, channels, 1 / 4, channels // 8)
        return SubmoduleSpace(
            submodule.name,
            submodule.kind,
            num_heads=heads,
            head_dim=channels,
            head_candidates=(*absent, *head_sizes),
            dim_candidates=(*absent, *channel_sizes),
        )
    (units,) = submodule.shape
    if submodule.kind == "embedding":
        sizes = up_to(units, config.embedding_candidates) or _residual_sizes(config, units)
    else:
        sizes = up_to(units, config.mlp_candidates) or _mlp_sizes(config, units)
    return SubmoduleSpace(submodule.name, submodule.kind, units, (*absent, *sizes))


def _head_sizes(config: Any, heads: int) -> list[int]:
    # The published space removes heads in pairs.
    step = 2 if config.preset == "paper" else 1
    return sorted({*range(step, heads, step), heads})


def _residual_sizes(config: Any, units: int) -> list[int]:
    step = units // 32
    if config.preset == "paper":
        step = min(step, 12)
    return _channel_sizes(config, units, config.smallest_share, step)


def _mlp_sizes(config: Any, units: int) -> list[int]:
    # Seven sizes in the paper's space, down to a quarter; sixteen by default, down to a sixteenth.
    if config.preset == "paper":
        return _channel_sizes(config, units, 1 / 4, units // 8)
    return _channel_sizes(config, units, 1 / 16, units // 16)


def _channel_sizes(config: Any, full: int, smallest: float, step: int) -> list[int]:
    """Return sizes from a fraction of the full one to the full one.

    Args:
        config: its `multiple_of` is what sizes are multiples of, where the full size is.
        full: the full size.
        smallest: the smallest size as a fraction of the full one.
        step: how far sizes are apart, at least.
    """
    unit = math.gcd(full, config.multiple_of)
    # Rounded up to multiples, and at least one.
    step = math.ceil(max(step, 1) / unit) * unit
    least = math.ceil(int(full * smallest) / unit) * unit
    least = max(least, unit)
    # Counted from the full size, which is always among them.
    return sorted(range(full, least - 1, -step))


def up_to(full: int, sizes: list[int] | None) -> list[int]:
    """Return the listed sizes that a submodule of this full size can have."""
    return [size for size in sizes or [] if size <= full]


def full_sizes(submodules: Iterable[Submodule]) -> dict[str, dict[str, int]]:
    """Return {field with candidates: {submodule: its full size along that axis}}."""
    submodules = list(submodules)
    found: dict[str, dict[str, int]] = {}
    for kind, names in LISTS.items():
        shapes = {each.name: each.shape for each in submodules if each.kind == kind}
        for axis, name in enumerate(names):
            found[name] = {each: shape[axis] for each, shape in shapes.items()}
    return found


def check_candidates(config: Any, searched: Iterable[Submodule]) -> None:
    """Raise ValueError unless the lists of a config have the full sizes of a model, and no others
    above them.

    Args:
        config: a `BiMaskConfig`.
        searched: the searched submodules of the model.
    """
    for name, full in full_sizes(searched).items():
        given = getattr(config, name) or []
        if any(size < 1 for size in given):
            raise ValueError(
                f"{name} is {given}; sizes are 1 or more, search_depth=True adds 0 to them."
            )
        if not given or not full:
            continue
        largest = max(full.values())
        if max(given) > largest:
            raise ValueError(
                f"{name} is {given}, but the largest full size in this model is {largest}."
            )
        for submodule, size in full.items():
            if size not in given:
                raise ValueError(
                    f"{name} is {given}, but the full size of {submodule!r} is {size}; the full "
                    "size of every submodule must be among its candidates, so that the dense model "
                    "is in the space."
                )


def tie_layers(spaces: Iterable[SubmoduleSpace]) -> list[SubmoduleSpace]:
    """Tie every attention and MLP to the first one of its size; residual widths stay their own."""
    leaders: dict[tuple[str, tuple[int, ...]], str] = {}
    tied: list[SubmoduleSpace] = []
    for space in spaces:
        leader = leaders.setdefault((space.kind, space.unit_shape), space.name)
        if leader != space.name and space.kind != "embedding":
            space = replace(space, tied_to=leader)
        tied.append(space)
    return tied
