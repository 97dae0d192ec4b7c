"""Activation checkpointing of models in which one tensor is used inside several blocks."""

from typing import Any


def without_reentry(settings: dict[str, Any] | None, hindrance: str) -> dict[str, Any]:
    """Return arguments of `torch.utils.checkpoint` with `use_reentrant=False`.

    Args:
        settings: `gradient_checkpointing_kwargs` as the user gave them, or None.
        hindrance: why the reentrant implementation does not work for this model.

    Raises:
        ValueError: for `use_reentrant=True`.
    """
    settings = {"use_reentrant": False} | (settings or {})
    if settings["use_reentrant"]:
        raise ValueError(f"use_reentrant is True, but {hindrance}; leave it at False.")
    return settings
