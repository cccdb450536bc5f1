"""A training run: its parts put together, kept in a checkpoint, and put together again from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import FixedPlan, PlanTable
from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.batch_schedule import parse_traffic
from specrl.core.clock import Clock
from specrl.core.interfaces import Engine, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.measure.machine import environment
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.checkpoint import load_checkpoint, save_checkpoint
from specrl.training.deploy import Always, Better
from specrl.training.loop import OnlineLoop
from specrl.training.trace_files import pack, unpack

HELD_OUT = 0.125  # of requests, for a gate, where the learner's settings name no share


@dataclass(slots=True)
class Run:
    """A training run: its loop, and what it must remember to go on."""

    loop: OnlineLoop
    engine: Engine
    target: str
    draft: Draft
    learner: OnlineLearner | None
    chooser: AdaptiveChooser | PlanTable
    seconds_before: float = 0.0  # of earlier runs that this one goes on from
    log: list[dict[str, object]] = field(default_factory=list)  # a row for every line reported, earlier runs' too
    decisions: list[dict[str, object]] = field(default_factory=list)  # of the gate, earlier runs' too

    @classmethod
    def start(
        cls,
        model: Target,
        draft: Draft,
        workload: Workload,
        *,
        target: str,
        plans: str,
        chooser: str,
        traffic: str,
        learner: LearnerConfig | None,
        sync_every: int,
        max_context: int,
        seed: int,
        update: Literal["always", "better"] = "always",
        resume: Path | None = None,
        clock: Clock | None = None,
        engine: Engine | None = None,
    ) -> Run:
        """Put the parts together, from a checkpoint where one is named (see `train` for the arguments).

        `engine` serves `draft` with `plans`; None: the local one.

        Raises:
            ValueError: an argument out of range, or a checkpoint of another run.
        """
        parsed = parse_plans(plans)
        picks = AdaptiveChooser(parsed, seed=seed) if chooser == "adaptive" else FixedPlan(_fixed(chooser))
        if engine is None:
            engine = LocalEngine(model, draft, max_context=max_context, clock=clock)
        gated = update == "better"
        learns = None
        if learner is not None:
            config = replace(learner, held_out=learner.held_out or HELD_OUT) if gated else learner
            learns = OnlineLearner(draft, model.embedding, config, seed=seed, clock=engine.clock, gated=gated)
        baseline, state = PlainCost(), dict[str, Any]()
        if resume is not None:
            tensors, state, replay = load_checkpoint(resume)
            if state["target"] != target:
                raise ValueError(f"the checkpoint's target must be resumed, {state['target']!r}, but got {target!r}")
            if learns is not None and not state["learner"]:
                raise ValueError("the checkpoint was made without learning, so none can go on; use --learn false")
            if learns is not None:
                if (state["gate"] is not None) != gated:
                    raise ValueError(f"a run goes on with the updates it had, but got --update {update}; use the other")
                learns.load_state(tensors, state["learner"])
                held = [unpack(i, replay, note) for i, note in enumerate(state["replay"])]
                apart = len(held) - state["held_out"]
                learns.replay.extend(held[:apart])
                learns.held_out.extend(held[apart:])
            picks.load_state_dict(state["chooser"])
            baseline.load_state_dict(state["baseline"])
        log, decisions = state.get("log", []), state.get("decisions", [])
        updates: Always | Better | None = None
        if learns is not None and gated:
            steps = max(1, *(plan.num_steps for plan in picks.plans))
            judge = Gate(draft.config, model.embedding, num_steps=steps, least_gain=0.0, seed=seed)
            updates = Better(engine, learns, judge, picks.plans, seed=seed, on_decision=decisions.append)
            if state:
                updates.load_state_dict(state["gate"], learns.good())
        elif learns is not None:
            updates = Always(engine, learns)
            updates.offer()
        loop = OnlineLoop(
            engine,
            workload,
            picks,
            learns,
            parse_traffic(traffic),
            sync_every=sync_every,
            seed=seed,
            baseline=baseline,
            updates=updates,
            state=state.get("loop"),
        )
        return cls(loop, engine, target, draft, learns, picks, state.get("seconds", 0.0), log, decisions)

    @property
    def served(self) -> int:
        """Requests finished, those before a resumption included."""
        return self.loop.requests

    @property
    def learned(self) -> Draft:
        """The draft that serves now."""
        return self.draft if self.loop.updates is None else Draft(self.draft.config, self.loop.updates.serving())

    def save(self, directory: Path, *, seconds: float = 0.0, replay: bool = False) -> None:
        """Write the checkpoint of a loop that rests, atomically: all that `start` needs to go on.

        Args:
            directory: in which checkpoint/ appears.
            seconds: that the run took so far, earlier ones included.
            replay: keep the sequences to learn from too; without them a resumed run gathers new ones.
        """
        loop, updates = self.loop, self.loop.updates
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        held, notes, apart = dict[str, Tensor](), list[dict[str, Any]](), 0
        if self.learner is not None:
            tensors, numbers = self.learner.state()
            if replay:
                held, notes = pack([*self.learner.replay, *self.learner.held_out])
                apart = len(self.learner.held_out)
        if self.draft.target_ids is not None:
            tensors = {**tensors, "vocabulary": self.draft.target_ids}
        state = {
            "target": self.target,
            "served": self.served,
            "seconds": seconds,
            "learner": numbers,
            "gate": updates.state_dict() if isinstance(updates, Better) else None,
            "chooser": self.chooser.state_dict(),
            "baseline": loop.baseline.state_dict(),
            "loop": loop.state_dict(),
            "replay": notes,
            "held_out": apart,
            "log": self.log,
            "decisions": self.decisions,
        }
        save_checkpoint(directory / "checkpoint", tensors, state, held)

    def table(self) -> dict[int, Plan]:
        """The plan chosen now for every batch size that was served."""
        return {batch: self.chooser.best(batch) for batch in sorted(self.loop.tallies)}

    def write_results(self, directory: OutputDir) -> None:
        """Write the draft, the plan per batch size, and where they were learnt."""
        self.learned.save(directory.path / "draft")
        plans = {str(batch): str(plan) for batch, plan in self.table().items()}
        directory.write_json("plans.json", {"plans": plans, "requests": self.served})
        directory.write_json("environment.json", environment())
        if self.learner is not None:
            directory.write_json("learner.json", asdict(self.learner.config))


def _fixed(chooser: str) -> Plan:
    try:
        return Plan.parse(chooser)
    except ValueError as error:
        raise ValueError(f"chooser must be 'adaptive' or one plan, but got {chooser!r}: {error}") from error
