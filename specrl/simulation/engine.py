"""The simulated engine: rounds drawn from a profile, timed on a virtual clock, the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from specrl.core.clock import VirtualClock
from specrl.core.interfaces import Engine, Request, Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import Completion, PlainSample, Round, Trace
from specrl.simulation.acceptance_model import survival
from specrl.simulation.profile import Cost, Profile, Shift, load_profile

if TYPE_CHECKING:
    from torch import Tensor

_MOST_AT_PREFILL = 1000  # requests in a row that may end with their first token
_SKILL = 0xFFFFFFFF  # the position whose uniform number is the request's skill


@dataclass(frozen=True, slots=True)
class Requests:
    """A workload of requests without text; lengths of prompts and outputs are uniform between two bounds."""

    prompt_tokens: tuple[int, int]
    max_new_tokens: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_new_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be a length or two with 1 <= low <= high, but got {low}, {high}")

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless stream; the same seed gives the same requests."""
        rng = np.random.default_rng(seed)
        (low, high), (least, most) = self.prompt_tokens, self.max_new_tokens
        while True:
            prompt, new = int(rng.integers(low, high + 1)), int(rng.integers(least, most + 1))
            yield Request((0,) * prompt, new, ignore_eos=True)


class SimulatedRound(Round):
    """A round that equals another round with the same numbers, to test determinism."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Whether all fields, arrays included, are equal."""
        names = Round.__dataclass_fields__
        return isinstance(other, Round) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in names if name != "finished"
        )


