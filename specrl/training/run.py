"""A training run: built from its settings or from a checkpoint, and saved to one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.batch_schedule import parse_traffic
from specrl.core.checks import require
from specrl.core.interfaces import Engine, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan
from specrl.io.output import OutputDir
from specrl.measure.machine import environment
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from specrl.training.config import CheckpointConfig, ServingConfig
from specrl.training.deploy import DeployIfBetter
from specrl.training.loop import OnlineLoop
from specrl.training.trace_files import pack, unpack

if TYPE_CHECKING:
    from specrl.training.logger import TrainingLogger

HOLDOUT_FRACTION = 0.125  # of requests for a gate, unless the config has one
KIND = "online"  # of checkpoints


@dataclass(slots=True)
class Run:
    """A training run: its loop and the rest of its state."""

    loop: OnlineLoop
    target: str  # its name
    draft: Draft  # the initial draft
    learner: OnlineLearner | None
    seconds_before: float = 0.0  # of the runs that this one continues
    log: list[dict[str, object]] = field(default_factory=list)  # the rows of log.csv

    @classmethod
    def start(
        cls,
        engine: Engine,
        model: Target,
        draft: Draft,
        workload: Workload,
        serving: ServingConfig,
        *,
        target: str,
        learner: LearnerConfig | None,
        seed: int,
        resume: Path | None = None,
    ) -> Run:
        """Build a run of `engine`, which serves `draft` on `model`, with all of its state from the checkpoint `resume`.

        The draft does not change if `learner` is None. `target` is the name of the model.

        Raises:
            ValueError: an argument out of range, or a checkpoint of another run.
        """
        chooser, baseline = serving.make_chooser(seed), PlainCost()
        gated = serving.deploy == "better"
        online_learner = None
        if learner is not None:
            if gated and not learner.holdout_fraction:
                learner = replace(learner, holdout_fraction=HOLDOUT_FRACTION)
            online_learner = OnlineLearner(draft, model.embedding, learner, seed=seed, clock=engine.clock, gated=gated)
        state: dict[str, Any] = {}
        if resume is not None:
            checkpoint = load_checkpoint(resume, KIND)
            state = checkpoint.state
            if state["target"] != target:
                raise ValueError(f"the checkpoint's target must be resumed, {state['target']!r}, but got {target!r}")
            if online_learner is not None:
                _restore_learner(online_learner, checkpoint, serving)
            chooser.load_state_dict(state["chooser"])
            baseline.load_state_dict(state["baseline"])
        deploy = None
        if online_learner is not None and gated:
            steps = max(1, *(plan.num_steps for plan in chooser.plans))
            gate = Gate(draft.config, model.embedding, num_steps=steps, min_gain=0.0, seed=seed)
            deploy = DeployIfBetter(engine, online_learner, gate, chooser.plans, seed=seed)
            if state:
                deploy.load_state_dict(state["deploy"])
        loop = OnlineLoop(
            engine,
            workload,
            chooser,
            online_learner,
            parse_traffic(serving.batch_schedule),
            weight_sync_interval=serving.weight_sync_interval,
            seed=seed,
            baseline=baseline,
            deploy=deploy,
            state=state.get("loop"),
        )
        return cls(loop, target, draft, online_learner, state.get("seconds", 0.0), state.get("log", []))

    @property
    def learned(self) -> Draft:
        """The draft that serves now."""
        if self.loop.deploy is not None:
            return Draft(self.draft.config, self.loop.deploy.weights())
        return self.draft if self.learner is None else Draft(self.draft.config, self.learner.weights()[1])

    def save(self, directory: Path, *, seconds: float = 0.0, replay: bool = False) -> None:
        """Write directory/checkpoint, atomically, with the sequences to learn from if `replay` is set.

        The loop's session must have ended. `seconds` include the runs that this one continues.
        """
        loop, learner = self.loop, self.learner
        sequences = [] if learner is None or not replay else [*learner.replay, *learner.held_out]
        tensors, notes = pack(sequences)
        state = {
            "target": self.target,
            "seconds": seconds,
            "learner": None if learner is None else learner.state_dict(),
            "deploy": None if loop.deploy is None else loop.deploy.state_dict(),
            "chooser": loop.chooser.state_dict(),
            "baseline": loop.baseline.state_dict(),
            "loop": loop.state_dict(),
            "replay": notes,
            "held_out": len(learner.held_out) if learner is not None and replay else 0,
            "log": self.log,
        }
        save_checkpoint(directory / "checkpoint", KIND, Checkpoint(state, self.draft.target_ids, tensors))

    def table(self) -> dict[int, Plan]:
        """Return the best plan now at every batch size that was served, where the chooser knows one."""
        best = {batch: self.loop.chooser.best(batch) for batch in sorted(self.loop.recent)}
        return {batch: plan for batch, plan in best.items() if plan is not None}

    def write_results(self, directory: OutputDir) -> None:
        """Write the draft, the plan for each batch size, the learner's settings, and the environment."""
        config = None if self.learner is None else self.learner.config
        write_results(directory, self.learned, self.table(), self.loop.requests, config)


def write_results(
    directory: OutputDir, draft: Draft, table: Mapping[int, Plan], requests: int, config: LearnerConfig | None
) -> None:
    """Write the results of online training: draft/, plans.json, environment.json, and learner.json if it learned."""
    draft.save(directory.path / "draft")
    directory.write_json("plans.json", {"plans": table, "requests": requests})
    directory.write_json("environment.json", environment())
    if config is not None:
        directory.write_json("learner.json", asdict(config))


def serve(logger: TrainingLogger, serving: ServingConfig, checkpoint: CheckpointConfig) -> None:
    """Serve the run of a logger until `serving.requests` or `serving.max_seconds`, with a checkpoint at the end.

    The requests include those before a resumption, the seconds do not. They are checked after each round.
    """
    run, loop, clock = logger.run, logger.run.loop, logger.run.loop.engine.clock
    deadline = clock.now() + (math.inf if serving.max_seconds is None else serving.max_seconds)
    saved, done = loop.requests, loop.requests >= serving.requests
    while not done:
        loop.step()
        done = loop.requests >= serving.requests or clock.now() >= deadline
        if done or loop.requests - saved >= checkpoint.interval:
            saved = loop.requests
            loop.end_session()
            logger.log()
            run.save(logger.directory.path, seconds=logger.seconds, replay=checkpoint.keep_replay_buffer)
            if not done:
                loop.start_session()
        else:
            logger.log_if_due()
    logger.finish()


def _restore_learner(learner: OnlineLearner, checkpoint: Checkpoint, serving: ServingConfig) -> None:
    state = checkpoint.state
    if state["learner"] is None:
        raise ValueError("the checkpoint was made without learning, so --learn must be false, but got true")
    deploy = "always" if state["deploy"] is None else "better"
    require(serving.deploy == deploy, "serving.deploy", f"the checkpoint's, {deploy!r}", serving.deploy)
    learner.load_state_dict(state["learner"])
    sequences = [unpack(i, checkpoint.replay, note) for i, note in enumerate(state["replay"])]
    first_held_out = len(sequences) - state["held_out"]
    learner.load_sequences(sequences[:first_held_out], sequences[first_held_out:])
