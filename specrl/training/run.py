"""A training run: built from its settings or from a checkpoint, and saved to one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import FixedPlan
from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.batch_schedule import parse_traffic
from specrl.core.clock import Clock
from specrl.core.interfaces import Engine, PlanChooser, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.measure.machine import environment
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.checkpoint import load_checkpoint, save_checkpoint
from specrl.training.deploy import DeployAlways, DeployIfBetter, DeployPolicy
from specrl.training.loop import OnlineLoop
from specrl.training.trace_files import pack, unpack

HOLDOUT_FRACTION = 0.125  # of requests for a gate, unless the config has one
KIND = "online"  # of checkpoints


@dataclass(slots=True)
class Run:
    """A training run: its loop and the rest of its state."""

    loop: OnlineLoop
    engine: Engine
    target: str
    draft: Draft
    learner: OnlineLearner | None
    chooser: PlanChooser
    seconds_before: float = 0.0  # of the runs that this one continues
    log: list[dict[str, object]] = field(default_factory=list)  # the rows of log.csv
    decisions: list[dict[str, object]] = field(default_factory=list)  # the rows of gate.csv

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
        """Build a run, from a checkpoint if `resume` names one (see `specrl train` for the arguments).

        `engine` serves `draft` with `plans`; None: a local engine.

        Raises:
            ValueError: an argument out of range, or a checkpoint of another run.
        """
        parsed = parse_plans(plans)
        picks: PlanChooser = AdaptiveChooser(parsed, seed=seed) if chooser == "adaptive" else FixedPlan(_fixed(chooser))
        if engine is None:
            engine = LocalEngine(model, draft, max_context=max_context, clock=clock)
        gated = update == "better"
        learns = None
        if learner is not None:
            config = (
                replace(learner, holdout_fraction=learner.holdout_fraction or HOLDOUT_FRACTION) if gated else learner
            )
            learns = OnlineLearner(draft, model.embedding, config, seed=seed, clock=engine.clock, gated=gated)
        baseline, state = PlainCost(), dict[str, Any]()
        if resume is not None:
            tensors, state, replay = load_checkpoint(resume, KIND)
            if state["target"] != target:
                raise ValueError(f"the checkpoint's target must be resumed, {state['target']!r}, but got {target!r}")
            if learns is not None and not state["learner"]:
                raise ValueError("the checkpoint was made without learning, so none can go on; use --learn false")
            if learns is not None:
                if state["deploy"]["policy"] != update:
                    raise ValueError(
                        f"a resumed run must deploy as before, --update {state['deploy']['policy']}, but got {update}"
                    )
                learns.load_state_dict({**state["learner"], "tensors": tensors})
                held = [unpack(i, replay, note) for i, note in enumerate(state["replay"])]
                apart = len(held) - state["held_out"]
                learns.replay.extend(held[:apart])
                learns.held_out.extend(held[apart:])
            picks.load_state_dict(state["chooser"])
            baseline.load_state_dict(state["baseline"])
        log, decisions = state.get("log", []), state.get("decisions", [])
        deploy: DeployPolicy | None = None
        if learns is not None and gated:
            steps = max(1, *(plan.num_steps for plan in picks.plans))
            gate = Gate(draft.config, model.embedding, num_steps=steps, least_gain=0.0, seed=seed)
            deploy = DeployIfBetter(engine, learns, gate, picks.plans, seed=seed, on_decision=decisions.append)
        elif learns is not None:
            deploy = DeployAlways(engine, learns)
        if deploy is not None and state:
            deploy.load_state_dict(state["deploy"])
        loop = OnlineLoop(
            engine,
            workload,
            picks,
            learns,
            parse_traffic(traffic),
            sync_every=sync_every,
            seed=seed,
            baseline=baseline,
            deploy=deploy,
            state=state.get("loop"),
        )
        return cls(loop, engine, target, draft, learns, picks, state.get("seconds", 0.0), log, decisions)

    @property
    def served(self) -> int:
        """Requests finished, including those of the runs that this one continues."""
        return self.loop.requests

    @property
    def learned(self) -> Draft:
        """The draft that serves now."""
        return self.draft if self.loop.deploy is None else Draft(self.draft.config, self.loop.deploy.weights())

    def save(self, directory: Path, *, seconds: float = 0.0, replay: bool = False) -> None:
        """Write a checkpoint, atomically; the loop's session must have ended.

        Args:
            directory: the directory in which checkpoint/ is written.
            seconds: of the run so far, including the runs that it continues.
            replay: keep the sequences to learn from too; without them a resumed run collects new ones.
        """
        loop, deploy = self.loop, self.loop.deploy
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        held, notes, apart = dict[str, Tensor](), list[dict[str, Any]](), 0
        if self.learner is not None:
            numbers = self.learner.state_dict()
            tensors = numbers.pop("tensors")
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
            "deploy": None if deploy is None else deploy.state_dict(),
            "chooser": self.chooser.state_dict(),
            "baseline": loop.baseline.state_dict(),
            "loop": loop.state_dict(),
            "replay": notes,
            "held_out": apart,
            "log": self.log,
            "decisions": self.decisions,
        }
        save_checkpoint(directory / "checkpoint", KIND, tensors, state, held)

    def table(self) -> dict[int, Plan]:
        """The best plan now at every batch size that was served, where the chooser knows one."""
        best = {batch: self.chooser.best(batch) for batch in sorted(self.loop.recent)}
        return {batch: plan for batch, plan in best.items() if plan is not None}

    def write_results(self, directory: OutputDir) -> None:
        """Write the draft, the plan for each batch size, and the environment."""
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
