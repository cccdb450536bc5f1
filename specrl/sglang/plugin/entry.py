"""The plugin's entry point (group `sglang.srt.plugins`). It registers the hooks that the environment asks for.

SGLang calls `register` in each of its processes. Without SPECRL_POLICY, SPECRL_TRACES and SPECRL_ROUNDS it returns at
once.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from specrl.sglang.plugin.failsafe import Failsafe, log

if TYPE_CHECKING:
    from specrl.sglang.plugin.settings import Settings


def register() -> None:
    """Read the settings, check SGLang's functions and register the hooks; a failure logs one line and adds no hook."""
    if not any(os.environ.get(f"SPECRL_{name}") for name in ("POLICY", "TRACES", "ROUNDS")):
        return
    from specrl.sglang.plugin.settings import Settings

    settings = Failsafe("everything", "SGLang serves without it").call(Settings.from_environment, os.environ)
    if settings is None:
        return
    if settings.policy is not None or settings.plans is not None:
        Failsafe("the policy", "SGLang's own lookahead is used").call(_register_policy, settings)
    if settings.traces is not None:
        Failsafe("tracing", "SGLang serves without it").call(_register_traces, settings)
    if settings.rounds is not None:
        Failsafe("reporting of rounds", "SGLang serves without it").call(_register_rounds, settings)


def _register_policy(settings: Settings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from specrl.sglang.plugin.hooks import CONTEXT, POLICY, check_targets
    from specrl.sglang.plugin.lookahead import make_policy

    check_targets(CONTEXT)
    original = POLICY.check()
    assert isinstance(original, type)
    _log_version()
    HookRegistry.register(POLICY.target, make_policy(original, settings, _tp_size), HookType.REPLACE)


def _register_traces(settings: Settings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from specrl.sglang.plugin.hooks import CONTEXT, INGEST, PREFILL, VERIFY, check_targets
    from specrl.sglang.plugin.traces import TraceHooks

    check_targets((*CONTEXT, INGEST, VERIFY, PREFILL))
    _log_version()
    hooks = TraceHooks(settings, _tp_rank, _weight_version)
    HookRegistry.register(INGEST.target, hooks.around_ingest, HookType.AROUND)
    HookRegistry.register(VERIFY.target, hooks.around_verify, HookType.AROUND)
    HookRegistry.register(PREFILL.target, hooks.around_prefill, HookType.AROUND)


def _register_rounds(settings: Settings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from specrl.sglang.plugin.hooks import CONTEXT, INGEST, PROCESS, RUN, WORKER, check_targets
    from specrl.sglang.plugin.rounds import RoundHooks

    check_targets((*CONTEXT, INGEST, RUN, PROCESS, WORKER))
    _log_version()
    hooks = RoundHooks(settings, _tp_rank, _tp_size)
    HookRegistry.register(INGEST.target, hooks.around_ingest, HookType.AROUND)
    HookRegistry.register(RUN.target, hooks.around_run, HookType.AROUND)
    HookRegistry.register(PROCESS.target, hooks.around_process, HookType.AROUND)
    HookRegistry.register(WORKER.target, hooks.around_verify, HookType.AROUND)


def _log_version() -> None:
    from specrl.sglang.plugin.hooks import version_note

    note = version_note()
    if note is not None:
        log.warning("specrl plugin: %s", note)


def _tp_size() -> int:
    from sglang.srt.runtime_context import get_server_args

    return int(get_server_args().tp_size)


def _tp_rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def _weight_version() -> str:
    from sglang.srt.runtime_context import get_serving

    return str(get_serving().weight_version)
