"""Checks that every class of settings needs."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

# A longer list hides what is meant.
MOST_LISTED = 20
MOST_SIMILAR = 3


def require_finite(settings: Any) -> None:
    """Raise ValueError if a number of a dataclass is NaN or infinite, naming its field.

    No comparison is true for NaN, so a check of a range may let it pass.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name, None)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} is {value}; give a finite number.")


def require_choice(name: str, value: Any, allowed: Iterable[Any], listed: str) -> None:
    """Raise ValueError unless a value is one of those that are allowed, naming the nearest ones.

    Args:
        name: of the setting, as the user wrote it.
        value: of the setting.
        allowed: may hold members of an enumeration.
        listed: where all of them are listed, if they are too many for a message.
    """
    known = [str(getattr(each, "value", each)) for each in allowed]
    wanted = str(getattr(value, "value", value))
    if wanted in known:
        return
    begun = [word for word in known if word.startswith(wanted.lower())] if wanted else []
    similar = begun + difflib.get_close_matches(wanted.lower(), known, n=MOST_SIMILAR)
    nearest = list(dict.fromkeys(similar))[:MOST_SIMILAR]
    others = f"allowed are {', '.join(known)}."
    if len(known) > MOST_LISTED:
        others = f"all {len(known)} that are allowed are listed by {listed}."
    if nearest:
        others = f"did you mean {', '.join(nearest)}? {others[0].upper()}{others[1:]}"
    raise ValueError(f"{name} is {wanted!r}; {others}")
