"""The places in SGLang that the plugin hooks, and the check that each is as it was when it was read."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version

CHECKED = ("0.5.23",)  # versions of SGLang that tests/sglang was run with


@dataclass(frozen=True, slots=True)
class Seam:
    """A function or class of SGLang.

    Attributes:
        target: its dotted name.
        parameters: that it must take, by name and in this order.
        methods: of a class: those that it must have, with their parameters after self.
    """

    target: str
    parameters: tuple[str, ...]
    methods: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def check(self) -> object:
        """What it names.

        Raises:
            ValueError: it is not there, or takes something else.
        """
        try:
            found: object = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"SGLang must have {self.target}, but it does not ({error})") from error
        _takes(found, self.target, self.parameters)
        for name, parameters in self.methods:
            if not hasattr(found, name):
                raise ValueError(f"SGLang's {self.target} must have {name}, but it does not")
            if parameters:
                _takes(getattr(found, name), f"{self.target}.{name}", ("self", *parameters))
        return found


POLICY = Seam(
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
VERIFY = Seam("sglang.srt.speculative.eagle_worker_common.eagle_sample", ("verify_input", "batch", "logits_output"))
PREFILL = Seam(
    "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._draft_extend_for_prefill",
    ("self", "batch", "target_hidden_states", "next_token_ids"),
)
INGEST = Seam("sglang.srt.managers.scheduler.Scheduler.ingest_requests", ("self",))
RUN = Seam("sglang.srt.managers.scheduler.Scheduler.run_batch", ("self", "batch"))
PROCESS = Seam("sglang.srt.managers.scheduler.Scheduler.process_batch_result", ("self", "batch", "result"))
WORKER = Seam("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify", ("self", "batch"))
CONTEXT = (
    Seam("sglang.srt.runtime_context.get_server_args", ()),
    Seam("sglang.srt.runtime_context.get_parallel", ()),
    Seam("sglang.srt.runtime_context.get_serving", ()),
)
EVERY = (*CONTEXT, POLICY, VERIFY, PREFILL, INGEST, RUN, PROCESS, WORKER)


def check_seams(seams: Iterable[Seam]) -> None:
    """Check them all.

    Raises:
        ValueError: one is not as it was read; it is named.
    """
    for seam in seams:
        seam.check()


def version_note() -> str | None:
    """A sentence where SGLang's version is not one that was checked."""
    found = version("sglang")
    if found in CHECKED:
        return None
    return f"SGLang {found} is not among the checked versions ({', '.join(CHECKED)}); its seams look as they should"


def _takes(function: object, name: str, parameters: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
    if found[: len(parameters)] != parameters:
        raise ValueError(f"SGLang's {name} must take {', '.join(parameters)}, but takes {', '.join(found)}")
