"""A study's live trial: online training through the loop of `specrl train`, then a paired measurement."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from specrl.commands.train import VOCABULARY_REQUESTS, fresh_draft, serve
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.measure.local_arms import PlainSetting, fastest_plain
from specrl.measure.paired import PLAIN, Lane, Setting, start, take_turns
from specrl.models.draft import load_draft
from specrl.models.target import Target, load_target
from specrl.studies.config import LEVELS, Budget, Study
from specrl.studies.memory import peak_memory_mib, reset_peak_memory
from specrl.studies.objective import Measured, NotReached, OnBlock
from specrl.training.logger import Reporter
from specrl.training.run import Run
from specrl.training.vocabulary import served_vocabulary
from specrl.workloads.stream import open_stream
from specrl.workloads.text import Split

SETTLED = 20  # rounds at every batch size before a level counts as reached


class _Watch:
    """What the loop's rounds say of pauses and of levels reached."""

    def __init__(self, run: Run, levels: Mapping[str, float]) -> None:
        self.loop, self.levels = run.loop, levels
        self.reached: dict[str, float] = {}
        self.pause_s = self._learned_s = 0.0
        self.loop.on_round = self._add

    def pause(self) -> None:
        """Take the seconds of learning since the last round."""
        self.pause_s = max(self.pause_s, self.loop.learn_s - self._learned_s)
        self._learned_s = self.loop.learn_s

    def _add(self, done: Round, plain_s: float) -> None:
        self.pause()
        loop = self.loop
        for name, level in self.levels.items():
            key, tallies = LEVELS[name], loop.tallies.values()
            if key not in self.reached and min(tally.rounds for tally in tallies) >= SETTLED:
                if float(np.exp(np.mean(np.log([getattr(tally, name) for tally in tallies])))) >= level:
                    spent = float(loop.requests) if name == "accept_length" else loop.serve_s + loop.learn_s
                    self.reached[key] = spent


def train_and_measure(
    study: Study, options: Mapping[str, Any], out: OutputDir, on_block: OnBlock | None = None
) -> Measured:
    """Serve and learn as `specrl train` does, then measure what was learnt against plain decoding.

    Args:
        study: its objectives, levels and budget count.
        options: of `specrl train`, all of them.
        out: where the run's results go.
        on_block: told of every block of the first objective.

    Raises:
        NotReached: an objective waits for what did not come to pass.
    """
    target, seed = options["target"], options["seed"]
    context = options["prompt_tokens"] + options["max_new_tokens"]
    model = load_target(target)
    source = _prompts(options, "train")
    if options["draft"] is not None:
        draft = load_draft(options["draft"])
    else:
        size, ids = options["draft_vocab_size"], None
        if size is not None:
            found, _ = served_vocabulary(
                model, source, size, max_context=context, seed=seed, requests=VOCABULARY_REQUESTS
            )
            ids = found.ids
        draft = fresh_draft(model, target, seed, ids, options["draft_intermediate_size"])
    remember = "peak_memory_mib" in (*study.objectives, *study.constraints)
    if remember:
        reset_peak_memory()
    names = ("target", "plans", "chooser", "traffic", "sync_every", "seed", "update")
    run = Run.start(
        model,
        draft,
        source,
        learner=options["learner"] if options["learn"] else None,
        max_context=context,
        **{name: options[name] for name in names},
    )
    watch = _Watch(run, study.levels)
    requests = study.budget.requests
    report = Reporter(run, out, print_line=lambda line: None)
    serve(run, report, out, requests=requests, checkpoint_every=requests)
    watch.pause()
    run.write_results(out)
    result = Measured({"learner_seconds": run.loop.learn_s, "pause_ms": 1e3 * watch.pause_s, **watch.reached})
    if remember:
        result.values["peak_memory_mib"] = peak_memory_mib()
    for name in study.objectives:
        if name in LEVELS.values() and name not in watch.reached:
            raise NotReached(f"{name}: not within {requests} requests")
    _measure(study, run, model, options, result, on_block)
    return result


def _prompts(options: Mapping[str, Any], split: Split) -> Workload:
    return open_stream(
        options["workload"],
        options["target"],
        prompt_tokens=options["prompt_tokens"],
        max_new_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        ignore_eos=split == "held_out",
        split=split,
    )


def _measure(
    study: Study, run: Run, model: Target, options: Mapping[str, Any], result: Measured, on_block: OnBlock | None
) -> None:
    """Plain decoding and what was learnt in turns, the same blocks in every trial."""
    budget, table, held_out = study.budget, run.table(), _prompts(options, "held_out")
    context, target = options["prompt_tokens"] + options["max_new_tokens"], options["target"]
    learned = LocalEngine(model, run.learned, max_context=context)
    logs, lengths = list[float](), list[float]()
    for batch in budget.batch_sizes:
        plan = _plan(budget, table, batch)
        fastest = _fastest(target, options["workload"], options["prompt_tokens"], options["temperature"], batch)
        plain = LocalEngine(load_target(target, dtype=fastest.dtype), max_context=context)
        settings = [Setting(PLAIN, plain, None, fastest.threads), Setting("learned", learned, plan, fastest.threads)]
        lanes = start(settings, held_out, batch_size=batch, seed=0)
        try:
            for _ in range(budget.blocks):
                log, length = _block(lanes, batch * options["max_new_tokens"])
                logs.append(log)
                lengths.append(length)
                if on_block is not None and study.objectives[0] in ("speedup", "accept_length"):
                    on_block(len(logs) - 1, log if study.objectives[0] == "speedup" else length)
        finally:
            for lane in lanes:
                lane.session.close()
            plain.close()
    learned.close()
    result.add("speedup", logs)
    result.add("accept_length", lengths)


def _block(lanes: list[Lane], tokens: float) -> tuple[float, float]:
    """One block of each lane: log of the speedup, and the accept length."""
    seen = len(lanes[1].rounds)
    take_turns(list(lanes), tokens)
    (n0, s0), (n1, s1) = lanes[0].blocks[-1], lanes[1].blocks[-1]
    length = float(np.mean([done.accept_length for done in lanes[1].rounds[seen:]]))
    return float(np.log((s0 / n0) / (s1 / n1))), length


def _plan(budget: Budget, table: Mapping[int, Plan], batch: int) -> Plan:
    """The plan to measure: the budget's, or the one chosen for the nearest batch size that was served."""
    if budget.plan is not None:
        return Plan.parse(budget.plan)
    return table[min(table, key=lambda size: (abs(np.log(size / batch)), size))]


@cache
def _fastest(target: str, workload: str, prompt_tokens: int, temperature: float, batch: int) -> PlainSetting:
    """Once in a process: another choice between two trials would be another yardstick."""
    given = {"workload": workload, "target": target, "prompt_tokens": prompt_tokens, "temperature": temperature}
    return fastest_plain(target, _prompts({**given, "max_new_tokens": 128}, "held_out"), batch)
