"""Profiles: costs and acceptance of simulated rounds, and the source of these numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from specrl.core.checks import require, require_known
from specrl.core.plan import PLAIN, Plan
from specrl.simulation.acceptance_model import accept_length

_FOLDER = Path(__file__).parent / "profiles"
CHAIN = "chain"  # chains of every length share their log-odds

Noise = TypeVar("Noise", float, NDArray[np.float32])


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a round at one batch size: `seconds` times noise with mean 1.

    Args:
        batch_size: B, live requests.
        plan: of the round; None: plain decoding, without a draft.
        seconds: mean without hiccups, at the profile's `context`.
        jitter: log standard deviation of the noise of each round.
        spread: log standard deviation of slow noise, which lasts for `Profile.memory` rounds.
        per_token: share of `seconds` that each further token of context adds.
        draft_share: share of the time that the draft takes; 0 if unknown.

    Raises:
        ValueError: a number out of range.
    """

    batch_size: int
    plan: Plan | None
    seconds: float
    jitter: float = 0.0
    spread: float = 0.0
    per_token: float = 0.0
    draft_share: float = 0.0

    def __post_init__(self) -> None:
        of = f"of {self.plan or PLAIN} at batch size {self.batch_size}"
        whole = type(self.batch_size) is int and self.batch_size >= 1
        require(whole, f"batch_size {of}", "a whole number of at least 1", self.batch_size)
        require(0.0 < self.seconds < math.inf, f"seconds {of}", "finite and above 0", self.seconds)
        for name in ("jitter", "spread", "per_token"):
            require(0.0 <= getattr(self, name) <= 2.0, f"{name} {of}", "in [0, 2]", getattr(self, name))
        require(0.0 <= self.draft_share < 1.0, f"draft_share {of}", "in [0, 1)", self.draft_share)


