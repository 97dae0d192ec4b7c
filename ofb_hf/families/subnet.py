"""Which units of a dense model are kept: the outcome of a search as data (standard library
only)."""

import json
from dataclasses import dataclass
from typing import Any

# Unit indices of a plain axis, or {head index: channel indices inside that head}.
Kept = tuple[int, ...] | dict[int, tuple[int, ...]]
# In which basis a network's units are counted: as it was given; with queries, keys, values and
# output of every head rewritten; with residual streams rewritten as well, where its family allows
# it. See `pruning/equivalent_basis.py`.
BASES = ("given", "heads", "equivalent")


def require_basis(basis: str) -> None:
    """Raise ValueError unless a basis is one of `BASES`."""
    if basis not in BASES:
        allowed = ", ".join(map(repr, BASES))
        raise ValueError(f"basis is {basis!r}; allowed are {allowed}.")


def all_units(shape: tuple[int, ...]) -> Kept:
    """Return every unit of a submodule of this shape, (U,) or (heads, channels per head)."""
    if len(shape) == 1:
        return tuple(range(shape[0]))
    heads, channels = shape
    return {head: tuple(range(channels)) for head in range(heads)}


@dataclass(frozen=True)
class SubnetSpec:
    """The outcome of a search: which units of the dense parent are kept, per submodule.

    Args:
        kept: submodule name -> sorted unit indices of the dense parent; for attention `{head index:
            sorted channel indices inside that head}`, equally many channels in every kept head.
            An empty `()` or `{}` leaves out the attention or MLP.
        token_schedule: tokens that leave each layer, as in `OFBViTConfig`; None = that of the
            parent.
        basis: in which basis of the parent the indices count: "given" for the parent as it is,
            "heads" or "equivalent" for what `equivalent_basis` made of it.

    Raises:
        ValueError: for indices that are negative, unsorted or repeated, and for heads that keep no
            channels or different numbers of them, with the name of the submodule; for an unknown
            basis.
    """

    kept: dict[str, Kept]
    token_schedule: list[list[int]] | None = None
    basis: str = "given"

    def __post_init__(self):
        require_basis(self.basis)
        for name, kept in self.kept.items():
            if not kept:
                continue  # left out
            if not isinstance(kept, dict):
                _check_indices(name, kept)
                continue
            for indices in (list(kept), *kept.values()):
                _check_indices(name, indices)
            counts = [len(channels) for channels in kept.values()]
            if len(set(counts)) > 1:
                raise ValueError(
                    f"kept[{name!r}] keeps {counts} channels in its heads; the heads of one layer "
                    "must keep equally many."
                )

    def size(self, name: str) -> int | tuple[int, int]:
        """Return how many units of one submodule are kept.

        Returns:
            U, or (heads, channels per head) for attention; 0 or (0, 0) if it is left out.
        """
        kept = self.kept[name]
        if not isinstance(kept, dict):
            return len(kept)
        channels = next(iter(kept.values()), ())
        return len(kept), len(channels)

    @property
    def sizes(self) -> dict[str, int | tuple[int, int]]:
        """`size` of every submodule."""
        return {name: self.size(name) for name in self.kept}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The same in the form of `Architecture.sizes`: (U,) or (heads, channels per head)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in self.sizes.items():
            shapes[name] = size if isinstance(size, tuple) else (size,)
        return shapes

    def within(self, parent: "SubnetSpec") -> "SubnetSpec":
        """Return the same units, counted as those of the network that `parent` was cut from.

        The result counts in the basis of the earlier cut.

        Args:
            parent: the earlier cut; the indices of this subnet count the units that it kept.

        Raises:
            ValueError: if the smaller network was rewritten before this cut: its units are then
                mixtures of those that it had.
        """
        if self.basis != "given":
            raise ValueError(
                f"this subnet counts units of a network in basis {self.basis!r}, which was "
                f"rewritten after the cut of its parent (basis {parent.basis!r}): they are no "
                "units of the parent's parent. Rewrite a network before its first cut only, and "
                'cut again with basis="given".'
            )
        kept: dict[str, Kept] = {}
        for name, units in self.kept.items():
            before = parent.kept[name]
            if not isinstance(units, dict):
                kept[name] = tuple(before[unit] for unit in units)
                continue
            # Position of a head among those that the parent kept -> its number there.
            heads = list(before)
            grid: dict[int, tuple[int, ...]] = {}
            for position, channels in units.items():
                head = heads[position]
                grid[head] = tuple(before[head][channel] for channel in channels)
            kept[name] = grid
        return SubnetSpec(kept, self.token_schedule or parent.token_schedule, parent.basis)

    def to_json(self) -> str:
        """Return the subnet as JSON with one line per submodule; `from_json` reads it."""
        # By hand: `json.dumps` would give every index a line of its own, or all of them one.
        rows: list[str] = []
        for name, kept in self.kept.items():
            key, value = json.dumps(name), json.dumps(kept)
            rows.append(f"    {key}: {value}")
        kept_rows = ",\n".join(rows)
        text = '{\n  "kept": {\n' + kept_rows + "\n  }"
        if self.token_schedule:
            schedule = json.dumps(self.token_schedule)
            text += f',\n  "token_schedule": {schedule}'
        if self.basis != "given":
            basis = json.dumps(self.basis)
            text += f',\n  "basis": {basis}'
        return text + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "SubnetSpec":
        """Return the subnet that `to_json` wrote.

        Raises:
            ValueError: if `text` is no such JSON, and for an unknown basis.
        """
        try:
            content = json.loads(text)
            kept: dict[str, Kept] = {}
            for name, indices in content["kept"].items():
                kept[name] = _read_kept(indices)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                'not a subnet: expected a JSON object {"kept": {submodule: indices}}.'
            ) from error
        return cls(kept, content.get("token_schedule"), content.get("basis", "given"))


def _check_indices(name: str, indices: Any) -> None:
    """Raise ValueError unless indices are ascending, distinct, not negative, and at least one."""
    indices = list(indices)
    if not indices or indices != sorted(set(indices)) or indices[0] < 0:
        raise ValueError(
            f"kept[{name!r}] holds {indices}; expected at least one index, ascending and distinct."
        )


def _read_kept(kept: Any) -> Kept:
    """Return the indices of one submodule; JSON has lists for tuples and text for head indices."""
    if isinstance(kept, dict):
        return {int(head): tuple(channels) for head, channels in kept.items()}
    return tuple(kept)
