"""Token schedules as data: how many tokens leave each layer."""

from .schedules import published_schedule

__all__ = ["published_schedule"]
