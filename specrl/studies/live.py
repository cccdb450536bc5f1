"""A study's live trial: online training as `specrl train` does it, then a paired measurement of the result."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from specrl.agents.draft.config import LearnerConfig
from specrl.commands.train import VOCABULARY_REQUESTS, fresh_draft, serve
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.measure.local_arms import PlainSetting, fastest_plain
from specrl.measure.paired import PLAIN, Lane, Setting, start, take_turns
from specrl.models.draft import Draft, load_draft
from specrl.models.target import Target, load_target
from specrl.studies.config import LEVELS, Budget, Study
from specrl.studies.trial import Measured, NotReached, OnBlock
from specrl.training.logger import Reporter
from specrl.training.run import Run
from specrl.training.vocabulary import served_vocabulary
from specrl.workloads.stream import open_stream
from specrl.workloads.text import Split

MIN_ROUNDS = 20  # at every batch size before a level counts as reached


@dataclass(frozen=True)
class LiveTrial:
    """Parameters of a live trial: options of `specrl train`.

    Args:
        learner: how the draft learns.
    """

    OBJECTIVES: ClassVar[Mapping[str, Literal["maximize", "minimize"]]] = {
        "speedup": "maximize",
        "accept_length": "maximize",
        "requests_to_accept_length": "minimize",
        "seconds_to_speedup": "minimize",
        "learner_seconds": "minimize",
        "peak_memory_mib": "minimize",
        "pause_ms": "minimize",
    }
    TIMED: ClassVar[bool] = True

    target: str = "embedded"
    draft: Path | None = None
    draft_vocab_size: int | None = None
    draft_intermediate_size: int | None = None
    plans: str = "0,1/1/2,2/1/3,3/1/4,4/1/5,5/1/6"
    chooser: str = "adaptive"
    traffic: str = "16x96,4x24,1x24"
    workload: str = "stdlib"
    prompt_tokens: int = 64
    max_new_tokens: int = 128
    temperature: float = 0.7
    sync_every: int = 16
    update: Literal["always", "better"] = "always"
    learn: bool = True
    learner: LearnerConfig = LearnerConfig()  # noqa: RUF009  (frozen)
    seed: int = 0

    def measure(self, study: Study, out: OutputDir, on_block: OnBlock | None = None) -> Measured:
        """Serve and learn, then measure the learned draft and plans against plain decoding.

        Args:
            study: its objectives, levels and budget are used.
            out: where the results of the training run are written.
            on_block: called with the number and the value of every block of the first objective.

        Raises:
            NotReached: the run did not reach a level that an objective waits for.
        """
        model, prompts = load_target(self.target), self._prompts("train")
        draft = self._draft(model, prompts)
        with_memory = "peak_memory_mib" in (*study.objectives, *study.constraints)
        if with_memory:
            reset_peak_memory()
        run = Run.start(
            model,
            draft,
            prompts,
            target=self.target,
            plans=self.plans,
            chooser=self.chooser,
            traffic=self.traffic,
            learner=self.learner if self.learn else None,
            sync_every=self.sync_every,
            max_context=self.prompt_tokens + self.max_new_tokens,
            seed=self.seed,
            update=self.update,
        )
        watch = _Watch(run, study.levels)
        requests = study.budget.requests
        serve(run, Reporter(run, out, print_line=lambda line: None), out, requests=requests, checkpoint_every=requests)
        watch.end_pause()
        run.write_results(out)
        found = Measured({"learner_seconds": run.loop.learn_s, "pause_ms": 1e3 * watch.pause_s, **watch.reached})
        if with_memory:
            found.values["peak_memory_mib"] = peak_memory_mib()
        for name in study.objectives:
            if name in LEVELS.values() and name not in watch.reached:
                raise NotReached(f"{name}: not within {requests} requests")
        logs, lengths = list[float](), list[float]()
        for batch in study.budget.batch_sizes:
            for log, length in self._blocks(run, model, batch, study.budget):
                logs.append(log)
                lengths.append(length)
                if on_block is not None and study.objectives[0] in ("speedup", "accept_length"):
                    on_block(len(logs) - 1, log if study.objectives[0] == "speedup" else length)
        found.add("speedup", logs)
        found.add("accept_length", lengths)
        return found
