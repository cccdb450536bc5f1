"""The plugin's entry point (group `sglang.srt.plugins`). It registers the hooks that the environment asks for.

SGLang calls `register` in each of its processes. Without SPECRL_POLICY, SPECRL_TRACES and SPECRL_ROUNDS it returns at
once, and imports nothing.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from specrl.sglang.plugin import hooks
from specrl.sglang.plugin.hooks import Failsafe, HookTarget, log

if TYPE_CHECKING:
    from specrl.sglang.plugin.settings import Settings


def register() -> None:
    """Read the settings, check SGLang's functions and register the hooks; a failure logs one line and adds no hook."""
    if not any(os.environ.get(f"SPECRL_{name}") for name in ("POLICY", "TRACES", "ROUNDS")):
        return
    from specrl.sglang.plugin.settings import Settings

    settings = Failsafe("everything").call(Settings.from_environment, os.environ)
    if settings is None:
        return
    if settings.policy is not None or settings.plans is not None:
        Failsafe("the policy", "SGLang's own lookahead is used").call(_register_policy, settings)
    if settings.traces is not None:
        Failsafe("tracing").call(_register_traces, settings)
    if settings.rounds is not None:
        Failsafe("reporting of rounds").call(_register_rounds, settings)


def _runtime(getter: str, attribute: str) -> Callable[[], Any]:
    """Return a function that reads an attribute of SGLang's runtime context; it works once SGLang has started."""
    return lambda: getattr(pkgutil.resolve_name(f"sglang.srt.runtime_context.{getter}")(), attribute)


_tp_size = _runtime("get_server_args", "tp_size")
_tp_rank = _runtime("get_parallel", "tp_rank")
_weight_version = _runtime("get_serving", "weight_version")


def _register_policy(settings: Settings) -> None:
    from specrl.sglang.plugin.lookahead import make_policy

    original = hooks.POLICY.check()
    assert isinstance(original, type)
    _register({hooks.POLICY: make_policy(original, settings, _tp_size)}, replace=True)


def _register_traces(settings: Settings) -> None:
    from specrl.sglang.plugin.traces import TraceHooks

    ours = TraceHooks(settings, _tp_rank, _weight_version)
    _register({hooks.INGEST: ours.around_ingest, hooks.VERIFY: ours.around_verify, hooks.PREFILL: ours.around_prefill})


def _register_rounds(settings: Settings) -> None:
    from specrl.sglang.plugin.rounds import RoundHooks

    ours = RoundHooks(settings, _tp_rank, _tp_size)
    around = {hooks.INGEST: ours.around_ingest, hooks.RUN: ours.around_run, hooks.PROCESS: ours.around_process}
    _register({**around, hooks.WORKER: ours.around_verify})


def _register(functions: Mapping[HookTarget, Callable[..., Any]], *, replace: bool = False) -> None:
    """Check the hooked functions, then register ours around them or in place of them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks.check_targets((*hooks.CONTEXT, *functions))
    note = hooks.version_note()
    if note is not None:
        log.warning("specrl plugin: %s", note)
    for target, function in functions.items():
        HookRegistry.register(target.target, function, HookType.REPLACE if replace else HookType.AROUND)
