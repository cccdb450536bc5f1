"""The functions and classes of SGLang that the plugin hooks, and the check that they are what the plugin expects."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

CHECKED = ("0.5.23",)  # versions of SGLang that tests/sglang was run with


@dataclass(frozen=True, slots=True)
class HookTarget:
    """A function or class of SGLang.

    Attributes:
        target: its dotted name.
        parameters: its first parameters, by name and in order.
        methods: for a class: required methods, with their first parameters after self.
    """

    target: str
    parameters: tuple[str, ...]
    methods: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def check(self) -> object:
        """Return the function or class.

        Raises:
            ValueError: it does not exist, or has other parameters.
        """
        try:
            found: object = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"SGLang must have {self.target}, but does not ({error})") from error
        _check_parameters(found, self.target, self.parameters)
        for name, parameters in self.methods:
            if not hasattr(found, name):
                raise ValueError(f"SGLang's {self.target} must have {name}, but does not")
            if parameters:
                _check_parameters(getattr(found, name), f"{self.target}.{name}", ("self", *parameters))
        return found

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the values of `parameters` in a call, which may pass them by position or by name."""
        return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(self.parameters)]


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
CONTEXT = (
    HookTarget("sglang.srt.runtime_context.get_server_args", ()),
    HookTarget("sglang.srt.runtime_context.get_parallel", ()),
    HookTarget("sglang.srt.runtime_context.get_serving", ()),
)
ALL_TARGETS = (*CONTEXT, POLICY, VERIFY, PREFILL, INGEST, RUN, PROCESS, WORKER)


def check_targets(targets: Iterable[HookTarget]) -> None:
    """Check all of them.

    Raises:
        ValueError: one of them does not exist or has other parameters; the message names it.
    """
    for target in targets:
        target.check()


def version_note() -> str | None:
    """Return a sentence if this version of SGLang was not checked."""
    found = version("sglang")
    if found in CHECKED:
        return None
    return f"SGLang {found} is not one of the checked versions ({', '.join(CHECKED)}); the hooked functions look right"


def plan_name(verified: Any) -> str:
    """Return the plan of SGLang's input of a verification, written out."""
    steps = verified.spec_steps
    return f"{steps}/{verified.topk}/{int(verified.draft_token_num)}" if steps else "0"


def _check_parameters(function: object, name: str, parameters: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
    if found[: len(parameters)] != parameters:
        raise ValueError(f"SGLang's {name} must take {', '.join(parameters)}, but takes {', '.join(found)}")
