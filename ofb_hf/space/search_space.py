"""The search space as plain data: standard library only, JSON in and out."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

CANDIDATE_FIELDS = ("candidate_sizes", "head_candidates", "dim_candidates")


@dataclass(frozen=True)
class SubmoduleSpace:
    """The candidate sizes of one submodule: a plain axis, or the joint grid of heads x channels.

    Where attentions and MLPs may be left out altogether, 0 is the first candidate, on a grid that
    of both axes: there is one way to be absent, (0, 0).

    Args:
        name: the submodule, for example `embeddings`, `layers.0.attention`, `layers.0.mlp`.
        kind: `embedding`, `attention` or `mlp`; learning rates and reports depend on it, the
            arithmetic does not. An embedding cannot be left out.
        num_units: U, the units of a plain axis. For a grid it is derived as `num_heads * head_dim`.
        candidate_sizes: ascending numbers of units of a plain axis, the last one is `num_units`.
        num_heads: heads of the full grid.
        head_dim: channels per head of the full grid.
        head_candidates: ascending numbers of heads, the last is the full one.
        dim_candidates: ascending numbers of channels per head, the last is the full one.
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
        for field in CANDIDATE_FIELDS:
            sizes = tuple(int(size) for size in getattr(self, field))
            self._set(field, sizes)
        if self.is_grid:
            self._check_grid()
            return
        if self.num_units is None:
            raise ValueError(
                f"submodule {self.name!r} has neither num_units nor num_heads; give one of them."
            )
        self._check_candidates("candidate_sizes", self.num_units)

    def _set(self, field: str, value: int | tuple[int, ...]) -> None:
        """Set a field; the class is frozen for everybody else."""
        object.__setattr__(self, field, value)

    def _check_grid(self) -> None:
        """Check the two axes of a grid and derive `num_units`."""
        if self.head_dim is None or self.candidate_sizes:
            raise ValueError(
                f"submodule {self.name!r} has num_heads={self.num_heads}, "
                f"head_dim={self.head_dim} and candidate_sizes={self.candidate_sizes}; a grid "
                "takes num_heads, head_dim, head_candidates and dim_candidates, a plain axis takes "
                "num_units and candidate_sizes."
            )
        self._check_candidates("head_candidates", self.num_heads)
        self._check_candidates("dim_candidates", self.head_dim)
        if (0 in self.head_candidates) != (0 in self.dim_candidates):
            raise ValueError(
                f"submodule {self.name!r} has head_candidates={self.head_candidates} and "
                f"dim_candidates={self.dim_candidates}; give 0 in both, to let it be left out, or "
                "in neither."
            )
        units = self.num_heads * self.head_dim
        if self.num_units not in (None, units):
            raise ValueError(
                f"submodule {self.name!r} has num_units={self.num_units}, but its grid of "
                f"{self.num_heads} heads x {self.head_dim} channels has {units}; leave num_units "
                "out."
            )
        self._set("num_units", units)

    def _check_candidates(self, field: str, full: int) -> None:
        """Raise ValueError unless candidates are distinct, ascending and end with the full one."""
        candidates = list(getattr(self, field))
        smallest = 1 if self.kind == "embedding" else 0
        is_ascending = candidates == sorted(set(candidates))
        if not candidates or not is_ascending or candidates[0] < smallest:
            raise ValueError(
                f"{field} of submodule {self.name!r} is {candidates}; expected distinct sizes of "
                f"{smallest} or more in ascending order."
            )
        if candidates[-1] != full:
            raise ValueError(
                f"{field} of submodule {self.name!r} ends with {candidates[-1]}, but its full size "
                f"is {full}; the full size must be the last candidate, so that the dense model is "
                "in its own space."
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
        if not self.is_grid:
            return [(size,) for size in self.candidate_sizes]
        grid = itertools.product(self.head_candidates, self.dim_candidates)
        # No heads and no channels are the same: of their candidates only (0, 0) counts.
        return [size for size in grid if all(size) or not any(size)]

    @property
    def may_vanish(self) -> bool:
        """Whether to keep no units at all is a candidate."""
        return not any(self.sizes[0])

    @property
    def candidate_shape(self) -> tuple[int, ...]:
        """(K,) for a plain axis, (K_heads, K_dims) for a grid."""
        if self.is_grid:
            return len(self.head_candidates), len(self.dim_candidates)
        return (len(self.candidate_sizes),)


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
            # Later ones and tied ones are not among the leaders.
            leader = leaders.get(submodule.tied_to)
            if leader is None or replace(submodule, name=leader.name, tied_to=None) != leader:
                raise ValueError(
                    f"submodule {submodule.name!r} is tied to {submodule.tied_to!r}, which must "
                    "come before it, be tied to nothing itself, and have the same units and "
                    "candidates."
                )

    def __iter__(self) -> Iterator[SubmoduleSpace]:
        return iter(self.submodules)

    def __len__(self) -> int:
        return len(self.submodules)

    def __getitem__(self, name: str) -> SubmoduleSpace:
        for submodule in self.submodules:
            if submodule.name == name:
                return submodule
        names = [submodule.name for submodule in self.submodules]
        raise KeyError(f"no submodule {name!r} in this space; it has {names}.")

    @property
    def num_candidates(self) -> int:
        """Architecture logits of the whole space.

        DeiT-S has 353 and DeiT-B 621 with the paper's candidates.
        """
        # A tied submodule has no logits of its own.
        return sum(len(submodule.sizes) for submodule in self if submodule.tied_to is None)

    @property
    def num_units(self) -> int:
        """Importance logits of the whole space (DeiT-S: 23,424, DeiT-B: 46,848)."""
        return sum(submodule.num_units for submodule in self)

    def to_json(self) -> str:
        """Return the space as JSON; `from_json` reads it."""
        rows = [asdict(submodule) for submodule in self]
        return json.dumps({"submodules": rows}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "SearchSpace":
        """Return the space that `to_json` wrote."""
        rows = json.loads(text)["submodules"]
        return cls(tuple(SubmoduleSpace(**row) for row in rows))
