"""`specrl train`: learn a draft and a plan per batch size on live traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from specrl.agents.adaptive import AdaptiveChooser
from specrl.agents.draft_learner import LearnerConfig, OnlineLearner
from specrl.agents.fixed import FixedPlan, PlanTable
from specrl.apps.bench import target_directory
from specrl.apps.checkpoint import load_checkpoint, save_checkpoint
from specrl.apps.loop import OnlineLoop
from specrl.apps.output import OutputDir, environment, show
from specrl.baseline import PlainCost
from specrl.engines.base import Workload
from specrl.engines.local import LocalEngine
from specrl.models.draft import Draft, load_draft, new_draft
from specrl.models.target import Target, load_target
from specrl.plan import Plan, parse_plans
from specrl.traffic import parse_traffic
from specrl.workload import load_tokenizer, load_workload

_RUNNING = ("seconds", "serve_s", "learn_s")  # columns of the log that a resumed run adds to
DRAFT_MLP = 256  # width of the MLP of a draft made anew for an embedded target


def train(
    *,
    target: str = "embedded",
    draft: Path | None = None,
    plans: str = "0,1/1/2,2/1/3,3/1/4,4/1/5,5/1/6",
    chooser: str = "adaptive",
    traffic: str = "16x96,4x24,1x24",
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    requests: int = 2000,
    sync_every: int = 16,
    learn: bool = True,
    learner: LearnerConfig = LearnerConfig(),  # noqa: B008  (frozen)
    checkpoint_every: int = 256,
    resume: bool = False,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Serve live traffic, learn the draft from it, and choose each round's plan.

    Writes draft/ (an EAGLE3 checkpoint), plans.json (the plan per batch size), log.csv and checkpoint/, from which
    --resume goes on after any interruption.

    Args:
        target: checkpoint directory, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: EAGLE3 draft directory to start from; by default random initialisation.
        plans: that the chooser may choose, separated by commas.
        chooser: 'adaptive', or one plan for every round, such as 3/1/4.
        traffic: batch sizes over time: batch_size x rounds, repeated.
        workload: 'stdlib', or a .txt, .jsonl or directory of prompts.
        prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens generated per request.
        temperature: of sampling; 0 is greedy.
        requests: to serve, those before a resumption included.
        sync_every: finished requests between two updates of the serving draft.
        learn: whether the draft learns.
        learner: how it learns.
        checkpoint_every: requests between two checkpoints.
        resume: go on from the checkpoint in output_dir; --config <output_dir>/config.yaml repeats the options.
        seed: of everything random.
        output_dir: where results go; by default runs/train-<time>.

    Raises:
        ValueError: an argument out of range, or nothing to resume.

    Example:
        specrl train --requests 500 --output_dir runs/day0
        specrl train --config runs/day0/config.yaml --resume --requests 1000
        specrl train --learner.learning_rate 2e-3 --learner.passes 5 --chooser 4/1/5 --traffic 8
    """
    if requests < 1 or checkpoint_every < 1:
        raise ValueError(f"requests and checkpoint_every must be at least 1, but got {requests} and {checkpoint_every}")
    directory = OutputDir(output_dir or Path("runs/train"))
    model = load_target(target)
    source = load_workload(
        workload,
        load_tokenizer(target_directory(target)),
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        split="train" if workload == "stdlib" else "all",
    )
    first = load_draft(draft) if draft is not None else fresh_draft(model, target, seed)
    run = Run.start(
        model,
        first,
        source,
        target=target,
        plans=plans,
        chooser=chooser,
        traffic=traffic,
        learner=learner if learn else None,
        sync_every=sync_every,
        max_context=prompt_tokens + max_new_tokens,
        seed=seed,
        resume=directory.path / "checkpoint" if resume else None,
    )
    report = Reporter(run, directory)
    saved = run.served
    while run.served < requests:
        run.loop.step()
        report.maybe()
        if run.served - saved >= checkpoint_every:
            saved = run.served
            run.save(directory.path)
    report.last()
    run.save(directory.path)
    run.write_results(directory)
    show(f"written: {directory.path}")


def fresh_draft(model: Target, target: str, seed: int) -> Draft:
    """A draft from random initialisation, narrow for an embedded target."""
    return new_draft(model, intermediate_size=DRAFT_MLP if target.startswith("embedded") else None, seed=seed)


