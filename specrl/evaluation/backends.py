"""Where choosers are evaluated: a profile in simulation, or an engine on its own clock."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers.registry import Known, make_chooser
from specrl.agents.choosers.table import FixedPlan
from specrl.core.batch_schedule import Phase
from specrl.core.interfaces import PlanChooser
from specrl.core.plan import Plan
from specrl.evaluation.live import PLAIN, block_speedups, greedy_tokens, measured_values, play_live
from specrl.evaluation.records import Record, digest
from specrl.evaluation.regret import Blocks, blocks, together
from specrl.evaluation.scores import Score, score, speedup_interval
from specrl.evaluation.simulation import Play, Replayed, World
from specrl.measure.sglang_arms import Shared, launch
from specrl.simulation.profile import Profile, Shift

if TYPE_CHECKING:
    from specrl.core.interfaces import Engine, Workload

Done = Callable[[float], None]


class Simulated:
    """A profile as a source of scores; every chooser of a seed meets the same luck."""

    def __init__(self, profile: Profile, phases: Sequence[Phase], rounds: int, shifts: Sequence[Shift] = ()) -> None:
        self.world, self.phases = World(profile, phases, rounds, shifts), tuple(phases)
        self.name, self.plans, self.bounds = profile.name, self.world.plans, dict[str, float]()

    def run(self, names: Sequence[str], seeds: Sequence[int], done: Done) -> dict[str, list[Score]]:
        """Scores by chooser, one for each seed; `bounds` are the speedups of the three bounds on the same seeds."""
        world = self.world
        scores: dict[str, list[Score]] = {name: [] for name in names}
        bounds: dict[str, list[Score]] = {"best table": [], "best plan": [], "clairvoyant": []}
        for seed in seeds:
            for name in names:
                scores[name].append(self.score(make_chooser(name, world.known, seed), seed))
                done(1.0)
            for name, chooser in zip(bounds, (world.best(), world.single(), world.clairvoyant()), strict=True):
                bounds[name].append(self.score(chooser, seed))
        self.bounds = {
            name: speedup_interval(np.concatenate([s.speedups for s in found])).value for name, found in bounds.items()
        }
        return scores

    def score(self, chooser: PlanChooser, seed: int) -> Score:
        """One play."""
        world, play = self.world, self.world.play(chooser, seed)
        tokens, choices = np.array(play.tokens), np.array(play.choices)
        earned = (tokens * world.plain[world.load] / world.batches).sum()
        speedup = np.array([earned / np.sum(play.seconds)])
        return score(speedup, world.earned, world.spent, choices, tokens)

    def record(self, name: str, seeds: Sequence[int], scores: Sequence[Score]) -> Record:
        """What a replay needs."""
        samples = np.concatenate([s.speedups for s in scores])
        config = {
            "profile": self.world.profile.to_json(),
            "traffic": _text(self.phases),
            "shifts": [[s.at, s.cost, s.from_steps, s.log_odds] for s in self.world.shifts],
        }
        return Record(
            "simulated", self.name, name, tuple(seeds), self.plans, config, np.stack([s.choices for s in scores]),
            samples, speedup_interval(samples), digest([s.tokens.tolist() for s in scores]),
        )  # fmt: skip


class Live:
    """An engine as a source of scores. Bounds and regret are from lanes of every single plan in the same run.

    The best of several measured plans is a little better than it truly is: the bounds lean to the high side.

    Args:
        engine: that decodes.
        workload: prompts.
        plans: on offer.
        phases: of the load.
        cycles: through the phases, for each seed.
        config: what a replay needs to make engine and workload again.
        name: of the source.
        shared: lanes share the engine's sessions, one going on where the other left off, as a server has but one.
    """

    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        plans: tuple[Plan, ...],
        phases: Sequence[Phase],
        cycles: int,
        config: Mapping[str, Any],
        *,
        name: str = "live",
        shared: bool = False,
    ) -> None:
        if cycles < 2:
            raise ValueError(f"an interval needs at least 2 cycles of the traffic, but got {cycles}; raise rounds")
        if wrong := [str(plan) for plan in plans if not engine.supports(plan)]:
            raise ValueError(f"plans must be ones that the engine runs, but it cannot run {', '.join(wrong)}")
        self.name, self.plans, self.bounds, self._shared = name, plans, dict[str, float](), shared
        self.blocks: Blocks | None = None  # of all seeds, after `run`
        self._engine, self._workload, self._phases, self._cycles = engine, workload, tuple(phases), cycles
        self._config = dict(config)
        self.cycle_rounds = sum(phase.rounds + 1 for phase in phases)
        self._sizes = sorted({phase.batch_size for phase in phases})

    def run(self, names: Sequence[str], seeds: Sequence[int], done: Done) -> dict[str, list[Score]]:
        """Scores by chooser, one for each seed."""
        fixed = {str(plan): FixedPlan(plan) for plan in self.plans}
        known = self._known(fixed)
        scores: dict[str, list[Score]] = {name: [] for name in names}
        bounds: dict[str, list[float]] = {"best table": [], "best plan": []}
        found: list[Blocks] = []
        for seed in seeds:
            lanes: dict[str, PlanChooser] = {**fixed, **{n: make_chooser(n, known, seed) for n in names}}
            plays = self._play(lanes, self._cycles, seed, lambda _: done(len(names) / self._cycles))
            found.append(blocks(plays, names, self.plans, self._sizes, self.cycle_rounds))
            at = np.searchsorted(self._sizes, np.array(plays[PLAIN].batches))
            earned, spent = measured_values(plays, self.plans, self._sizes)[:, at]  # [R, plans] each
            rows, best = np.arange(len(at)), (earned / spent).argmax(1)
            bounds["best table"].append(float(earned[rows, best].sum() / spent[rows, best].sum()))
            bounds["best plan"].append(float((earned.sum(0) / spent.sum(0)).max()))
            for name in names:
                play = plays[name]
                speedups = block_speedups(plays[PLAIN], play, self.cycle_rounds)
                choices, tokens = np.array(play.choices), np.array(play.tokens)
                scores[name].append(score(speedups, earned, spent, choices, tokens))
        self.bounds = {name: float(np.exp(np.mean(np.log(reached)))) for name, reached in bounds.items()}
        self.blocks = together(found)
        return scores

    def _play(self, lanes: Mapping[str, PlanChooser], cycles: int, seed: int, done: Done) -> dict[str, Play]:
        engine = Shared(self._engine) if self._shared else self._engine
        return play_live(engine, self._workload, lanes, self.plans, self._phases, cycles, seed=seed, on_cycle=done)

    def _known(self, fixed: Mapping[str, PlanChooser]) -> Known:
        """What a profile at start-up finds out, in two cycles."""
        plays = self._play(fixed, 2, 0, lambda _: None)
        earned, spent = measured_values(plays, self.plans, self._sizes)
        costs = {b: dict(zip(self.plans, spent[i].tolist(), strict=True)) for i, b in enumerate(self._sizes)}
        t0 = earned[:, self.plans.index(Plan(0))] if Plan(0) in self.plans else earned.min(1)
        lengths = (earned / t0[:, None]).mean(0)
        return Known(self.plans, costs, dict(zip(self.plans, lengths.tolist(), strict=True)))

    def replay(self, record: Record, done: Done) -> NDArray[np.float64]:
        """Speedups of all blocks when the recorded choices are repeated beside plain decoding."""
        found = []
        for seed, choices in zip(record.seeds, record.choices, strict=True):
            lane = {"replayed": Replayed(record.plans, choices.tolist())}
            plays = self._play(lane, self._cycles, seed, done)
            found.append(block_speedups(plays[PLAIN], plays["replayed"], self.cycle_rounds))
        return np.concatenate(found)

    def greedy_sha256(self, choices: Sequence[Plan], seed: int) -> str:
        """Of the greedy continuations of the first prompts, decoded by these plans in turn; without any, plainly."""
        return digest(greedy_tokens(self._engine, self._workload, choices, seed))

    def record(self, name: str, seeds: Sequence[int], scores: Sequence[Score]) -> Record:
        """What a replay needs."""
        samples = np.concatenate([s.speedups for s in scores])
        config = {**self._config, "traffic": _text(self._phases), "cycles": self._cycles}
        return Record(
            "live", self.name, name, tuple(seeds), self.plans, config, np.stack([s.choices for s in scores]),
            samples, speedup_interval(samples), self.greedy_sha256((), seeds[0]),
        )  # fmt: skip

    def close(self) -> None:
        """Close the engine, with servers that were launched for it."""
        self._engine.close()


def live_source(
    plans: tuple[Plan, ...],
    phases: Sequence[Phase],
    cycles: int,
    *,
    target: str,
    draft: str | None,
    temperature: float,
    workload: str,
    prompt_tokens: int,
    max_new_tokens: int,
    dtype: str = "float32",
    engine: str = "local",
    sglang_python: str | None = None,
    sglang_flags: str = "",
) -> Live:
    """An engine by name on a target, a draft (None: a random one) and prompts, as `specrl bench` makes them."""
    from specrl.decoding.engine import LocalEngine
    from specrl.models.draft import load_draft, new_draft
    from specrl.models.target import load_target
    from specrl.workloads.stream import held_out

    config = {
        "target": target,
        "draft": draft,
        "temperature": temperature,
        "workload": workload,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "engine": engine,
        "sglang_python": sglang_python,
        "sglang_flags": sglang_flags,
    }
    source = held_out(workload, target, prompt_tokens, max_new_tokens, temperature)
    if engine == "sglang":
        python = None if sglang_python is None else Path(sglang_python)
        served = launch(target, None if draft is None else Path(draft), plans, python, shlex.split(sglang_flags))
        return Live(served, source, plans, phases, cycles, config, name="live-sglang", shared=True)
    model = load_target(target, dtype=dtype)
    drafted = new_draft(model, intermediate_size=256) if draft is None else load_draft(Path(draft))
    local = LocalEngine(model, drafted, max_context=prompt_tokens + max_new_tokens)
    return Live(local, source, plans, phases, cycles, config)


def _text(phases: Sequence[Phase]) -> str:
    return ",".join(f"{phase.batch_size}x{phase.rounds}" for phase in phases)
