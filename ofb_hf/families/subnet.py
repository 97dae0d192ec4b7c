"""Which units of a dense model are kept: the outcome of a search, as data (standard library
only)."""

import json
from dataclasses import dataclass
from typing import Any

Kept = tuple[int, ...] | dict[int, tuple[int, ...]]


def all_units(shape: tuple[int, ...]) -> Kept:
    """Every unit of a submodule of this shape, (U,) or (heads, channels per head)."""
    return (
        tuple(range(shape[0]))
        if len(shape) == 1
        else {h: tuple(range(shape[1])) for h in range(shape[0])}
    )


@dataclass(frozen=True)
class SubnetSpec:
    """The outcome of a search: which units of the dense parent are kept, per submodule.

    Args:
        kept: submodule name -> sorted unit indices of the dense parent; for attention `{head index:
            sorted channel indices inside that head}`, equally many channels in every kept head.
            Nothing at all, `()` or `{}`, is the attention or MLP left out.
        token_schedule: tokens that are left in each layer, as in `OFBViTConfig`; None = as the
            parent has them.

    Raises:
        ValueError: for indices that are negative, unsorted or repeated, and for heads that keep
            none or different numbers of channels. The message names the submodule.
    """

    kept: dict[str, Kept]
    token_schedule: list[list[int]] | None = None

    def __post_init__(self):
        for name, kept in self.kept.items():
            is_grid = isinstance(kept, dict)
            rows = [list(kept), *kept.values()] if is_grid else [kept]
            for row in rows if kept else ():
                if not row or list(row) != sorted(set(row)) or row[0] < 0:
                    raise ValueError(
                        f"kept[{name!r}] holds {list(row)}; expected at least one index, "
                        f"ascending and distinct."
                    )
            if is_grid and len({len(channels) for channels in kept.values()}) > 1:
                raise ValueError(
                    f"kept[{name!r}] keeps {[len(channels) for channels in kept.values()]} "
                    f"channels in its heads; "
                    "the heads of one layer must keep equally many."
                )

    def size(self, name: str) -> int | tuple[int, int]:
        """Kept units of one submodule: U, or (heads, channels per head) for attention; 0 or (0, 0)
        for nothing."""
        kept = self.kept[name]
        return (
            (len(kept), len(next(iter(kept.values()), ()))) if isinstance(kept, dict) else len(kept)
        )

    def within(self, parent: "SubnetSpec") -> "SubnetSpec":
        """The same units, counted as those of the network that `parent` was cut from.

        Args:
            parent: the cut that came before; this subnet's indices count what it kept.
        """
        kept: dict[str, Kept] = {}
        for name, units in self.kept.items():
            before = parent.kept[name]
            if isinstance(units, dict):
                heads = list(before)
                kept[name] = {
                    heads[head]: tuple(before[heads[head]][channel] for channel in channels)
                    for head, channels in units.items()
                }
            else:
                kept[name] = tuple(before[unit] for unit in units)
        return SubnetSpec(kept, self.token_schedule or parent.token_schedule)

    @property
    def sizes(self) -> dict[str, int | tuple[int, int]]:
        """`size` of every submodule."""
        return {name: self.size(name) for name in self.kept}

    def to_json(self) -> str:
        """The subnet as a JSON string with one line per submodule; `from_json` gives an equal one
        back."""
        rows = (f"    {json.dumps(name)}: {json.dumps(kept)}" for name, kept in self.kept.items())
        tokens = (
            f',\n  "token_schedule": {json.dumps(self.token_schedule)}'
            if self.token_schedule
            else ""
        )
        return '{\n  "kept": {\n' + ",\n".join(rows) + "\n  }" + tokens + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "SubnetSpec":
        """The subnet that `to_json` wrote.

        Raises:
            ValueError: if `text` is no such JSON.
        """

        def read(kept: Any) -> Kept:
            if isinstance(kept, dict):
                return {int(head): tuple(channels) for head, channels in kept.items()}
            return tuple(kept)

        try:
            content = json.loads(text)
            kept = {name: read(indices) for name, indices in content["kept"].items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                'not a subnet: expected a JSON object {"kept": {submodule: indices}}.'
            ) from error
        return cls(kept, content.get("token_schedule"))
