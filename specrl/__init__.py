"""Reinforcement learning for speculative decoding, rewarded by the clock."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from specrl.core.plan import Plan, parse_plans
from specrl.core.round import PlainSample, Round, Trace
from specrl.core.version import __version__

if TYPE_CHECKING:
    from specrl.decoding.engine import LocalEngine
    from specrl.models.draft import load_draft, new_draft
    from specrl.models.target import load_target

__all__ = [
    "__version__",
    "LocalEngine",
    "PlainSample",
    "Plan",
    "Round",
    "Trace",
    "load_draft",
    "load_target",
    "new_draft",
    "parse_plans",
]

_LAZY = {
    "LocalEngine": "specrl.decoding.engine",
    "load_draft": "specrl.models.draft",
    "new_draft": "specrl.models.draft",
    "load_target": "specrl.models.target",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'specrl' has no attribute {name!r}")


if find_spec("gymnasium") is not None:  # not so where only the plugin runs, inside SGLang
    from specrl.envs import register as _register

    _register()