class SimulatedEngine(Engine):
    """Rounds drawn from a profile (see `specrl.core.interfaces.Engine`); a session's seed determines all of them.

    Whether a draft is accepted depends only on the seed, the request and the position of its token, and the noise of a
    round only on the seed and the number of the round. Plans are therefore compared with common random numbers.
    Requests end with `max_new_tokens`; their token ids are all 0, there are no traces, and prefill takes no time.

    Args:
        profile: a `Profile`, the name of a shipped one, or a .json file.
        batch_sizes: smallest and largest batch size in use; `supports` then requires a plan's costs for all of them;
            None: for any of them.
        extrapolate: run plans and batch sizes without costs in the profile too; see `extrapolated`.
        shifts: changes of costs and acceptance during a session.
        clock: is advanced by the rounds; None: a new one.
    """

    def __init__(
        self,
        profile: Profile | str | Path,
        *,
        batch_sizes: tuple[int, int] | None = None,
        extrapolate: bool = False,
        shifts: Sequence[Shift] = (),
        clock: VirtualClock | None = None,
    ) -> None:
        self.profile, self.extrapolate = load_profile(profile), extrapolate
        self.batch_sizes, self.shifts = batch_sizes, tuple(shifts)
        self._clock = clock or VirtualClock()
        self._sessions: WeakSet[SimulatedSession] = WeakSet()
        self._costs: dict[tuple[int, Plan | None], Cost] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> SimulatedEngine:
        """Itself, as a live engine (Gymnasium copies the arguments of environments)."""
        return self

    @property
    def clock(self) -> VirtualClock:
        """The clock that rounds advance."""
        return self._clock

    @property
    def draft_version(self) -> int:
        """Always 0: a profile has one draft."""
        return 0

    @property
    def result_delay(self) -> int:
        """Rounds by which results arrive late."""
        return self.profile.delay

    def supports(self, plan: Plan) -> bool:
        """Whether the profile has the plan's costs at the engine's batch sizes, or may extrapolate them."""
        if self.extrapolate:
            return self.profile.can_extrapolate(plan)
        return plan in self.profile.plans and (self.batch_sizes is None or self.profile.covers(plan, *self.batch_sizes))

    def extrapolated(self, plan: Plan, batch_size: int) -> bool:
        """Whether the costs of such a round are extrapolated."""
        return not self.profile.covers(plan, batch_size)

    def cost(self, batch_size: int, plan: Plan | None) -> Cost:
        """The cost of a plan (None: plain) at a batch size.

        Raises:
            ValueError: the profile does not have it, and may not extrapolate it.
        """
        key = (batch_size, plan)
        if key not in self._costs:
            self._costs[key] = self.profile.cost(batch_size, plan, extrapolate=self.extrapolate)
        return self._costs[key]

    def start(
        self,
        workload: Workload,
        *,
        batch_size: int,
        seed: int,
        max_batch_size: int | None = None,
        plain: bool = False,
        trace: bool = False,
    ) -> SimulatedSession:
        """Start a session of `batch_size` requests; there are no traces."""
        most = batch_size if max_batch_size is None else max_batch_size
        session = SimulatedSession(
            self, workload.requests(seed), batch_size=batch_size, max_batch_size=most, seed=seed, plain=plain
        )
        self._sessions.add(session)
        return session

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Refuse: a profile has one draft.

        Raises:
            ValueError: always.
        """
        raise ValueError("a profile has one draft, so none can be loaded; train drafts on a live engine ('local')")

    def close(self) -> None:
        """Close every session; idempotent."""
        for session in list(self._sessions):
            session.close()
        self._sessions.clear()


@dataclass(slots=True)
class _Live:
    """A live request; `left` are tokens it may still generate."""

    id: int
    request: Request
    skill: float
    left: int


class SimulatedSession(Session):
    """Closed-loop decoding at fixed concurrency, simulated (see `specrl.core.interfaces.Session`)."""

    def __init__(
        self,
        engine: SimulatedEngine,
        requests: Iterator[Request],
        *,
        batch_size: int,
        max_batch_size: int,
        seed: int,
        plain: bool,
    ) -> None:
        if not 1 <= batch_size <= max_batch_size:
            raise ValueError(f"batch_size must be in [1, max_batch_size={max_batch_size}], but got {batch_size}")
        for size in (batch_size, max_batch_size):
            engine.cost(size, None)
        self._engine, self._requests, self._most, self._plain = engine, requests, max_batch_size, plain
        self._seed = np.uint64((seed * 2 + 1) % 2**64)
        self._noise, self._probe = (np.random.default_rng((seed, stream)) for stream in (1, 2))
        self._slow, self._drift = self._noise.standard_normal(2)  # both in their own standard deviations
        self._keep = math.exp(-1.0 / engine.profile.memory)
        self._ended_at_prefill: list[Completion] = []
        self._admitted: list[_Live] = []
        self._served = self._rounds = 0
        self._closed = False
        self.resize(batch_size)

    @property
    def batch_size(self) -> int:
        """Live requests."""
        return len(self._live)

    @property
    def context_lengths(self) -> list[int]:
        """Tokens known of each live request."""
        return [len(live.request.prompt) + live.request.max_new_tokens - live.left for live in self._live]

    def resize(self, batch_size: int) -> None:
        """Decode `batch_size` requests from the next round on; more are admitted, or the last ones parked.

        Raises:
            ValueError: more than the session was made for, or none.
        """
        self._check_open()
        if not 1 <= batch_size <= self._most:
            raise ValueError(
                f"batch_size must be in [1, {self._most}], the session's max_batch_size, but got {batch_size}"
            )
        while len(self._admitted) < batch_size:
            self._admitted.append(self._admit())
        self._live = self._admitted[:batch_size]

    def round(self, plan: Plan) -> Round:
        """Draw a round of `plan` for every live request.

        Raises:
            ValueError: a plan that the profile does not offer at this batch size, or that a plain session cannot run.
        """
        self._check_open()
        if self._plain and plan.num_steps:
            raise ValueError(f"plain decoding has no draft, so its only plan is 0, but got {plan}")
        cost = self._engine.cost(self.batch_size, None if self._plain else plan)
        contexts = np.array(self.context_lengths)
        correct = self._accept(plan, contexts)
        seconds = self._seconds(cost, float(contexts.mean()), plan)
        ids = np.array([live.id for live in self._live])
        left = np.array([live.left for live in self._live])
        tokens = np.minimum(correct + 1, left)
        finished = []
        for row, live in enumerate(self._live):
            live.left -= int(tokens[row])
            if live.left == 0:
                finished.append(Completion(live.id, live.request.prompt, (0,) * live.request.max_new_tokens))
                self._live[row] = self._admitted[row] = self._admit()
        finished += self._ended_at_prefill
        self._ended_at_prefill = []
        self._rounds += 1
        self._engine.clock.advance(seconds)
        draft_s = seconds * cost.draft_share
        return SimulatedRound(
            plan=plan,
            request_ids=ids,
            tokens=tokens,
            correct_drafts=correct,
            context_lengths=contexts,
            draft_s=draft_s,
            verify_s=seconds - draft_s,
            other_s=0.0,
            finished=tuple(finished),
        )

    def measure_plain(self) -> PlainSample:
        """Draw the seconds of a plain step now; the session's random numbers do not change."""
        self._check_open()
        cost, context = self._engine.cost(self.batch_size, None), float(np.mean(self.context_lengths))
        seconds = self._mean_seconds(cost, context) * self._hiccup(cost, self._probe)
        self._engine.clock.advance(seconds)
        return PlainSample(self.batch_size, context, seconds)

    def foresee(self, plan: Plan) -> NDArray[np.int64]:
        """Correct drafts [B] int64 of a round of `plan` if it ran now; the session does not change. For bounds only."""
        self._check_open()
        noise, drift = self._noise.bit_generator.state, self._drift
        correct = self._accept(plan, np.array(self.context_lengths))
        self._noise.bit_generator.state, self._drift = noise, drift
        return correct

    def drain(self) -> list[Trace]:
        """Nothing: there are no tensors to trace."""
        return []

    def close(self) -> None:
        """End the session; idempotent."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the session is closed; start another one")

    def _accept(self, plan: Plan, contexts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Correct drafts of each request [B] int64; the next step of the drift."""
        profile, steps = self._engine.profile, plan.num_steps
        self._drift = self._keep * self._drift + math.sqrt(1.0 - self._keep**2) * self._noise.standard_normal()
        if steps == 0:
            return np.zeros(len(contexts), dtype=np.int64)
        moved = profile.drift * self._drift + sum(s.log_odds for s in self._engine.shifts if self._rounds >= s.at)
        skill = np.array([live.skill for live in self._live]) + moved
        reached = survival(profile.odds(plan), skill)  # [B, K]
        rates = reached / np.concatenate([np.ones((len(skill), 1)), reached[:, :-1]], axis=1)
        ids = np.array([live.id for live in self._live])
        drawn = _uniform(self._seed, ids[:, None], contexts[:, None] + np.arange(steps))
        stood: NDArray[np.int64] = np.cumprod(drawn < rates, axis=1).sum(1)
        return stood

    def _seconds(self, cost: Cost, context: float, plan: Plan) -> float:
        """Seconds of the next round, and the next step of the slow noise."""
        self._slow = self._keep * self._slow + math.sqrt(1.0 - self._keep**2) * self._noise.standard_normal()
        seconds = self._mean_seconds(cost, context) * self._hiccup(cost, self._noise)
        for shift in self._engine.shifts:
            if self._rounds >= shift.at and plan.num_steps >= shift.from_steps and not self._plain:
                seconds *= shift.cost
        return seconds

    def _mean_seconds(self, cost: Cost, context: float) -> float:
        """At this context and in this state of the slow noise."""
        longer = max(1.0 + cost.per_token * (context - self._engine.profile.context), 0.1)
        return cost.seconds * longer * math.exp(cost.spread * self._slow - 0.5 * cost.spread**2)

    def _hiccup(self, cost: Cost, rng: np.random.Generator) -> float:
        """The noise of one round: jitter, and now and then a multiple."""
        profile = self._engine.profile
        jitter = math.exp(cost.jitter * rng.standard_normal() - 0.5 * cost.jitter**2)
        extra = rng.standard_exponential() * profile.hiccup_extra
        return jitter * (1.0 + extra if rng.random() < profile.hiccup_share else 1.0)

    def _admit(self) -> _Live:
        """Take requests until one does not end with its first token, which prefill generates."""
        for _ in range(_MOST_AT_PREFILL):
            request = next(self._requests)
            number, self._served = self._served, self._served + 1
            if request.max_new_tokens > 1:
                drawn = float(_uniform(self._seed, np.array(number), np.array(_SKILL)))
                skill = NormalDist().inv_cdf(min(max(drawn, 1e-12), 1 - 1e-12)) * self._engine.profile.skill
                return _Live(number, request, skill, request.max_new_tokens - 1)
            self._ended_at_prefill.append(Completion(number, request.prompt, (0,)))
        raise ValueError(
            f"a session needs requests of more than one token, but got {_MOST_AT_PREFILL} in a row that ended with it; "
            "raise max_new_tokens above 1"
        )


def _uniform(seed: np.uint64, request: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that are a function of seed, request and position (SplitMix64; Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = seed * np.uint64(0x9E3779B97F4A7C15) + request.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = _mixed(x) + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mixed(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
