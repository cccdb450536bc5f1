"""The protocols of the package: what decodes (engines, sessions), what chooses plans, what learns drafts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from specrl.core.checks import require
from specrl.core.clock import Clock
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import PlainSample, Round, Trace

if TYPE_CHECKING:
    from torch import Tensor

NOT_MEASURED = (
    "the engine must measure plain decoding between rounds, but it does not; use 'local', or 'sglang' with "
    "baseline='alternate', or plain_url= for a running server"
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: tokens to generate at most, at least 1.
        temperature: finite and at least 0; 0 is greedy.
        ignore_eos: continue to `max_new_tokens` after the end-of-sequence token, for requests of a fixed length.
        learn: whether a draft may learn from it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    learn: bool = True

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "a prompt", "at least one token, such as the bos token", self.prompt)
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        require(0.0 <= self.temperature < math.inf, "temperature", "finite and at least 0", self.temperature)


class Workload(Protocol):
    """A source of requests."""

    def requests(self, seed: int) -> Iterator[Request]:
        """Yield requests endlessly; the same seed gives the same requests in the same order."""


@runtime_checkable
class Session(Protocol):
    """Decoding at fixed concurrency: a finished request is replaced by the next prompt. Inherit from this class."""

    @property
    def batch_size(self) -> int:
        """Number of live requests."""

    @property
    def context_lengths(self) -> Sequence[int]:
        """Number of known tokens of each live request."""

    def resize(self, batch_size: int) -> None:
        """Decode `batch_size` requests from the next round on; admits further requests, or parks the last ones."""

    def round(self, plan: Plan) -> Round:
        """Propose, verify and commit once for every live request."""

    def measure_plain(self) -> PlainSample | None:
        """Time one step of plain decoding on the live requests and discard its tokens; None if the engine cannot."""

    def plain_steps(self, count: int) -> list[PlainSample]:
        """Time `count` plain decoding steps; raises ValueError if the engine cannot. Default: calls `measure_plain`."""
        samples = [sample for _ in range(count) if (sample := self.measure_plain()) is not None]
        if len(samples) < count:
            raise ValueError(NOT_MEASURED)
        return samples

    def drain(self) -> list[Trace]:
        """Return the traces of the rounds since the last call. Call it outside of timed windows."""

    def close(self) -> None:
        """End the session; idempotent."""


@runtime_checkable
class ProposalSession(Session, Protocol):
    """A session that also verifies drafts from outside the engine."""

    @property
    def request_ids(self) -> Sequence[int]:
        """The id of each live request."""

    @property
    def last_tokens(self) -> Sequence[int]:
        """The last committed token of each live request."""

    def round_with(self, drafted: Tensor, distributions: Tensor | None = None) -> Round:
        """Verify and commit these drafts for every live request; `draft_s` is the time to copy them.

        Args:
            drafted: [B, s] int64 chains of target ids, -1 after the end of a shorter one; s may be 0.
            distributions: [B, s, V] float32, the distribution that each draft was sampled from, for rejection
                sampling. The output is then the target's only if the drafts are such samples, which cannot be
                checked. None: a draft is accepted if the target itself chooses it, so any drafts are allowed.

        Raises:
            ValueError: a wrong shape, dtype, token or distribution. Nothing is committed then.
        """


@runtime_checkable
class Engine(Protocol):
    """A decoder of one target, with or without a draft. Inherit from this class to get the defaults."""

    @property
    def clock(self) -> Clock:
        """The clock that times its rounds."""

    @property
    def draft_version(self) -> int:
        """Version of the draft weights in use."""

    @property
    def result_delay(self) -> int:
        """Rounds by which results arrive late, on an engine that overlaps rounds. Default: 0."""
        return 0

    @property
    def single_session(self) -> bool:
        """Whether a new session ends the previous one of its kind, plain or not. Default: False."""
        return False

    def facts(self) -> dict[str, Any]:
        """Return facts about the engine that results should record, JSON-able. Default: none."""
        return {}

    def supports(self, plan: Plan) -> bool:
        """Whether a session of this engine can run `plan`."""

    def start(
        self,
        workload: Workload,
        *,
        batch_size: int,
        seed: int,
        max_batch_size: int | None = None,
        plain: bool = False,
        trace: bool = False,
    ) -> Session:
        """Start a session: prefill its first `batch_size` requests.

        Args:
            workload: the source of the requests.
            batch_size: live requests, at least 1.
            seed: seed of the requests and of sampling.
            max_batch_size: the largest size that the session may be resized to; None: `batch_size`.
            plain: decode without any draft and without storing hidden states. The only plan is then 0.
            trace: keep traces for `drain`.

        Raises:
            ValueError: a batch size or requests that do not fit, or the engine has no plain or no traced sessions.
            OSError: the server that an engine decodes on does not serve (`specrl.sglang.client.http`).
        """

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Use these draft weights from the next round on."""

    def close(self) -> None:
        """Release everything; idempotent."""


