"""The simulated engine: rounds drawn from a profile and timed on a virtual clock; a seed determines them all."""

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

from specrl.core.checks import require
from specrl.core.clock import VirtualClock
from specrl.core.interfaces import Engine, Request, Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import Completion, PlainSample, Round, Trace
from specrl.simulation.acceptance_model import survival
from specrl.simulation.profile import Cost, Profile, load_profile
from specrl.simulation.shifts import Shift, cost_factor, log_odds_change

if TYPE_CHECKING:
    from torch import Tensor

_MAX_ENDED_AT_PREFILL = 1000  # requests in a row that may end with their first token
_EFFECT_POSITION = 0xFFFFFFFF  # the position whose uniform number gives the request's effect on its log-odds


@dataclass(frozen=True, slots=True)
class Requests:
    """A workload of requests without text. Lengths of prompts and outputs are uniform between two bounds."""

    prompt_tokens: tuple[int, int]
    max_new_tokens: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_new_tokens"):
            low, high = getattr(self, name)
            require(1 <= low <= high, name, "a length or two with 1 <= low <= high", (low, high))

    @classmethod
    def of(cls, profile: Profile) -> Requests:
        """Return requests with the lengths of a profile."""
        return cls((profile.prompt_tokens,) * 2, (profile.max_new_tokens,) * 2)

    def requests(self, seed: int) -> Iterator[Request]:
        """Yield requests endlessly; the same seed gives the same requests."""
        rng = np.random.default_rng(seed)
        (low, high), (min_new, max_new) = self.prompt_tokens, self.max_new_tokens
        while True:
            prompt, new = int(rng.integers(low, high + 1)), int(rng.integers(min_new, max_new + 1))
            yield Request((0,) * prompt, new, ignore_eos=True)


