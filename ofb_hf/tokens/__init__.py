"""Token schedules as data: how many tokens leave each layer."""

from .published import published_schedule

__all__ = ["published_schedule"]
