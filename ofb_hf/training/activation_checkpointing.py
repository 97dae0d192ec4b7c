"""Activation checkpointing of models in which something reaches into several blocks."""

from typing import Any


def without_reentry(settings: dict[str, Any] | None, hindrance: str) -> dict[str, Any]:
    """Arguments of activation checkpointing, in torch's newer way unless they say so themselves.

    Args:
        settings: as given, or None. hindrance: why the reentrant way does not work here.

    Raises:
        ValueError: for `use_reentrant=True`.
    """
    settings = {"use_reentrant": False} | (settings or {})
    if settings["use_reentrant"]:
        raise ValueError(f"use_reentrant is True, but {hindrance}; leave it at False.")
    return settings
