"""The plugin's entry point (group `sglang.srt.plugins`): hooks what the environment asks for, or does nothing.

SGLang calls `register` in each of its processes. Without SPECRL_POLICY, SPECRL_TRACES and SPECRL_ROUNDS it
returns at once.
"""

from __future__ import annotations

import os

from specrl.sglang.plugin.failsafe import Failsafe
from specrl.sglang.plugin.settings import Settings


def register() -> None:
    """Read the environment, check the seams, and register the hooks; a failure is one line, and no hook."""
    safe = Failsafe("everything", "SGLang serves without it")
    settings = safe.call(Settings.of, os.environ)
    if settings is None:
        return
    if settings.policy is not None or settings.plans is not None:
        policy = Failsafe("the policy", "SGLang's own lookahead goes on")
        policy.call(_register_policy, settings)
    if settings.traces is not None:
        tracing = Failsafe("tracing", "SGLang serves without it")
        tracing.call(_register_traces, settings)
    if settings.rounds is not None:
        telling = Failsafe("telling of rounds", "SGLang serves without it")
        telling.call(_register_rounds, settings)


def _register_policy(settings: Settings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from specrl.sglang.plugin.hooks import CONTEXT, POLICY, check_seams
    from specrl.sglang.plugin.lookahead import make_policy

    check_seams(CONTEXT)
    original = POLICY.check()
    assert isinstance(original, type)
    _note()
    HookRegistry.register(POLICY.target, make_policy(original, settings, _ranks), HookType.REPLACE)


def _register_traces(settings: Settings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from specrl.sglang.plugin.hooks import CONTEXT, PREFILL, VERIFY, check_seams
    from specrl.sglang.plugin.traces import Hooks

    check_seams((*CONTEXT, VERIFY, PREFILL))
    _note()
    hooks = Hooks(settings, _rank, _weight_version)
    HookRegistry.register(VERIFY.target, hooks.around_verify, HookType.AROUND)
    HookRegistry.register(PREFILL.target, hooks.around_prefill, HookType.AROUND)


def _register_rounds(settings: Settings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from specrl.sglang.plugin.hooks import CONTEXT, INGEST, PROCESS, RUN, WORKER, check_seams
    from specrl.sglang.plugin.rounds import RoundHooks

    check_seams((*CONTEXT, INGEST, RUN, PROCESS, WORKER))
    _note()
    hooks = RoundHooks(settings, _rank, _ranks)
    HookRegistry.register(INGEST.target, hooks.around_ingest, HookType.AROUND)
    HookRegistry.register(RUN.target, hooks.around_run, HookType.AROUND)
    HookRegistry.register(PROCESS.target, hooks.around_process, HookType.AROUND)
    HookRegistry.register(WORKER.target, hooks.around_verify, HookType.AROUND)


def _note() -> None:
    from specrl.sglang.plugin.failsafe import log
    from specrl.sglang.plugin.hooks import version_note

    note = version_note()
    if note is not None:
        log.warning("specrl plugin: %s", note)


def _ranks() -> int:
    from sglang.srt.runtime_context import get_server_args

    return int(get_server_args().tp_size)


def _rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def _weight_version() -> str:
    from sglang.srt.runtime_context import get_serving

    return str(get_serving().weight_version)