@dataclass(frozen=True)
class Profile:
    """Costs, acceptance and noise of one target, draft, traffic and machine (see `specrl.simulation.acceptance_model`).

    Between the batch sizes of a plan's costs, log seconds and all other numbers are linear in log batch size.

    Args:
        name: of the profile.
        provenance: the source of the numbers; at least 'kind' and 'source'.
        costs: of plain decoding (plan None) and of every plan, by batch size.
        log_odds: b_1 .. b_K of 'chain', and of every tree by its plan ('3/2/6').
        request_spread: s, standard deviation over requests of their effect on the log-odds.
        drift: standard deviation of a change of the log-odds of all requests, a stationary AR(1) over rounds.
        memory: rounds after which the autocorrelation of drift and slow noise is 1/e.
        hiccup_share: share of rounds that take 1 + Exp(hiccup_extra) times as long.
        hiccup_extra: see `hiccup_share`.
        delay: rounds by which results arrive late.
        context: tokens per request at which `seconds` were measured.
        prompt_tokens: tokens of each prompt in the measurement.
        max_new_tokens: tokens that each request generated in the measurement.

    Raises:
        ValueError: a number out of range, a repeated cost, or a plan without plain costs or log-odds.
    """

    name: str
    provenance: Mapping[str, Any]
    costs: tuple[Cost, ...]
    log_odds: Mapping[str, tuple[float, ...]]
    request_spread: float = 0.0
    drift: float = 0.0
    memory: float = 1000.0
    hiccup_share: float = 0.0
    hiccup_extra: float = 1.0
    delay: int = 0
    context: float = 0.0
    prompt_tokens: int = 64
    max_new_tokens: int = 128
    _by_plan: dict[Plan | None, tuple[Cost, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_plan: dict[Plan | None, tuple[Cost, ...]] = {}
        for cost in sorted(self.costs, key=lambda c: c.batch_size):
            by_plan[cost.plan] = (*by_plan.get(cost.plan, ()), cost)
        object.__setattr__(self, "_by_plan", by_plan)
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"profile {self.name!r}: {error}") from None

    def _check(self) -> None:
        if missing := {"kind", "source"} - self.provenance.keys():
            raise ValueError(f"provenance must hold 'kind' and 'source', but has no {', '.join(sorted(missing))}")
        if None not in self._by_plan:
            raise ValueError(f"costs must hold plain decoding (plan {PLAIN!r}) at every batch size, but got none")
        for plan, costs in self._by_plan.items():
            sizes = [cost.batch_size for cost in costs]
            if len(set(sizes)) < len(sizes):
                raise ValueError(f"costs must be unique, but {plan or PLAIN} has batch sizes {sizes}; remove repeats")
            if not self.covers(None, sizes[0], sizes[-1]):
                raise ValueError(
                    f"plain costs must enclose every plan's batch sizes, but plan {plan} has {sizes}; measure plain too"
                )
            if plan is not None and plan.num_steps and not self.log_odds.get(plan_family(plan)):
                raise ValueError(
                    f"log_odds must hold every plan's family, but {plan} has none; add {plan_family(plan)!r}"
                )
        for family, odds in self.log_odds.items():
            require(all(-20.0 <= value <= 20.0 for value in odds), f"log_odds of {family}", "in [-20, 20]", list(odds))
        for name, low, high in (
            ("request_spread", 0.0, 5.0), ("drift", 0.0, 5.0), ("memory", 1.0, 1e9), ("hiccup_share", 0.0, 0.5),
            ("hiccup_extra", 0.0, 1e3), ("delay", 0, 1000), ("context", 0.0, 1e7), ("prompt_tokens", 1, 1e7),
            ("max_new_tokens", 2, 1e7),
        ):  # fmt: skip
            require(low <= getattr(self, name) <= high, name, f"in [{low:g}, {high:g}]", getattr(self, name))

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans with costs, in ascending order."""
        return tuple(sorted(plan for plan in self._by_plan if plan is not None))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes with a cost of plain decoding, in ascending order."""
        return tuple(cost.batch_size for cost in self._by_plan[None])

    def covers(self, plan: Plan | None, low: int, high: int | None = None) -> bool:
        """Whether the costs of `plan` (None: plain) enclose the batch sizes from `low` to `high`."""
        known = self._by_plan.get(plan, ())
        return bool(known) and known[0].batch_size <= low and (high or low) <= known[-1].batch_size

    def can_extrapolate(self, plan: Plan) -> bool:
        """Whether costs of `plan` can be extrapolated: any plan with costs, and any chain if there are two others."""
        return plan in self._by_plan or (plan.is_chain and plan.num_steps > 0 and len(self._chains()) > 1)

    def _chains(self) -> list[Plan]:
        return [plan for plan in self.plans if plan.is_chain and plan.num_steps]

    def cost(self, batch_size: int, plan: Plan | None, *, extrapolate: bool = False) -> Cost:
        """Return the cost of `plan` (None: plain) at a batch size.

        With `extrapolate`, the last segment continues beyond the profile's batch sizes. The seconds of a chain without
        costs are linear in num_steps through the nearest two chains, and at least those of plain decoding.

        Raises:
            ValueError: the profile has no such cost, and it may not or cannot be extrapolated.
        """
        if not extrapolate and not self.covers(plan, batch_size):
            sizes = [cost.batch_size for cost in self._by_plan.get(plan, ())]
            known = f"batch sizes {sizes[0]} to {sizes[-1]}" if sizes else f"plans {', '.join(map(str, self.plans))}"
            wanted = f"plan {plan}" if plan else "plain decoding"
            raise ValueError(
                f"profile {self.name!r} knows {known}, but got {wanted} at batch size {batch_size}; "
                "use extrapolate=True for an estimate"
            )
        if plan in self._by_plan:
            return _between(self._by_plan[plan], batch_size)
        assert plan is not None
        if not self.can_extrapolate(plan):
            raise ValueError(f"profile {self.name!r} must know two chains to extrapolate, but got plan {plan}")
        near = sorted(sorted(self._chains(), key=lambda p: abs(p.num_steps - plan.num_steps))[:2])
        one, two = (_between(self._by_plan[p], batch_size) for p in near)
        weight = (plan.num_steps - near[0].num_steps) / (near[1].num_steps - near[0].num_steps)
        seconds = one.seconds + weight * (two.seconds - one.seconds)
        seconds = max(seconds, _between(self._by_plan[None], batch_size).seconds)
        return replace(_mix(one, two, weight), plan=plan, seconds=seconds)

    def next_noise(self, noise: Noise, drawn: Noise) -> Noise:
        """Return the next value of an AR(1) with variance 1 and autocorrelation 1/e after `memory` rounds.

        Args:
            noise: the present value, a number or an array.
            drawn: an independent standard normal number or array.
        """
        decay = math.exp(-1.0 / self.memory)
        return decay * noise + math.sqrt(1.0 - decay**2) * drawn

    def odds(self, plan: Plan) -> tuple[float, ...]:
        """Return b_1 .. b_num_steps; the last known one is repeated."""
        if plan.num_steps == 0:
            return ()
        known = self.log_odds[plan_family(plan)]
        return (*known[: plan.num_steps], *(known[-1:] * (plan.num_steps - len(known))))

    def accept_length(self, plan: Plan) -> float:
        """Return E[τ], the expected tokens per request and round, bonus included, if all rounds have this plan."""
        return accept_length(self.odds(plan), self.request_spread, self.drift) if plan.num_steps else 1.0

    def tokens_per_second(self, batch_size: int, plan: Plan | None, *, extrapolate: bool = False) -> float:
        """Return tokens per second and request: E[τ] / T(B, plan), or 1 / t0(B) for plain decoding (None)."""
        seconds = self.cost(batch_size, plan, extrapolate=extrapolate).seconds
        return self.accept_length(plan or Plan(0)) / seconds / (1.0 + self.hiccup_share * self.hiccup_extra)

    def speedup(self, batch_size: int, plan: Plan, *, extrapolate: bool = False) -> float:
        """Return S(B, plan) = E[τ] · t0(B) / T(B, plan)."""
        fast, plain = (self.tokens_per_second(batch_size, p, extrapolate=extrapolate) for p in (plan, None))
        return fast / plain

    def to_json(self) -> str:
        """Return JSON for `load_profile`, one line for each cost."""
        head = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "costs"}
        parts = [f"  {json.dumps(key)}: {json.dumps(_jsonable(value))}" for key, value in head.items()]
        rows = ",\n".join(f"    {json.dumps(_row(cost))}" for cost in self.costs)
        return "{\n" + ",\n".join(parts) + f',\n  "costs": [\n{rows}\n  ]\n}}\n'


