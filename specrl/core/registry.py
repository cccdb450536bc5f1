"""Engines by name: what makes one, loaded only when it is asked for."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable
from typing import Any

from specrl.core.interfaces import Engine

ENGINES = {
    "sglang": "specrl.sglang.client.factory:open_engine"
}  # takes target, draft, plans, trace and options of its own


def make_engine(name: str, **arguments: Any) -> Engine:
    """The engine of this name; 'local' is made where it is used, as it needs no more than torch.

    Raises:
        ValueError: there is none, or it takes no such options.
    """
    if name not in ENGINES:
        known = ["local", *ENGINES]
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else "; pass an Engine for any other"
        raise ValueError(f"engine must be {', '.join(map(repr, known))} or an Engine, but got {name!r}{meant}")
    make: Callable[..., Engine] = pkgutil.resolve_name(ENGINES[name])
    try:
        return make(**arguments)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"engine {name!r} must know its options, but {error}") from error
