"""The protocols of the package: what decodes (engines, sessions), what chooses plans, what learns drafts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from specrl.core.clock import Clock
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import PlainSample, Round, Trace

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: tokens to generate at most, at least 1.
        temperature: 0 is greedy.
        ignore_eos: go on to `max_new_tokens` even after the end-of-sequence token (fixed-length measurements).
        learn: whether a draft may be learnt from it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    learn: bool = True

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a prompt must hold at least one token, but got none; start it with the bos token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, but got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, but got {self.temperature}; 0 is greedy")


class Workload(Protocol):
    """A source of requests; the same seed gives the same requests in the same order, endlessly."""

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless, reproducible stream of requests."""
        ...


@runtime_checkable
class Session(Protocol):
    """Closed-loop decoding at fixed concurrency: a finished request is replaced by the next prompt.

    Inherit from this class to get the defaults of methods that have one.
    """

    @property
    def batch_size(self) -> int:
        """Live requests."""
        ...

    @property
    def context_lengths(self) -> Sequence[int]:
        """Tokens known of each live request."""
        ...

    def resize(self, batch_size: int) -> None:
        """Decode `batch_size` requests from the next round on; further ones are admitted, or the last ones parked."""
        ...

    def round(self, plan: Plan) -> Round:
        """Propose, verify and commit once for every live request."""
        ...

    def measure_plain(self) -> PlainSample | None:
        """Time one step of plain decoding on the live requests and throw its tokens away.

        Nothing of the session changes, so that the baseline can be re-measured between rounds at the batch
        size and context they have. None where the engine measures its baseline elsewhere.
        """
        ...

    def plain_steps(self, count: int) -> list[PlainSample]:
        """Time `count` plain decoding steps. Default: one `measure_plain` after the other.

        Raises:
            ValueError: the engine does not measure plain decoding.
        """
        samples = [sample for _ in range(count) if (sample := self.measure_plain()) is not None]
        if len(samples) < count:
            raise ValueError(
                "the engine must measure plain decoding between rounds, but it does not; use 'local', or 'sglang' with "
                "baseline='alternate'"
            )
        return samples

    def drain(self) -> list[Trace]:
        """Take the traces of the rounds since the last call (outside any timed window)."""
        ...

    def close(self) -> None:
        """End the session; idempotent."""
        ...


@runtime_checkable
class ProposalSession(Session, Protocol):
    """A session that verifies what somebody else drafted, too."""

    @property
    def request_ids(self) -> Sequence[int]:
        """Of the live requests, row by row."""
        ...

    @property
    def last_tokens(self) -> Sequence[int]:
        """The last committed token of each live request."""
        ...

    def round_with(self, drafted: Tensor, distributions: Tensor | None = None) -> Round:
        """Verify and commit these drafts for every live request; `draft_s` is what taking them over took.

        Args:
            drafted: [B, s] int64 chains of target ids, -1 after the end of a shorter one; s may be 0.
            distributions: [B, s, V] float32 that each draft was sampled from, given those before it, for rejection
                sampling; None: drafts are accepted where the target itself chooses them. A request's
                output is the target's own under every proposal without them, and under every greedy one. With them
                it is where the drafts are truly such samples, which nobody can check.

        Raises:
            ValueError: a shape, dtype, token or distribution that is not one. Nothing is committed then.
        """
        ...


