"""Token schedules as data: how many tokens leave each layer of a ViT, and what that costs."""

from ..families.token_reduction import with_fewest_tokens
from .published import PUBLISHED, published_schedule
from .schedules import (
    FINENESS,
    SMALLEST,
    Cost,
    Schedule,
    fixed_rate_schedule,
    full_schedule,
    learned_schedule,
    learning_layers,
    num_tokens,
    ranking_layers,
    require_class_token,
    rounded_schedule,
    schedule_cost,
    smallest_schedule,
)

# The name of `rounded_schedule` in version 0.1.
settle_schedule = rounded_schedule

__all__ = [
    "FINENESS",
    "PUBLISHED",
    "SMALLEST",
    "Cost",
    "Schedule",
    "fixed_rate_schedule",
    "full_schedule",
    "learned_schedule",
    "learning_layers",
    "num_tokens",
    "published_schedule",
    "ranking_layers",
    "require_class_token",
    "rounded_schedule",
    "schedule_cost",
    "settle_schedule",
    "smallest_schedule",
    "with_fewest_tokens",
]
