"""Profiles: what a simulated engine's rounds cost, how many drafts stand, and where these numbers come from."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from specrl.core.plan import Plan
from specrl.simulation.acceptance_model import accept_length

_FOLDER = Path(__file__).parent / "profiles"
CHAIN = "chain"  # chains of every length share their log-odds
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a round takes at one batch size: `seconds` · noise, whose mean is 1.

    Args:
        batch_size: B, live requests.
        plan: of the round; None: plain decoding, without any draft.
        seconds: the mean, hiccups apart, at the profile's `context`.
        jitter: log standard deviation of one round, independent of all others.
        spread: log standard deviation of what is slow (neighbours, clocks, a batch that runs empty).
        per_token: share of `seconds` that a further token of context adds.
        draft_share: share of the time that the draft takes, where it is known.
    """

    batch_size: int
    plan: Plan | None
    seconds: float
    jitter: float = 0.0
    spread: float = 0.0
    per_token: float = 0.0
    draft_share: float = 0.0

    def __post_init__(self) -> None:
        at = f"the cost of {self.plan or PLAIN} at batch size {self.batch_size}"
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, but got {self.batch_size!r} in {at}")
        if not 0.0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be finite and above 0, but got {self.seconds} in {at}")
        for name in ("jitter", "spread", "per_token"):
            if not 0.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must be in [0, 2], but got {getattr(self, name)} in {at}")
        if not 0.0 <= self.draft_share < 1.0:
            raise ValueError(f"draft_share must be in [0, 1), but got {self.draft_share} in {at}")


@dataclass(frozen=True, slots=True)
class Shift:
    """From round `at` of a session on: costs of plans with `from_steps` or more times `cost`, log-odds moved."""

    at: int
    cost: float = 1.0
    from_steps: int = 1
    log_odds: float = 0.0

    def __post_init__(self) -> None:
        if self.at < 0 or self.from_steps < 0 or not 0.0 < self.cost < math.inf or not math.isfinite(self.log_odds):
            raise ValueError(f"a shift needs at, from_steps >= 0, a cost above 0 and finite log_odds, but got {self}")


