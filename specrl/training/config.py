"""Settings of online training, beside those that all commands share (`specrl.config`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import FixedPlan
from specrl.core.batch_schedule import parse_traffic
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser
from specrl.core.plan import Plan, parse_plans


@dataclass(frozen=True)
class ServingConfig:
    """How requests are served while the draft learns.

    Args:
        plans: num_steps/topk/num_draft_tokens, to choose from. One is chosen for each round; 0 drafts nothing.
        chooser: 'adaptive', or one plan for every round, such as 3/1/4.
        batch_schedule: batch sizes over time, each x rounds, repeated.
        requests: number of requests to serve. A resumed run counts those before it too.
        max_seconds: stop at a checkpoint after this many seconds; by default never. A resumed run counts from 0.
        weight_sync_interval: finished requests between two updates of the serving draft.
        deploy: 'always': the newest weights serve; 'better': only tested ones. They are tested on held-out sequences,
            then in a trial on the traffic. A checkpoint ends a trial, so checkpoints must be further apart than a
            trial takes: 128 to 512 rounds.

    Raises:
        ValueError: a setting out of range.
    """

    plans: str = "0,1/1/2,2/1/3,3/1/4,4/1/5,5/1/6"
    chooser: str = "adaptive"
    batch_schedule: str = "16x96,4x24,1x24"
    requests: int = 2000
    max_seconds: float | None = None
    weight_sync_interval: int = 16
    deploy: Literal["always", "better"] = "always"

    def __post_init__(self) -> None:
        parse_plans(self.plans)
        parse_traffic(self.batch_schedule)
        for name in ("requests", "weight_sync_interval"):
            require(getattr(self, name) >= 1, f"serving.{name}", "at least 1", getattr(self, name))
        in_range = self.max_seconds is None or 0 < self.max_seconds < math.inf
        require(in_range, "serving.max_seconds", "a finite number above 0", self.max_seconds)
        require(self.deploy in ("always", "better"), "serving.deploy", "'always' or 'better'", self.deploy)
        try:
            self.make_chooser(seed=0)
        except ValueError as error:
            raise ValueError(
                f"serving.chooser must be 'adaptive' or one plan, but got {self.chooser!r}: {error}"
            ) from error

    def make_chooser(self, seed: int) -> PlanChooser:
        """Make the plan chooser."""
        if self.chooser == "adaptive":
            return AdaptiveChooser(parse_plans(self.plans), seed=seed)
        return FixedPlan(Plan.parse(self.chooser))

    def all_plans(self) -> tuple[Plan, ...]:
        """Return all plans that an engine must be able to run."""
        return tuple(dict.fromkeys((*parse_plans(self.plans), *self.make_chooser(seed=0).plans)))


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from.

    Args:
        interval: requests between two checkpoints.
        keep_replay_buffer: save the sequences that the draft learns from, at least 2 bytes x tokens x vocabulary each.
            Without them a resumed run collects new ones.

    Raises:
        ValueError: an interval below 1.
    """

    interval: int = 256
    keep_replay_buffer: bool = False

    def __post_init__(self) -> None:
        require(self.interval >= 1, "checkpoint.interval", "at least 1 request", self.interval)


@dataclass(frozen=True)
class LogConfig:
    """Logs beside log.csv.

    Args:
        tensorboard: write tensorboard/.
        wandb: project of Weights & Biases; WANDB_MODE=offline writes to this machine only.
    """

    tensorboard: bool = True
    wandb: str | None = None
