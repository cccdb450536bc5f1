"""The target's draft, learnt online from random initialisation with the default learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_stages.sizes import PLANS, TEMPERATURE, Sizes
from specrl.agents.draft.learner import LearnerConfig
from specrl.core.batch_schedule import parse_traffic
from specrl.core.clock import Clock
from specrl.core.interfaces import Workload
from specrl.io.output import OutputDir
from specrl.models.draft import new_draft
from specrl.models.target import Target
from specrl.training.config import ServingConfig
from specrl.training.logger import Reporter
from specrl.training.run import Run
from specrl.workloads.stream import open_stream
from specrl.workloads.text import Split


def prompts(target: Path, sizes: Sizes, split: Split, new_tokens: int | None = None) -> Workload:
    """Windows of the standard library's sources, in the target's tokens; each generates `new_tokens`."""
    return open_stream(
        "stdlib",
        target,
        prompt_tokens=sizes.prompt_tokens,
        max_new_tokens=new_tokens or sizes.new_tokens,
        temperature=TEMPERATURE,
        ignore_eos=True,
        split=split,
    )


def learn(
    model: Target,
    target: Path,
    sizes: Sizes,
    directory: OutputDir,
    clock: Clock,
    deadline: float,
    learner_device: str | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Serve and learn in turns until the deadline; the run, and what it came to.

    All batch sizes are served and the learner has its turn once, however late it is.
    """
    run = Run.start(
        model,
        new_draft(model, seed=0),
        prompts(target, sizes, "train"),
        ServingConfig(PLANS, batch_schedule=sizes.traffic),
        target=str(target),
        learner=LearnerConfig(device=learner_device),
        max_context=sizes.prompt_tokens + sizes.new_tokens,
        seed=0,
    )
    loop, learner, least = run.loop, run.learner, sum(phase.rounds for phase in parse_traffic(sizes.traffic))
    assert learner is not None
    report = Reporter(run, directory, every_s=max(1.0, (deadline - clock.now()) / 8))
    while loop.rounds < least or not learner.updates or clock.now() < deadline:
        loop.step()
        report.maybe()
    report.last()
    loop.close()
    served = max(1, loop.requests)
    return run, {
        "learner_device": str(learner.device),
        "requests": loop.requests,
        "rounds": loop.rounds,
        "updates": learner.updates,
        "serving_s": loop.serve_s,
        "learning_s": loop.learn_s,
        "serving_s_per_request": loop.serve_s / served,
        "learning_s_per_request": loop.learn_s / served,
        "picks": {str(batch): str(plan) for batch, plan in run.table().items()},
        "live": {
            str(batch): {"rounds": stats.rounds, "speedup": stats.speedup, "accept_length": stats.accept_length}
            for batch, stats in sorted(loop.recent.items())
        },
        "course": run.log,
    }