@dataclass(frozen=True)
class Profile:
    """Costs, acceptance and noise of one target, draft, traffic and machine (see `specrl.simulation.acceptance_model`).

    Between the batch sizes of a plan's costs, log seconds are a line over log batch size, the rest a line over log
    batch size.

    Args:
        name: of the profile.
        provenance: where the numbers come from; at least 'kind' and 'source'.
        costs: of plain decoding (plan None) and of every plan on offer, by batch size.
        log_odds: b_1 .. b_K of 'chain', and of every tree by its plan ('3/2/6').
        skill: s, standard deviation over requests of the log-odds.
        drift: standard deviation of what all requests' log-odds drift by, as a stationary AR(1) over rounds.
        memory: rounds after which drift and slow noise have forgotten all but 1/e.
        hiccup_share: share of rounds that take a multiple of their time,
        hiccup_extra: 1 + Exp(hiccup_extra) times it.
        delay: rounds by which results are late when the next plan is chosen.
        context: tokens per request at which `seconds` hold.
        prompt_tokens: of the requests that were measured.
        max_new_tokens: tokens that they generated.

    Raises:
        ValueError: numbers out of range, costs twice, or plans without plain costs or log-odds.
    """

    name: str
    provenance: Mapping[str, Any]
    costs: tuple[Cost, ...]
    log_odds: Mapping[str, tuple[float, ...]]
    skill: float = 0.0
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
        for rule in _broken(self, by_plan):
            raise ValueError(f"profile {self.name!r}: {rule}")

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Those with costs, in ascending order; all else is extrapolation."""
        return tuple(sorted(plan for plan in self._by_plan if plan is not None))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Those at which plain decoding has a cost."""
        return tuple(cost.batch_size for cost in self._by_plan[None])

    def covers(self, plan: Plan | None, low: int, high: int | None = None) -> bool:
        """Whether costs of `plan` (None: plain) enclose the batch sizes low .. high."""
        known = self._by_plan.get(plan, ())
        return bool(known) and known[0].batch_size <= low and (high or low) <= known[-1].batch_size

    def can_extrapolate(self, plan: Plan) -> bool:
        """Whether there is anything to extrapolate from: two other chains for a chain, itself for a tree."""
        return plan in self._by_plan or (plan.is_chain and plan.num_steps > 0 and len(self._chains()) > 1)

    def _chains(self) -> list[Plan]:
        return [plan for plan in self.plans if plan.is_chain and plan.num_steps]

    def cost(self, batch_size: int, plan: Plan | None, *, extrapolate: bool = False) -> Cost:
        """The cost of `plan` (None: plain) at a batch size.

        With `extrapolate`, beyond the batch sizes known the last segment goes on, and the seconds of a chain that
        is not known are a line over num_steps through the nearest two that are, at least those of plain decoding.

        Raises:
            ValueError: it is not known, and not to be extrapolated.
        """
        if not extrapolate and not self.covers(plan, batch_size):
            known = [cost.batch_size for cost in self._by_plan.get(plan, ())]
            at = f"batch sizes {known[0]} to {known[-1]}" if known else f"plans {', '.join(map(str, self.plans))}"
            what = f"plan {plan}" if plan else "plain decoding"
            raise ValueError(
                f"profile {self.name!r} knows {at}, but got {what} at batch size {batch_size}; extrapolate=True guesses"
            )
        if plan in self._by_plan:
            return _between(self._by_plan[plan], batch_size)
        assert plan is not None
        if not self.can_extrapolate(plan):
            raise ValueError(f"profile {self.name!r} must know two chains to guess another, but got plan {plan}")
        near = sorted(sorted(self._chains(), key=lambda p: abs(p.num_steps - plan.num_steps))[:2])
        one, two = (_between(self._by_plan[p], batch_size) for p in near)
        weight = (plan.num_steps - near[0].num_steps) / (near[1].num_steps - near[0].num_steps)
        mixed = _mix(one, two, min(max(weight, 0.0), 1.0))
        seconds = one.seconds + weight * (two.seconds - one.seconds)
        return replace(mixed, plan=plan, seconds=max(seconds, _between(self._by_plan[None], batch_size).seconds))

    def odds(self, plan: Plan) -> tuple[float, ...]:
        """b_1 .. b_num_steps; beyond those known the last one goes on."""
        if plan.num_steps == 0:
            return ()
        known = self.log_odds[CHAIN if plan.is_chain else str(plan)]
        return (*known[: plan.num_steps], *(known[-1:] * (plan.num_steps - len(known))))

    def accept_length(self, plan: Plan) -> float:
        """E[τ]: expected tokens per request and round, bonus included, under this plan alone."""
        return accept_length(self.odds(plan), self.skill, self.drift) if plan.num_steps else 1.0

    def tokens_per_second(self, batch_size: int, plan: Plan | None, *, extrapolate: bool = False) -> float:
        """Tokens per second and request, ΣN/B ÷ ΣΔt: E[τ] / T(B, plan); of plain decoding 1 / t0(B)."""
        seconds = self.cost(batch_size, plan, extrapolate=extrapolate).seconds
        return self.accept_length(plan or Plan(0)) / seconds / (1.0 + self.hiccup_share * self.hiccup_extra)

    def speedup(self, batch_size: int, plan: Plan, *, extrapolate: bool = False) -> float:
        """S(B, plan) = E[τ] · t0(B) / T(B, plan)."""
        fast, plain = (self.tokens_per_second(batch_size, p, extrapolate=extrapolate) for p in (plan, None))
        return fast / plain

    def to_json(self) -> str:
        """As `load_profile` reads it; a cost is a line."""
        head = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "costs"}
        parts = [f"  {json.dumps(key)}: {json.dumps(_jsonable(value))}" for key, value in head.items()]
        rows = ",\n".join(f"    {json.dumps(_row(cost))}" for cost in self.costs)
        return "{\n" + ",\n".join(parts) + f',\n  "costs": [\n{rows}\n  ]\n}}\n'


