"""Checks of settings."""

from __future__ import annotations


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise a ValueError 'NAME must be RULE, but got VALUE' unless a condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {rule}, but got {value!r}")
