"""A study's live trial: online training as `specrl train` does it, then a paired measurement of the result."""

from __future__ import annotations

import ctypes
import gc
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from specrl.agents.draft.config import LearnerConfig
from specrl.config import DraftConfig, TargetConfig, WorkloadConfig
from specrl.core.plan import Plan
from specrl.core.rollout import Step
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.measure.arms import local_arms
from specrl.measure.paired import SessionPool, seconds_per_token, start_arms, take_turns
from specrl.measure.plain import PlainSetting, fastest_plain
from specrl.models.target import Target, default_device
from specrl.studies.goals import LEVELS, Measured, NotReached, OnBlock, measure_blocks
from specrl.training.config import CheckpointConfig, ServingConfig
from specrl.training.logger import TrainingLogger
from specrl.training.run import Run, serve
from specrl.training.vocabulary import make_draft

if TYPE_CHECKING:
    from specrl.studies.config import Study

MIN_ROUNDS = 20  # at every batch size before a level counts as reached


@dataclass(frozen=True)
class LiveTrial:
    """Parameters of a live trial: those options of `specrl train` that a study may search or fix."""

    OBJECTIVES: ClassVar[Mapping[str, Literal["maximize", "minimize"]]] = {
        "speedup": "maximize",
        "accept_length": "maximize",
        "requests_to_accept_length": "minimize",
        "seconds_to_speedup": "minimize",
        "learner_seconds": "minimize",
        "peak_memory_mib": "minimize",
        "pause_ms": "minimize",
    }

    target: TargetConfig = TargetConfig()
    draft: DraftConfig = DraftConfig()
    workload: WorkloadConfig = WorkloadConfig()
    serving: ServingConfig = ServingConfig()
    learn: bool = True
    learner: LearnerConfig = LearnerConfig()
    seed: int = 0

    @property
    def device(self) -> str | None:
        """The device that its rounds are timed on, as torch names it."""
        return default_device(self.target.device)

    def measure(self, study: Study, out: OutputDir, on_block: OnBlock | None = None) -> Measured:
        """Serve and learn, then measure the learned draft and plans against plain decoding.

        Args:
            study: its objectives, levels and budget are used.
            out: where the results of the training run are written.
            on_block: called with the number and the value of every block of the first objective.

        Raises:
            NotReached: the run did not reach a level that an objective waits for.
        """
        model, prompts = self.target.load(), self.workload.open(self.target.name, "train")
        serving, context = self.serving, self.workload.max_context
        draft = make_draft(self.draft, model, prompts, max_context=context, seed=self.seed)
        reads_memory = "peak_memory_mib" in (*study.objectives, *study.constraints)
        if reads_memory:
            reset_peak_memory()
        run = Run.start(
            LocalEngine(model, draft, max_context=context),
            model,
            draft,
            prompts,
            serving,
            target=self.target.name,
            learner=self.learner if self.learn else None,
            seed=self.seed,
        )
        watch, log = _Watch(run, study.levels), TrainingLogger(run, out, print_line=lambda line: None)
        serve(log, serving, CheckpointConfig(serving.requests))
        watch.end_pause()
        run.write_results(out)
        values = {"learner_seconds": run.loop.learn_s, "pause_ms": 1e3 * watch.pause_s, **watch.reached}
        if reads_memory:
            values["peak_memory_mib"] = peak_memory_mib()
        for name in study.objectives:
            if name in LEVELS.values() and name not in watch.reached:
                raise NotReached(f"{name}: not within {serving.requests} requests")
        measured = measure_blocks(self._blocks(study, run, model), study.objectives[0], on_block)
        measured.values = {**values, **measured.values}
        return measured

    def _blocks(self, study: Study, run: Run, model: Target) -> Iterator[dict[str, float]]:
        """Measure plain decoding and the result in turns on the same prompts."""
        budget, workload, table = study.budget, self.workload, run.table()
        prompts = workload.open(self.target.name, "held_out")
        for batch in budget.batch_sizes:
            nearest = min(table, key=lambda size: (abs(np.log(size / batch)), size))
            plan = table[nearest] if budget.plan is None else Plan.parse(budget.plan)
            fastest = _fastest(self.target, workload, batch)
            drafted = {"learned": (run.learned, plan)}
            sessions = SessionPool(prompts, batch_size=batch, seed=0)
            plain, learned = local_arms(self.target, model, drafted, fastest, max_context=workload.max_context)
            start_arms([plain, learned], sessions)
            try:
                for _ in range(budget.blocks):
                    take_turns([plain, learned], batch * workload.max_new_tokens)
                    plain_s, learned_s = (seconds_per_token(arm.blocks)[-1] for arm in (plain, learned))
                    yield {
                        "speedup": math.log(plain_s / learned_s),
                        "accept_length": learned.blocks[-1].accept_length,
                    }
            finally:
                sessions.close()


class _Watch:
    """Reads the longest pause and the levels reached from the rounds of a training run."""

    def __init__(self, run: Run, levels: Mapping[str, float]) -> None:
        self.loop, self.levels = run.loop, levels
        self.reached: dict[str, float] = {}
        self.pause_s = self._learned_s = 0.0
        self.loop.on_step.append(self._add)

    def end_pause(self) -> None:
        """Count the seconds of learning since the last round as one pause."""
        self.pause_s = max(self.pause_s, self.loop.learn_s - self._learned_s)
        self._learned_s = self.loop.learn_s

    def _add(self, step: Step) -> None:
        self.end_pause()
        loop, recent = self.loop, self.loop.recent.values()
        for name, level in self.levels.items():
            key = LEVELS[name]
            if key not in self.reached and min(stats.rounds for stats in recent) >= MIN_ROUNDS:
                if float(np.exp(np.mean(np.log([getattr(stats.total, name) for stats in recent])))) >= level:
                    self.reached[key] = loop.requests if name == "accept_length" else loop.serve_s + loop.learn_s


@cache
def _fastest(target: TargetConfig, workload: WorkloadConfig, batch: int) -> PlainSetting:
    """Return the fastest setting of plain decoding; every trial of a process is measured against the same one."""
    prompts = WorkloadConfig(workload.name, workload.prompt_tokens, 128, workload.temperature)
    return fastest_plain(target, prompts.open(target.name, "held_out"), batch)


def reset_peak_memory() -> None:
    """Reset the peak memory of the process and of its GPU; raise a ValueError if the system cannot."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # return memory that earlier trials freed
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError as error:
        raise ValueError(f"peak_memory_mib needs /proc/self/clear_refs, but got {error}; use Linux") from None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mib() -> float:
    """Peak resident memory of the process and peak allocated memory of its GPU since the reset, MiB."""
    peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert peak is not None
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return int(peak[1]) / 1024 + gpu
