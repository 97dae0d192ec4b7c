"""Checks that every class of settings needs."""

import dataclasses
import math
from typing import Any


def require_finite(settings: Any) -> None:
    """Raise ValueError if a number of a dataclass is NaN or infinite, naming its field.

    No comparison is true for NaN, so a check of a range may let it pass.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name, None)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} is {value}; give a finite number.")