class SimulatedEngine(Engine):
    """Rounds drawn from a profile; the seed of a session determines all of them.

    Whether a draft is accepted depends only on the seed, the request and the position of its token. The noise of a
    round depends only on the seed and the number of the round. Plans are therefore compared with common random numbers.
    Requests end at `max_new_tokens`. All token ids are 0, there are no traces, and prefill takes no time.

    Args:
        profile: a `Profile`, the name of a shipped one, or a .json file.
        batch_sizes: smallest and largest batch size in use, for which `supports` requires costs; None: costs at any
            batch size are enough.
        extrapolate: also run plans and batch sizes without costs in the profile (see `Profile.cost`).
        shifts: changes of costs and acceptance during a session.
    """

    def __init__(
        self,
        profile: Profile | str | Path,
        *,
        batch_sizes: tuple[int, int] | None = None,
        extrapolate: bool = False,
        shifts: Sequence[Shift] = (),
    ) -> None:
        self.profile, self.extrapolate = load_profile(profile), extrapolate
        self.batch_sizes, self.shifts = batch_sizes, tuple(shifts)
        self._clock = VirtualClock()
        self._sessions: WeakSet[SimulatedSession] = WeakSet()
        self._costs: dict[tuple[int, Plan | None], Cost] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> SimulatedEngine:
        """Return itself, as a live engine does (Gymnasium copies the arguments of environments)."""
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

    def cost(self, batch_size: int, plan: Plan | None) -> Cost:
        """Return the cost of a plan (None: plain) at a batch size; see `Profile.cost` for errors."""
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
        largest = batch_size if max_batch_size is None else max_batch_size
        session = SimulatedSession(self, workload.requests(seed), batch_size, largest, seed=seed, plain=plain)
        self._sessions.add(session)
        return session

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Raise a ValueError: a profile has one draft."""
        raise ValueError("a profile has one draft and cannot load another; train drafts on a live engine ('local')")

    def close(self) -> None:
        """Close every session; idempotent."""
        for session in list(self._sessions):
            session.close()
        self._sessions.clear()


@dataclass(slots=True)
class _Live:
    """A live request."""

    id: int
    request: Request
    effect: float  # on the log-odds of its drafts
    left: int  # tokens to generate


class SimulatedSession(Session):
    """Closed-loop decoding at fixed concurrency, simulated (see `specrl.core.interfaces.Session`)."""

    def __init__(
        self,
        engine: SimulatedEngine,
        requests: Iterator[Request],
        batch_size: int,
        max_batch_size: int,
        *,
        seed: int,
        plain: bool,
    ) -> None:
        self._engine, self._requests, self._max_batch_size, self._plain = engine, requests, max_batch_size, plain
        self._seed = np.uint64((seed * 2 + 1) % 2**64)
        self._noise, self._probe = (np.random.default_rng((seed, stream)) for stream in (1, 2))
        self._slow, self._drift = self._noise.standard_normal(2)  # both with variance 1
        self._ended_at_prefill: list[Completion] = []
        self._admitted: list[_Live] = []
        self._served = self._rounds = 0
        self._closed = False
        self.resize(batch_size)
        for size in (batch_size, max_batch_size):
            engine.cost(size, None)  # refuse batch sizes that the profile does not know

    @property
    def batch_size(self) -> int:
        """Number of live requests."""
        return len(self._live)

    @property
    def context_lengths(self) -> list[int]:
        """Number of known tokens of each live request."""
        return [len(live.request.prompt) + live.request.max_new_tokens - live.left for live in self._live]

    def resize(self, batch_size: int) -> None:
        """Decode `batch_size` requests, in [1, max_batch_size], from the next round on."""
        self._check_open()
        largest = self._max_batch_size
        require(1 <= batch_size <= largest, "batch_size", f"in [1, max_batch_size={largest}]", batch_size)
        while len(self._admitted) < batch_size:
            self._admitted.append(self._admit())
        self._live = self._admitted[:batch_size]

    def round(self, plan: Plan) -> Round:
        """Draw a round of `plan` for every live request.

        Raises:
            ValueError: the profile has no cost of the plan at this batch size, or a plain session cannot run it.
        """
        self._check_open()
        if self._plain and plan.num_steps:
            raise ValueError(f"plan must be 0 in a session of plain decoding, but got {plan}")
        cost = self._engine.cost(self.batch_size, None if self._plain else plan)
        contexts = np.array(self.context_lengths)
        correct = self._accept(plan, contexts)
        seconds = self._seconds(cost, float(contexts.mean()), plan.num_steps)
        ids = np.array([live.id for live in self._live])
        tokens = np.minimum(correct + 1, [live.left for live in self._live])
        finished = []
        for row, live in enumerate(self._live):
            live.left -= int(tokens[row])
            if live.left == 0:
                finished.append(Completion(live.id, live.request.prompt, (0,) * live.request.max_new_tokens))
                self._live[row] = self._admitted[row] = self._admit()
        finished += self._ended_at_prefill
        self._ended_at_prefill.clear()
        self._rounds += 1
        self._engine.clock.advance(seconds)
        draft_s = seconds * cost.draft_share
        return Round(
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
        seconds = self._mean_seconds(cost, context) * self._round_noise(cost, self._probe)
        self._engine.clock.advance(seconds)
        return PlainSample(self.batch_size, context, seconds)

    def foresee(self, plan: Plan) -> NDArray[np.int64]:
        """Return the correct drafts [B] int64 of a round of `plan` without changing the session. For bounds only."""
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
        """Advance the drift, and draw the correct drafts of each request [B] int64."""
        profile, steps = self._engine.profile, plan.num_steps
        self._drift = profile.next_noise(self._drift, self._noise.standard_normal())
        if steps == 0:
            return np.zeros(len(contexts), dtype=np.int64)
        change = profile.drift * self._drift + log_odds_change(self._engine.shifts, self._rounds)
        effects = np.array([live.effect for live in self._live]) + change
        reached = survival(profile.odds(plan), effects)  # [B, K]
        rates = reached / np.concatenate([np.ones((len(effects), 1)), reached[:, :-1]], axis=1)
        ids = np.array([live.id for live in self._live])
        drawn = _uniform(self._seed, ids[:, None], contexts[:, None] + np.arange(steps))
        correct: NDArray[np.int64] = np.cumprod(drawn < rates, axis=1).sum(1)
        return correct

    def _seconds(self, cost: Cost, context: float, num_steps: int) -> float:
        """Advance the slow noise, and draw the seconds of a round."""
        self._slow = self._engine.profile.next_noise(self._slow, self._noise.standard_normal())
        seconds = self._mean_seconds(cost, context) * self._round_noise(cost, self._noise)
        return seconds if self._plain else seconds * float(cost_factor(self._engine.shifts, self._rounds, num_steps))

    def _mean_seconds(self, cost: Cost, context: float) -> float:
        """Return the mean seconds at this context with the present slow noise."""
        context_factor = max(1.0 + cost.per_token * (context - self._engine.profile.context), 0.1)
        return cost.seconds * context_factor * math.exp(cost.spread * self._slow - 0.5 * cost.spread**2)

    def _round_noise(self, cost: Cost, rng: np.random.Generator) -> float:
        """Draw the noise of one round: jitter, and in few rounds a hiccup."""
        profile = self._engine.profile
        jitter = math.exp(cost.jitter * rng.standard_normal() - 0.5 * cost.jitter**2)
        extra = rng.standard_exponential() * profile.hiccup_extra
        return jitter * (1.0 + extra if rng.random() < profile.hiccup_share else 1.0)

    def _admit(self) -> _Live:
        """Take the next request that does not end with its first token, which prefill generates."""
        for _ in range(_MAX_ENDED_AT_PREFILL):
            request = next(self._requests)
            number, self._served = self._served, self._served + 1
            if request.max_new_tokens > 1:
                drawn = float(_uniform(self._seed, np.array(number), np.array(_EFFECT_POSITION)))
                effect = NormalDist().inv_cdf(min(max(drawn, 1e-12), 1 - 1e-12)) * self._engine.profile.request_spread
                return _Live(number, request, effect, request.max_new_tokens - 1)
            self._ended_at_prefill.append(Completion(number, request.prompt, (0,)))
        raise ValueError(f"max_new_tokens must be above 1, but got 1 in {_MAX_ENDED_AT_PREFILL} requests in a row")


def _uniform(seed: np.uint64, request: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each seed, request and position (SplitMix64; Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = seed * np.uint64(0x9E3779B97F4A7C15) + request.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = _mixed(x) + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mixed(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
