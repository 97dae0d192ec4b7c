"""What the entries of a latency table have to be, and how to make one."""

from collections.abc import Callable
from typing import Any

COMMAND = "ofb-hf latency-table MODEL --output FILE"
NEEDED = ("model", "sizes", "frame", "settings", "hardware", "versions", "coefficients")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_count(value: Any) -> bool:
    """Return whether a value is a whole number of at least 1."""
    # True and False are whole numbers, too.
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and value >= 1


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_dict_of_dicts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_dict, value.values()))


def _is_shape(value: Any) -> bool:
    """Return whether a value is a submodule's units; an attention or MLP may be left out."""
    if not isinstance(value, list) or not value:
        return False
    return all(size == 0 or _is_count(size) for size in value)


def _is_dict_of_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_shape, value.values()))


ENTRIES: dict[str, Callable[[Any], bool]] = {
    "model": _is_text,
    "hardware": _is_text,
    "frame": _is_dict,
    "settings": _is_dict,
    "versions": _is_dict,
    "check": _is_dict,
    "coefficients": _is_dict_of_dicts,
    "residuals": _is_dict_of_dicts,
    "sizes": _is_dict_of_shapes,
    "points": _is_list,
}
# The settings that a later measurement has to repeat; a table may have others as well.
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "batch_size": _is_count,
    "num_threads": _is_count,
    "device": _is_text,
    "dtype": _is_text,
}


def check_entries(values: Any, known: set[str]) -> None:
    """Raise ValueError, naming what is wrong, unless values are the entries of a latency table.

    Args:
        values: as read from JSON.
        known: the entries that a table may have.
    """
    if not isinstance(values, dict) or not set(NEEDED) <= set(values) <= known:
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise _no_table(f"it has {got}, expected {sorted(known)}")
    for name, is_right in ENTRIES.items():
        if name in values and not is_right(values[name]):
            raise _no_table(f"{name} is {values[name]!r}")
    settings = values["settings"]
    missing = [name for name in SETTINGS if name not in settings]
    if missing:
        raise _no_table(f"its settings have no {missing}")
    wrong: dict[str, Any] = {}
    for name, is_right in SETTINGS.items():
        if not is_right(settings[name]):
            wrong[name] = settings[name]
    if wrong:
        raise _no_table(f"its settings say {wrong}")


def _no_table(reason: str) -> ValueError:
    return ValueError(f"this is no latency table: {reason}. Make one: {COMMAND}.")