def shipped_profiles() -> tuple[str, ...]:
    """Names of the profiles inside the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_profile(source: str | Path | Profile) -> Profile:
    """A profile by name (`shipped_profiles`) or from a .json file.

    Raises:
        ValueError: there is none, or it is not a valid one.
    """
    if isinstance(source, Profile):
        return source
    names = shipped_profiles()
    path = _FOLDER / f"{source}.json" if str(source) in names else Path(source)
    if not path.is_file():
        close = difflib.get_close_matches(str(source), names, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"a profile is a .json file or one of {', '.join(names)}, but got {str(source)!r}{meant}")
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def profile_from_json(text: str) -> Profile:
    """What `Profile.to_json` gave.

    Raises:
        ValueError: it is not a valid profile.
    """
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"not a profile: {' '.join(str(error).split())}") from error


def _parse(record: Any) -> Profile:
    if not isinstance(record, dict):
        raise ValueError(f"a profile must be a JSON object, but got {type(record).__name__}")
    _keys(record, Profile, "a profile", {"name", "provenance", "costs", "log_odds"})
    costs = []
    for row in record["costs"]:
        _keys(row, Cost, "a cost", {"batch_size", "plan", "seconds"})
        plan = None if row["plan"] == PLAIN else Plan.parse(row["plan"])
        costs.append(Cost(**{**row, "plan": plan}))
    odds = {family: tuple(map(float, values)) for family, values in record["log_odds"].items()}
    return Profile(**{**record, "costs": tuple(costs), "log_odds": odds})


def _keys(given: Mapping[str, Any], kind: type, what: str, needed: set[str]) -> None:
    known = [f.name for f in fields(kind) if f.init]
    for missing in sorted(needed - given.keys()):
        raise ValueError(f"{what} must hold {', '.join(sorted(needed))}, but {missing!r} is missing")
    for extra in sorted(given.keys() - set(known)):
        close = difflib.get_close_matches(extra, known, n=1)
        raise ValueError(
            f"{what} holds only {', '.join(known)}, but got {extra!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )


def _broken(profile: Profile, by_plan: Mapping[Plan | None, tuple[Cost, ...]]) -> Iterable[str]:
    """The rules that a profile breaks, each with value and remedy."""
    for key in ("kind", "source"):
        if key not in profile.provenance:
            yield f"provenance must say where the numbers come from, but has no {key!r}; add it"
    if None not in by_plan:
        yield f"costs must hold plain decoding (plan {PLAIN!r}), but got none; measure it at every batch size"
        return
    plain = by_plan[None]
    for plan, costs in by_plan.items():
        sizes = [cost.batch_size for cost in costs]
        if len(set(sizes)) < len(sizes):
            yield f"a cost must be given once, but {plan or PLAIN} has batch sizes {sizes}; remove the repeats"
        if sizes[0] < plain[0].batch_size or sizes[-1] > plain[-1].batch_size:
            yield f"plain costs must enclose every plan's batch sizes, but plan {plan} has {sizes}; measure plain there"
        if plan is not None and plan.num_steps and not profile.log_odds.get(CHAIN if plan.is_chain else str(plan)):
            yield f"log_odds must hold every plan's family, but {plan} has none; add {CHAIN!r} or {str(plan)!r}"
    for family, odds in profile.log_odds.items():
        if not all(-20.0 <= value <= 20.0 for value in odds):
            yield f"log_odds must be in [-20, 20], but {family!r} has {list(odds)}"
    for name, low, high in (
        ("skill", 0.0, 5.0), ("drift", 0.0, 5.0), ("memory", 1.0, 1e9), ("hiccup_share", 0.0, 0.5),
        ("hiccup_extra", 0.0, 1e3), ("delay", 0, 1000), ("context", 0.0, 1e7), ("prompt_tokens", 1, 1e7),
        ("max_new_tokens", 2, 1e7),
    ):  # fmt: skip
        if not low <= getattr(profile, name) <= high:
            yield f"{name} must be in [{low:g}, {high:g}], but got {getattr(profile, name)}"


def _between(costs: tuple[Cost, ...], batch_size: int) -> Cost:
    """The cost at a batch size; beyond the last, its segment goes on."""
    if len(costs) == 1 or batch_size <= 0:
        return replace(costs[0], batch_size=batch_size)
    after = int(np.clip(np.searchsorted([c.batch_size for c in costs], batch_size), 1, len(costs) - 1))
    one, two = costs[after - 1], costs[after]
    weight = math.log(batch_size / one.batch_size) / math.log(two.batch_size / one.batch_size)
    seconds = math.exp(math.log(one.seconds) + weight * math.log(two.seconds / one.seconds))
    return replace(_mix(one, two, min(max(weight, 0.0), 1.0)), batch_size=batch_size, seconds=seconds)


def _mix(one: Cost, two: Cost, weight: float) -> Cost:
    mixed = {
        name: getattr(one, name) + weight * (getattr(two, name) - getattr(one, name))
        for name in ("jitter", "spread", "per_token", "draft_share")
    }
    return replace(one, **mixed)


def _row(cost: Cost) -> dict[str, Any]:
    """A cost without what is zero, to six digits."""
    row = {**asdict(cost), "plan": PLAIN if cost.plan is None else str(cost.plan)}
    return {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items() if v != 0.0}


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _jsonable(part) for key, part in value.items()}
    return [_jsonable(part) for part in value] if isinstance(value, (tuple, list)) else value