@dataclass(frozen=True, slots=True)
class PlanEstimate:
    """A chooser's estimate of a plan at one batch size."""

    plan: Plan
    accept_length: float  # expected tokens per request and round
    seconds: float  # expected seconds of a round
    tried: float  # amount of evidence; 0: the plan never ran at this batch size

    @property
    def speed(self) -> float:
        """Expected tokens per second and request."""
        return self.accept_length / self.seconds


@dataclass(frozen=True, slots=True)
class PlanCost:
    """The cost of a chain of `num_steps` drafts at a batch size, for losses that count seconds."""

    batch_size: int  # live requests, at least 1
    num_steps: int  # drafts of the plan; 0 is plan 0
    plain_s: float  # t0(B), seconds of a plain decoding step, above 0
    round_s: float  # T(B, plan), seconds of a round, above 0
    share: float = 1.0  # how often this plan runs at this batch size, on any scale; at least 0

    def __post_init__(self) -> None:
        seconds = 0 < self.plain_s < math.inf and 0 < self.round_s < math.inf
        counts = self.batch_size >= 1 and self.num_steps >= 0 and 0 <= self.share < math.inf
        require(seconds and counts, "a plan's cost", "of seconds above 0, and counts and a share of at least 0", self)


class PlanChooser(Protocol):
    """Chooses the plan of each round. NumPy only: the same code runs inside a serving engine.

    Environments and evaluation need `plans`, `choose` and `learn` only. Training calls the other methods too; inherit
    from this class to get their defaults.
    """

    plans: tuple[Plan, ...]

    def choose(self, observation: Observation) -> Plan:
        """Return one of `plans` for the next round."""

    def learn(self, done: Round) -> None:
        """Learn from a finished round; later rounds may have been chosen already. Default: nothing is learnt."""
        return None

    def best(self, batch_size: int) -> Plan | None:
        """Return the plan that is best now at a batch size. Default: None, not known."""
        return None

    def estimates(self, batch_size: int) -> list[PlanEstimate]:
        """Return the estimates of all plans at a batch size. Default: none."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able values. Default: there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. Default: there is nothing to restore."""
        return None


class DraftLearner(Protocol):
    """Learns draft weights from traces. Inherit from this class: only `learn` and `weights` have no default."""

    wants_plan_costs: bool = False  # whether the loss counts seconds, so that `set_plan_costs` should be called

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Learn from traces and return metrics by name."""

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return the version and the weights to serve, by SGLang's names."""

    def take(self, traces: Iterable[Trace]) -> None:
        """Keep traces for the next call of `learn`. Default: they are dropped."""
        return None

    def opt_out(self, requests: Iterable[int]) -> None:
        """Learn nothing from these requests, by id. Default: ignored."""
        return None

    def end_session(self) -> None:
        """End the session: live requests never finish, and ids start again. Default: nothing is done."""
        return None

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float = 1.0) -> None:
        """Set the cost of each plan and the present speedup, for a loss that counts seconds. Default: ignored."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors by name under 'tensors', all other values JSON-able. Default: there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. Default: there is nothing to restore."""
        return None