@runtime_checkable
class Engine(Protocol):
    """A decoder of one target, with or without a draft.

    Inherit from this class to get the defaults of methods that have one.
    """

    @property
    def clock(self) -> Clock:
        """The clock its rounds are timed on."""
        ...

    @property
    def draft_version(self) -> int:
        """Version of the draft weights that serve now."""
        ...

    @property
    def result_delay(self) -> int:
        """Rounds by which results arrive late, on an engine that overlaps rounds. Default: 0."""
        return 0

    @property
    def single_session(self) -> bool:
        """Whether starting a session ends the one before, one plain session beside it aside. Default: False."""
        return False

    def facts(self) -> dict[str, Any]:
        """What results should record about the engine, as JSON-able values. Default: nothing."""
        return {}

    def supports(self, plan: Plan) -> bool:
        """Whether a session of this engine can run `plan`."""
        ...

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
        """Prefill `batch_size` requests and be ready for the first round.

        Args:
            workload: where the requests come from.
            batch_size: live requests, at least 1.
            seed: of the requests' order and of sampling.
            max_batch_size: the most that the session may be resized to; None: `batch_size`.
            plain: decode without any draft: no feature capture, no catch-up. The only plan is then 0.
            trace: keep traces for `drain`.

        Raises:
            ValueError: a batch size or requests that do not fit, or the engine has no plain or no traced sessions.
            OSError: the server that an engine decodes on does not serve (`specrl.sglang.client.http`).
        """
        ...

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights from the next round on."""
        ...

    def close(self) -> None:
        """Release everything; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class PlanEstimate:
    """What a chooser believes about a plan at one batch size.

    Attributes:
        plan: the plan.
        accept_length: expected tokens per request and round.
        seconds: expected seconds of a round.
        tried: how much evidence there is; 0: the plan never ran at this batch size.
    """

    plan: Plan
    accept_length: float
    seconds: float
    tried: float

    @property
    def speed(self) -> float:
        """Expected tokens per second and request."""
        return self.accept_length / self.seconds


@dataclass(frozen=True, slots=True)
class PlanCost:
    """The cost of a chain of `num_steps` drafts at a batch size, for losses that count seconds.

    Args:
        batch_size: live requests.
        num_steps: drafts of the plan; 0 is plain decoding with the draft in place.
        plain_s: t0(B), seconds of a plain decoding step.
        round_s: T(B, plan), seconds of a round.
        share: how often this plan runs at this batch size, on any scale.

    Raises:
        ValueError: a number out of range.
    """

    batch_size: int
    num_steps: int
    plain_s: float
    round_s: float
    share: float = 1.0

    def __post_init__(self) -> None:
        good = all(math.isfinite(x) and x > 0 for x in (self.plain_s, self.round_s)) and 0 <= self.share < math.inf
        if not good or self.batch_size < 1 or self.num_steps < 0:
            raise ValueError(
                f"a plan's cost needs seconds above 0 and counts and a share of at least 0, but got {self}"
            )


class PlanChooser(Protocol):
    """Chooses the plan of each round. NumPy only: the same code runs inside a serving engine.

    Environments and evaluation need `plans`, `choose` and `learn` only. Training calls the other methods too; inherit
    from this class to get their defaults.
    """

    plans: tuple[Plan, ...]

    def choose(self, observation: Observation) -> Plan:
        """One of `plans` for the next round."""
        ...

    def learn(self, done: Round) -> None:
        """Learn from a finished round; later rounds may have been chosen already. Default: nothing is learnt."""
        return None

    def best(self, batch_size: int) -> Plan | None:
        """The plan that is best now at a batch size. Default: None, not known."""
        return None

    def estimates(self, batch_size: int) -> list[PlanEstimate]:
        """What is believed about each plan at a batch size. Default: nothing."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON-able values. Default: there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. Default: there is nothing to restore."""
        return None


class DraftLearner(Protocol):
    """Learns draft weights from traces. Inherit from it: all methods but `learn` and `weights` have defaults.

    Attributes:
        wants_plan_costs: whether the loss counts seconds, so that `set_plan_costs` should be called.
    """

    wants_plan_costs: bool = False

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Learn from traces; returns metrics by name."""
        ...

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """The version and the weights to serve, by SGLang's names."""
        ...

    def take(self, traces: Iterable[Trace]) -> None:
        """Keep traces for the next call of `learn`. Default: they are dropped."""
        return None

    def opt_out(self, requests: Iterable[int]) -> None:
        """Learn nothing from these requests, by id. Default: ignored."""
        return None

    def end_session(self) -> None:
        """The session is over: requests in flight never finish, and ids start again. Default: nothing is done."""
        return None

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float = 1.0) -> None:
        """Set the cost of each plan and the present speedup, for a loss that counts seconds. Default: ignored."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors by name under 'tensors', all other values JSON-able. Default: there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. Default: there is nothing to restore."""
        return None
