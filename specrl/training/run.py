"""A training run: built from its settings or from a checkpoint, and saved to one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.batch_schedule import parse_traffic
from specrl.core.clock import Clock
from specrl.core.interfaces import Engine, PlanChooser, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.measure.machine import environment
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from specrl.training.config import ServingConfig
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
        serving: ServingConfig,
        *,
        target: str,
        learner: LearnerConfig | None,
        max_context: int,
        seed: int,
        resume: Path | None = None,
        clock: Clock | None = None,
        engine: Engine | None = None,
    ) -> Run:
        """Build a run, from its settings or from a checkpoint.

        Args:
            model: the target.
            draft: the draft to start from.
            workload: the requests.
            serving: how they are served.
            target: name of the target.
            learner: how the draft learns; None: it does not change.
            max_context: largest number of tokens of a request.
            seed: of everything random.
            resume: directory of the checkpoint to continue; None: a new run.
            clock: of the local engine; None: the machine's.
            engine: serves `draft` with the plans of `serving`; None: a local engine.

        Raises:
            ValueError: an argument out of range, or a checkpoint of another run.
        """
        if engine is None:
            engine = LocalEngine(model, draft, max_context=max_context, clock=clock)
        chooser, baseline = serving.make_chooser(seed), PlainCost()
        gated = serving.deploy == "better"
        learns = None
        if learner is not None:
            if gated and not learner.holdout_fraction:
                learner = replace(learner, holdout_fraction=HOLDOUT_FRACTION)
            learns = OnlineLearner(draft, model.embedding, learner, seed=seed, clock=engine.clock, gated=gated)
        state: dict[str, Any] = {}
        if resume is not None:
            checkpoint = load_checkpoint(resume, KIND)
            state = checkpoint.state
            if state["target"] != target:
                raise ValueError(f"the checkpoint's target must be resumed, {state['target']!r}, but got {target!r}")
            if learns is not None:
                _restore_learner(learns, checkpoint, serving)
            chooser.load_state_dict(state["chooser"])
            baseline.load_state_dict(state["baseline"])
        decisions = state.get("decisions", [])
        deploy: DeployPolicy | None = None
        if learns is not None and gated:
            steps = max(1, *(plan.num_steps for plan in chooser.plans))
            gate = Gate(draft.config, model.embedding, num_steps=steps, least_gain=0.0, seed=seed)
            deploy = DeployIfBetter(engine, learns, gate, chooser.plans, seed=seed, on_decision=decisions.append)
        elif learns is not None:
            deploy = DeployAlways(engine, learns)
        if deploy is not None and state:
            deploy.load_state_dict(state["deploy"])
        loop = OnlineLoop(
            engine,
            workload,
            chooser,
            learns,
            parse_traffic(serving.batch_schedule),
            sync_every=serving.weight_sync_interval,
            seed=seed,
            baseline=baseline,
            deploy=deploy,
            state=state.get("loop"),
        )
        seconds, log = state.get("seconds", 0.0), state.get("log", [])
        return cls(loop, engine, target, draft, learns, chooser, seconds, log, decisions)

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
        learner: dict[str, Any] | None = None
        sequences, notes, held_out = dict[str, Tensor](), list[dict[str, Any]](), 0
        if self.learner is not None:
            learner = self.learner.state_dict()
            tensors = learner.pop("tensors")
            if replay:
                sequences, notes = pack([*self.learner.replay, *self.learner.held_out])
                held_out = len(self.learner.held_out)
        if self.draft.target_ids is not None:
            tensors = {**tensors, "vocabulary": self.draft.target_ids}
        state = {
            "target": self.target,
            "served": self.served,
            "seconds": seconds,
            "learner": learner,
            "deploy": None if deploy is None else deploy.state_dict(),
            "chooser": self.chooser.state_dict(),
            "baseline": loop.baseline.state_dict(),
            "loop": loop.state_dict(),
            "replay": notes,
            "held_out": held_out,
            "log": self.log,
            "decisions": self.decisions,
        }
        save_checkpoint(directory / "checkpoint", KIND, tensors, state, sequences)

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


def _restore_learner(learner: OnlineLearner, checkpoint: Checkpoint, serving: ServingConfig) -> None:
    """Restore a learner and its sequences from a checkpoint."""
    state = checkpoint.state
    if state["learner"] is None:
        raise ValueError("the checkpoint was made without learning, so --learn must be false, but got true")
    if state["deploy"]["policy"] != serving.deploy:
        raise ValueError(
            f"serving.deploy must be the checkpoint's, {state['deploy']['policy']!r}, but got {serving.deploy!r}"
        )
    learner.load_state_dict({**state["learner"], "tensors": checkpoint.tensors})
    sequences = [unpack(i, checkpoint.replay, note) for i, note in enumerate(state["replay"])]
    first_held_out = len(sequences) - state["held_out"]
    learner.load_sequences(sequences[:first_held_out], sequences[first_held_out:])