@dataclass(slots=True)
class Run:
    """A training run: its loop, and what it must remember to go on."""

    loop: OnlineLoop
    engine: LocalEngine
    target: str
    draft: Draft
    learner: OnlineLearner | None
    chooser: AdaptiveChooser | PlanTable
    served_before: int = 0
    log: list[dict[str, object]] = field(default_factory=list)  # a row for every line reported, earlier runs' too

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
        resume: Path | None = None,
    ) -> Run:
        """Put the parts together, from a checkpoint where one is named."""
        parsed = parse_plans(plans)
        picks = AdaptiveChooser(parsed, seed=seed) if chooser == "adaptive" else FixedPlan(_fixed(chooser))
        learns = None if learner is None else OnlineLearner(draft, model.embedding, learner, seed=seed)
        served, log, baseline = 0, [], PlainCost()
        if resume is not None:
            tensors, state = load_checkpoint(resume)
            if state["target"] != target:
                raise ValueError(f"the checkpoint's target must be resumed, {state['target']!r}, but got {target!r}")
            if learns is not None and not tensors:
                raise ValueError("the checkpoint was made without learning, so none can go on; use --learn false")
            if learns is not None:
                learns.load_state(tensors, state["learner"])
            picks.load_state_dict(state["chooser"])
            baseline.load_state_dict(state["baseline"])
            served, log = int(state["served"]), state["log"]
        engine = LocalEngine(model, draft, max_context=max_context)
        if learns is not None and learns.updates:
            version, weights = learns.weights()
            engine.load_draft(weights, version=version)
        loop = OnlineLoop(
            engine,
            workload,
            picks,
            learns,
            parse_traffic(traffic),
            sync_every=sync_every,
            seed=seed + served,
            baseline=baseline,
        )
        return cls(loop, engine, target, draft, learns, picks, served, log)

    @property
    def served(self) -> int:
        """Requests finished, those before a resumption included."""
        return self.served_before + self.loop.requests

    @property
    def learned(self) -> Draft:
        """The draft that serves now."""
        if self.learner is None:
            return self.draft
        return Draft(self.draft.config, self.learner.weights()[1])

    def save(self, directory: Path) -> None:
        """Write the checkpoint, atomically: all that `start` needs to go on, but the replayed traffic."""
        tensors, numbers = ({}, {}) if self.learner is None else self.learner.state()
        state = {
            "target": self.target,
            "served": self.served,
            "learner": numbers,
            "chooser": self.chooser.state_dict(),
            "baseline": self.loop.baseline.state_dict(),
            "log": self.log,
        }
        save_checkpoint(directory / "checkpoint", tensors, state)

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


class Reporter:
    """A line every few seconds, for people, and log.csv, for programs.

    Args:
        run: that is reported on.
        directory: for log.csv.
        every_s: seconds between two lines.
        print_line: where lines go.
    """

    def __init__(
        self, run: Run, directory: OutputDir, every_s: float = 10.0, print_line: Callable[[str], None] = show
    ) -> None:
        self.run, self.directory, self.every_s, self.print = run, directory, every_s, print_line
        self._clock = run.engine.clock
        self._began = self._last = self._clock.now()
        self._before = {key: float(run.log[-1][key]) if run.log else 0.0 for key in _RUNNING}  # type: ignore[arg-type]

    def maybe(self) -> None:
        """Report if it is time to."""
        if self._clock.now() - self._last >= self.every_s:
            self.line()

    def last(self) -> None:
        """Report at the end, unless it was done a moment ago."""
        if not self.run.log or self._clock.now() - self._last > 0.2 * self.every_s:
            self.line()

    def line(self) -> None:
        """Report now."""
        run, loop = self.run, self.run.loop
        self._last = self._clock.now()
        row: dict[str, object] = {
            "seconds": round(self._before["seconds"] + self._last - self._began, 1),
            "requests": run.served,
            "draft_version": run.engine.draft_version,
            "serve_s": round(self._before["serve_s"] + loop.serve_s, 2),
            "learn_s": round(self._before["learn_s"] + loop.learn_s, 2),
            "alpha": loop.metrics.get("alpha_1", float("nan")),
            "loss": loop.metrics.get("loss", float("nan")),
        }
        parts = []
        for batch, tally in sorted(loop.tallies.items()):
            plan = run.chooser.best(batch)
            row |= {
                f"plan_{batch}": str(plan),
                f"speedup_{batch}": tally.speedup,
                f"accept_length_{batch}": tally.accept_length,
            }
            parts.append(f"batch {batch}: {plan} {tally.speedup:.2f}x, {tally.accept_length:.2f} tokens")
        run.log.append(row)
        self.directory.write_csv("log.csv", run.log)
        alpha = row["alpha"] if np.isfinite(row["alpha"]) else 0.0  # type: ignore[call-overload]
        self.print(f"{row['seconds']:5.0f} s  {run.served:5d} requests  alpha {alpha:.2f}  |  " + "  |  ".join(parts))
