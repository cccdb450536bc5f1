"""Engines by name, imported when they are made."""

from __future__ import annotations

import pkgutil
from typing import Any

from specrl.core.checks import require_known
from specrl.core.interfaces import Engine

ENGINES = {"sglang": "specrl.sglang.client.factory:open_engine"}  # target, draft, plans, trace and own options


def make_engine(name: str, **arguments: Any) -> Engine:
    """Make the engine of this name, except 'local'; raises ValueError if it does not exist or lacks an option."""
    require_known("engine", name, ["local", *ENGINES], " or an Engine")
    try:
        engine: Engine = pkgutil.resolve_name(ENGINES[name])(**arguments)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"engine {name!r} must know its options, but {error}") from error
    return engine