def shipped_profiles() -> tuple[str, ...]:
    """Names of the profiles inside the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_profile(source: str | Path | Profile) -> Profile:
    """Return a profile by name (`shipped_profiles`) or from a .json file; a `Profile` is returned unchanged.

    Raises:
        ValueError: no such profile, or an invalid one.
    """
    if isinstance(source, Profile):
        return source
    path = Path(source)
    if not path.is_file():
        require_known("profile", source, shipped_profiles(), " or a .json file")
        path = _FOLDER / f"{source}.json"
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _parse(record: Any) -> Profile:
    _check_keys(record, Profile, "a profile", {"name", "provenance", "costs", "log_odds"})
    costs = []
    for row in record["costs"]:
        _check_keys(row, Cost, "a cost", {"batch_size", "plan", "seconds"})
        costs.append(Cost(**{**row, "plan": None if row["plan"] == PLAIN else Plan.parse(row["plan"])}))
    odds = {family: tuple(map(float, values)) for family, values in record["log_odds"].items()}
    return Profile(**{**record, "costs": tuple(costs), "log_odds": odds})


def _check_keys(record: Any, kind: type, name: str, required: set[str]) -> None:
    require(isinstance(record, dict), name, "a JSON object", type(record).__name__)
    for key in record:
        require_known(f"a key of {name}", key, [f.name for f in fields(kind) if f.init])
    if missing := sorted(required - record.keys()):
        raise ValueError(f"{name} must hold {', '.join(sorted(required))}, but {', '.join(missing)} is missing")


def plan_family(plan: Plan) -> str:
    """Return the key of a plan in `Profile.log_odds`."""
    return CHAIN if plan.is_chain else str(plan)


def _between(costs: tuple[Cost, ...], batch_size: int) -> Cost:
    """Return the cost at a batch size; the last segment continues beyond the known ones."""
    if len(costs) == 1 or batch_size <= 0:
        return replace(costs[0], batch_size=batch_size)
    after = int(np.clip(np.searchsorted([c.batch_size for c in costs], batch_size), 1, len(costs) - 1))
    one, two = costs[after - 1], costs[after]
    weight = math.log(batch_size / one.batch_size) / math.log(two.batch_size / one.batch_size)
    seconds = math.exp(math.log(one.seconds) + weight * math.log(two.seconds / one.seconds))
    return replace(_mix(one, two, weight), batch_size=batch_size, seconds=seconds)


def _mix(one: Cost, two: Cost, weight: float) -> Cost:
    """Interpolate all numbers but the seconds, without extrapolation."""
    weight = min(max(weight, 0.0), 1.0)
    mixed = {
        name: getattr(one, name) + weight * (getattr(two, name) - getattr(one, name))
        for name in ("jitter", "spread", "per_token", "draft_share")
    }
    return replace(one, **mixed)


def _row(cost: Cost) -> dict[str, Any]:
    """A cost without the numbers that are 0."""
    row = {**asdict(cost), "plan": PLAIN if cost.plan is None else str(cost.plan)}
    return {key: _jsonable(value) for key, value in row.items() if value != 0.0}


def _jsonable(value: Any) -> Any:
    """The value with numbers of six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _jsonable(part) for key, part in value.items()}
    return [_jsonable(part) for part in value] if isinstance(value, (tuple, list)) else value
