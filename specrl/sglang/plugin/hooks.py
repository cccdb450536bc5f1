"""The functions of SGLang that the plugin hooks, their checks, and the protection of SGLang from our errors.

A failure in the plugin switches off the part that failed, logs one line, and never stops SGLang.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

CHECKED = ("0.5.23",)  # versions of SGLang that tests/sglang was run with
P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger("specrl.sglang.plugin")


class Failsafe:
    """Calls the functions of one part of the plugin until one of them fails; then `on` is False.

    Args:
        part: its name, for the log.
        fallback: the behaviour of SGLang without it, for the log.
    """

    def __init__(self, part: str, fallback: str = "SGLang serves without it") -> None:
        self.part, self.fallback, self.on = part, fallback, True

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Return the function's result; None from the first failure on, which is logged."""
        if not self.on:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # SGLang must go on serving after any error
            self.on = False
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.error("SPECRL PLUGIN: %s is switched off (%s); %s", self.part, reason, self.fallback)
            return None


@dataclass(frozen=True, slots=True)
class HookTarget:
    """A function or class of SGLang."""

    target: str  # its dotted name
    parameters: tuple[str, ...]  # its first parameters, by name and in order
    methods: tuple[tuple[str, tuple[str, ...]], ...] = ()  # required of a class, with their parameters after self

    def check(self) -> object:
        """Return the function or class; raise a ValueError if it does not exist, or has other parameters."""
        try:
            resolved: object = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"SGLang must have {self.target}, but does not ({error})") from error
        _check_parameters(resolved, self.target, self.parameters)
        for name, parameters in self.methods:
            if not hasattr(resolved, name):
                raise ValueError(f"SGLang's {self.target} must have {name}, but does not")
            if parameters:
                _check_parameters(getattr(resolved, name), f"{self.target}.{name}", ("self", *parameters))
        return resolved

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the values of `parameters` in a call, which may pass them by position or by name."""
        return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(self.parameters)]


def _check_parameters(function: object, name: str, parameters: tuple[str, ...]) -> None:
    actual = tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
    if actual[: len(parameters)] != parameters:
        raise ValueError(f"SGLang's {name} must take {', '.join(parameters)}, but takes {', '.join(actual)}")


POLICY = HookTarget(
    "sglang.srt.speculative.adaptive_spec_params.AdaptiveSpeculativeParams",
    ("initial_steps", "cfg_path"),
    (
        ("candidate_steps", ()),
        ("set_cuda_graph_bs", ("cuda_graph_bs",)),
        ("get_steps_for_batch", ("batch_size",)),
        ("on_verify_complete", ("num_correct_drafts_per_req", "batch_size")),
        ("cuda_graph_bs_for_step", ("step",)),
    ),
)
VERIFY = HookTarget(
    "sglang.srt.speculative.eagle_worker_common.eagle_sample", ("verify_input", "batch", "logits_output")
)
PREFILL = HookTarget(
    "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._draft_extend_for_prefill",
    ("self", "batch", "target_hidden_states", "next_token_ids"),
)
INGEST = HookTarget("sglang.srt.managers.scheduler.Scheduler.ingest_requests", ("self",))
RUN = HookTarget("sglang.srt.managers.scheduler.Scheduler.run_batch", ("self", "batch"))
PROCESS = HookTarget("sglang.srt.managers.scheduler.Scheduler.process_batch_result", ("self", "batch", "result"))
WORKER = HookTarget("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify", ("self", "batch"))
CONTEXT = tuple(
    HookTarget(f"sglang.srt.runtime_context.get_{name}", ()) for name in ("server_args", "parallel", "serving")
)
ALL_TARGETS = (*CONTEXT, POLICY, VERIFY, PREFILL, INGEST, RUN, PROCESS, WORKER)


def check_targets(targets: Iterable[HookTarget]) -> None:
    """Raise a ValueError that names the first of these targets that does not exist or has other parameters."""
    for target in targets:
        target.check()


def version_note() -> str | None:
    """Return a sentence if this version of SGLang was not checked."""
    installed = version("sglang")
    if installed in CHECKED:
        return None
    checked = ", ".join(CHECKED)
    return f"SGLang {installed} is not one of the checked versions ({checked}); the hooked functions look right"


def plan_name(verified: Any) -> str:
    """Return the plan of SGLang's input of a verification, written out."""
    steps = verified.spec_steps
    return f"{steps}/{verified.topk}/{int(verified.draft_token_num)}" if steps else "0"
