"""Checks of settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise a ValueError 'NAME must be RULE, but got VALUE' unless a condition holds.

    The texts are made in any case. Code that runs in every round tests the condition itself and calls `refuse`.
    """
    if not condition:
        refuse(name, rule, value)


def refuse(name: str, rule: str, value: object) -> NoReturn:
    """Raise a ValueError 'NAME must be RULE, but got VALUE'."""
    raise ValueError(f"{name} must be {rule}, but got {value!r}")


def require_known(name: str, value: object, known: Iterable[object], others: str = "") -> None:
    """Raise a ValueError with the known values and the most similar one unless `value` is one of them.

    Args:
        name: the name of the setting.
        value: its value.
        known: the allowed values.
        others: end of the list of known values, such as ' or a plan'.
    """
    names, text = [str(each) for each in known], str(value)
    if text not in names:
        close = difflib.get_close_matches(text, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(names)}{others}, but got {text!r}{hint}")
