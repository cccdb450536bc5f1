"""Engines by name, imported when they are made."""

from __future__ import annotations

import pkgutil
from typing import Any

from specrl.core.checks import require_known
from specrl.core.interfaces import Engine

ENGINES = {"sglang": "specrl.sglang.client.factory:open_engine"}  # target, draft, plans, trace and own options


def make_engine(name: str, **arguments: Any) -> Engine:
    """The engine of this name; 'local' is not among them, because environments and commands make it themselves.

    Raises:
        ValueError: there is no such engine, or it has no such options.
    """
    require_known("engine", name, ["local", *ENGINES], " or an Engine")
    try:
        engine: Engine = pkgutil.resolve_name(ENGINES[name])(**arguments)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"engine {name!r} must know its options, but {error}") from error
    return engine
