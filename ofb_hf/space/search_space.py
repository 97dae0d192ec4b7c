"""What may be chosen and what was chosen, as plain data: standard library only, JSON in and out."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace


def _check_candidates(
    name: str, field: str, candidates: tuple[int, ...], full: int, smallest: int
) -> None:
    if not candidates or list(candidates) != sorted(set(candidates)) or candidates[0] < smallest:
        raise ValueError(
            f"{field} of submodule {name!r} is {list(candidates)}; expected distinct sizes of "
            f"{smallest} or more in "
            "ascending order."
        )
    if candidates[-1] != full:
        raise ValueError(
            f"{field} of submodule {name!r} ends with {candidates[-1]}, but its full size is "
            f"{full}; "
            "the full size must be the last candidate, so that the dense model is in its own space."
        )


@dataclass(frozen=True)
class SubmoduleSpace:
    """The candidate sizes of one submodule: a plain axis of units, or the joint grid of heads x
    channels per head.

    Where attentions and MLPs may be left out altogether, 0 is the first candidate, on a grid that
    of both axes: there is one way to be absent, (0, 0).

    Args:
        name: the submodule, for example `embeddings`, `layers.0.attention`, `layers.0.mlp`.
        kind: `embedding`, `attention` or `mlp`; decides learning rates and reports, not the
            arithmetic. An embedding cannot be left out.
        num_units: U, the units of a plain axis. For a grid it is derived as `num_heads * head_dim`.
        candidate_sizes: ascending numbers of units of a plain axis, the last one is `num_units`.
        num_heads, head_dim: the full grid, heads times channels per head.
        head_candidates, dim_candidates: ascending numbers of heads and of channels per head, the
        last is the full one.
        tied_to: an earlier submodule with the same candidates, whose choice this one follows.

    Raises:
        ValueError: for a space that is neither, and for candidates that are not ascending or miss
            the full size.
    """

    name: str
    kind: str
    num_units: int | None = None
    candidate_sizes: tuple[int, ...] = ()
    num_heads: int | None = None
    head_dim: int | None = None
    head_candidates: tuple[int, ...] = ()
    dim_candidates: tuple[int, ...] = ()
    tied_to: str | None = None

    def __post_init__(self):
        smallest = 1 if self.kind == "embedding" else 0
        for field in ("candidate_sizes", "head_candidates", "dim_candidates"):
            object.__setattr__(self, field, tuple(int(size) for size in getattr(self, field)))
        if self.is_grid:
            if self.head_dim is None or self.candidate_sizes:
                raise ValueError(
                    f"submodule {self.name!r} has num_heads={self.num_heads}, "
                    f"head_dim={self.head_dim} and "
                    f"candidate_sizes={self.candidate_sizes}; a grid takes num_heads, head_dim, "
                    f"head_candidates and "
                    "dim_candidates, a plain axis takes num_units and candidate_sizes."
                )
            _check_candidates(
                self.name, "head_candidates", self.head_candidates, self.num_heads, smallest
            )
            _check_candidates(
                self.name, "dim_candidates", self.dim_candidates, self.head_dim, smallest
            )
            if (0 in self.head_candidates) != (0 in self.dim_candidates):
                raise ValueError(
                    f"submodule {self.name!r} has head_candidates={self.head_candidates} and "
                    f"dim_candidates={self.dim_candidates}; give 0 in both, to let it be left "
                    f"out, or in neither."
                )
            units = self.num_heads * self.head_dim
            if self.num_units not in (None, units):
                raise ValueError(
                    f"submodule {self.name!r} has num_units={self.num_units}, but its grid of "
                    f"{self.num_heads} heads x "
                    f"{self.head_dim} channels has {units}; leave num_units out."
                )
            object.__setattr__(self, "num_units", units)
        else:
            if self.num_units is None:
                raise ValueError(
                    f"submodule {self.name!r} has neither num_units nor num_heads; give one of "
                    f"them."
                )
            _check_candidates(
                self.name, "candidate_sizes", self.candidate_sizes, self.num_units, smallest
            )

    @property
    def is_grid(self) -> bool:
        """Whether the units are (head, channel) pairs whose two sizes are chosen together."""
        return self.num_heads is not None

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """(U,) for a plain axis, (H, D) for a grid."""
        return (self.num_heads, self.head_dim) if self.is_grid else (self.num_units,)

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Every candidate, (U',) or (heads, channels per head), ascending."""
        axes = (
            (self.head_candidates, self.dim_candidates) if self.is_grid else (self.candidate_sizes,)
        )
        return [size for size in itertools.product(*axes) if all(size) or not any(size)]

    @property
    def may_vanish(self) -> bool:
        """Whether keeping nothing at all is a candidate."""
        return not any(self.sizes[0])

    @property
    def candidate_shape(self) -> tuple[int, ...]:
        """(K,) for a plain axis, (K_heads, K_dims) for a grid."""
        return (
            (len(self.head_candidates), len(self.dim_candidates))
            if self.is_grid
            else (len(self.candidate_sizes),)
        )


@dataclass(frozen=True)
class SearchSpace:
    """All submodules that a search decides about, in the order of the model."""

    submodules: tuple[SubmoduleSpace, ...]

    def __post_init__(self):
        names = [submodule.name for submodule in self.submodules]
        if len(set(names)) != len(names):
            raise ValueError(f"submodule names must differ, got {names}.")
        leaders: dict[str, SubmoduleSpace] = {}
        for submodule in self.submodules:
            if submodule.tied_to is None:
                leaders[submodule.name] = submodule
                continue
            leader = leaders.get(submodule.tied_to)
            if leader is None or replace(submodule, name=leader.name, tied_to=None) != leader:
                raise ValueError(
                    f"submodule {submodule.name!r} is tied to {submodule.tied_to!r}, which must "
                    f"come before it, be "
                    "tied to nothing itself, and have the same units and candidates."
                )

    def __iter__(self) -> Iterator[SubmoduleSpace]:
        return iter(self.submodules)

    def __len__(self) -> int:
        return len(self.submodules)

    def __getitem__(self, name: str) -> SubmoduleSpace:
        for submodule in self.submodules:
            if submodule.name == name:
                return submodule
        raise KeyError(
            f"no submodule {name!r} in this space; it has {[s.name for s in self.submodules]}."
        )

    @property
    def num_candidates(self) -> int:
        """Architecture logits of the whole space (DeiT-S: 353, DeiT-B: 621 with the paper's
        candidates)."""
        return sum(len(submodule.sizes) for submodule in self if submodule.tied_to is None)

    @property
    def num_units(self) -> int:
        """Importance logits of the whole space (DeiT-S: 23,424, DeiT-B: 46,848)."""
        return sum(submodule.num_units for submodule in self)

    def to_json(self) -> str:
        """The space as a JSON string; `from_json` gives an equal one back."""
        return json.dumps({"submodules": [asdict(submodule) for submodule in self]}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "SearchSpace":
        """The space that `to_json` wrote."""
        rows = json.loads(text)["submodules"]
        return cls(tuple(SubmoduleSpace(**row) for row in rows))
