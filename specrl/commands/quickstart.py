"""`specrl quickstart`: from a random draft to a measured speedup, on the embedded target."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from specrl.agents.draft.learner import LearnerConfig
from specrl.commands.train import fresh_draft
from specrl.core.clock import WallClock
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.io.output import OutputDir, environment, hint, show, table, to_json
from specrl.measure.local_arms import PlainSetting, fastest_plain, measure_plans
from specrl.measure.machine import torch_threads
from specrl.measure.paired import PLAIN, Measured, rows
from specrl.measure.tables import block_rows, shown
from specrl.models.draft import Draft
from specrl.models.target import Target, load_target
from specrl.reports.plots import plot_learning, plot_speedups
from specrl.training.logger import Reporter
from specrl.training.loop import OnlineLoop
from specrl.training.run import Run
from specrl.workloads.stream import open_stream
from specrl.workloads.text import Split

TARGET, TEMPERATURE, PROMPT, NEW = "embedded", 0.7, 64, 128
PLANS = "0,1/1/2,2/1/3,3/1/4,4/1/5,5/1/6"
TRAFFIC = {1: 40, 4: 40, 16: 120}  # batch size: rounds at it before the traffic moves on
PRECISION = {1: 0.025, 4: 0.04, 16: 0.04}
UNLEARNED = "no learning"


def quickstart(
    *,
    train_seconds: float = 165.0,
    measure_seconds: float = 145.0,
    idle_seconds: float = 8.0,
    seed: int = 0,
    output_dir: Path | None = None,
) -> dict[str, object]:
    """Train an EAGLE3 draft from random initialisation on live traffic, and measure what it gains.

    Serves continuations of the Python standard library's sources with the embedded target at temperature 0.7, at
    batch sizes 1, 4 and 16 in turn. While it serves, the draft learns from the traffic, and a chooser learns which
    plan (how many tokens to draft) pays at each batch size. Then every batch size is measured against plain decoding
    in the fastest setting of this machine, interleaved, on prompts held out from training. Under 6 minutes on two
    cores; let nothing else run meanwhile.

    Args:
        train_seconds: of serving and learning.
        measure_seconds: at most, of the final measurement.
        idle_seconds: of the same with learning switched off, for comparison.
        seed: of prompts, initialisation and sampling.
        output_dir: where draft/, plans.json, rounds.csv and the plots go; by default runs/quickstart-<time>.

    Raises:
        ValueError: a duration that is not positive.

    Example:
        specrl quickstart
        specrl quickstart --train_seconds 600
    """
    durations = train_seconds, measure_seconds, idle_seconds
    if not min(durations) > 0:
        raise ValueError(f"durations must be above 0 s, but got {', '.join(map(str, durations))}")
    directory = OutputDir(output_dir or Path("runs/quickstart"))
    clock = WallClock()
    began = clock.now()
    target = load_target(TARGET)
    workload, held_out = (_workload(split) for split in ("train", "held_out"))
    fastest = {batch: fastest_plain(TARGET, held_out, batch) for batch in TRAFFIC}
    for batch, setting in fastest.items():
        tps = batch / setting.seconds
        show(
            f"plain decoding at batch {batch}: fastest in {setting.dtype}, {setting.threads} threads ({tps:,.0f} tok/s)"
        )
    threads = fastest[max(TRAFFIC)].threads
    draft = fresh_draft(target, TARGET, seed)
    with torch_threads(threads):
        idle = _run(target, draft, workload, None, seed)
        _serve(idle, directory, seconds=idle_seconds, title="With learning switched off:")
        learning = _run(target, draft, workload, LearnerConfig(), seed)
        raw = _RawRounds(learning.loop)
        _serve(learning, directory, seconds=train_seconds, title="Learning from live traffic:")
    chosen, unlearned = learning.table(), idle.table()
    show(f"Measuring on held-out prompts, temperature {TEMPERATURE}, plain and speculative in turns:")
    results = _measure(target, learning.learned, draft, chosen, unlearned, held_out, fastest, measure_seconds, seed)
    summary = _summary(results, learning, directory, clock.now() - began)
    _write(directory, learning, results, raw, summary)
    print(json.dumps(json.loads(to_json(summary))))
    return summary


def _workload(split: Split) -> Workload:
    return open_stream(
        "stdlib",
        TARGET,
        prompt_tokens=PROMPT,
        max_new_tokens=NEW,
        temperature=TEMPERATURE,
        ignore_eos=True,
        split=split,
    )


def _run(target: Target, draft: Draft, workload: Workload, learner: LearnerConfig | None, seed: int) -> Run:
    return Run.start(
        target,
        draft,
        workload,
        target=TARGET,
        plans=PLANS,
        chooser="adaptive",
        traffic=",".join(f"{batch}x{rounds}" for batch, rounds in TRAFFIC.items()),
        learner=learner,
        sync_every=16,
        max_context=PROMPT + NEW,
        seed=seed,
    )


def _serve(run: Run, directory: OutputDir, *, seconds: float, title: str) -> None:
    """Serve for a while, with a line now and then."""
    show(title)
    report = Reporter(run, directory, every_s=min(12.0, seconds / 2))
    clock = run.engine.clock
    began = clock.now()
    while clock.now() - began < seconds:
        run.loop.step()
        report.maybe()
    report.last()
    run.loop.close()


def _measure(
    target: Target,
    learned: Draft,
    untrained: Draft,
    chosen: dict[int, Plan],
    unlearned: dict[int, Plan],
    workload: Workload,
    fastest: dict[int, PlainSetting],
    seconds: float,
    seed: int,
) -> dict[int, list[Measured]]:
    """Plain, the learnt draft with its chosen plan, and at batch 1 what the same loop came to without learning."""
    time = {1: 0.6, 4: 0.2, 16: 0.2}
    results = {}
    for batch, plan in chosen.items():
        drafts = {str(plan): (learned, plan)}
        if batch == 1:
            drafts[UNLEARNED] = (untrained, unlearned[batch])
        results[batch] = measure_plans(
            target,
            drafts,
            workload,
            fastest[batch],
            target=TARGET,
            batch_size=batch,
            max_context=PROMPT + NEW,
            block_tokens=NEW,
            precision=PRECISION[batch],
            seconds=seconds * time[batch],
            null=False,
            shares={str(plan): 2.0, UNLEARNED: 0.25},
            seed=seed,
        )
    return results


def _summary(results: dict[int, list[Measured]], run: Run, directory: OutputDir, wall_s: float) -> dict[str, object]:
    sizes = {}
    for batch, (plain, learned, *rest) in results.items():
        assert learned.speedup is not None
        sizes[str(batch)] = {
            "plan": learned.plan,
            "plain_tps": round(plain.total_tps, 1),
            "spec_tps": round(learned.total_tps, 1),
            "speedup": round(learned.speedup.value, 4),
            "ci95": [round(learned.speedup.low, 4), round(learned.speedup.high, 4)],
            "accept_length": round(learned.accept_length, 3),
        }
        for other in rest:
            assert other.speedup is not None
            sizes[str(batch)]["without_learning"] = {
                "plan": other.plan,
                "speedup": round(other.speedup.value, 4),
                "ci95": [round(other.speedup.low, 4), round(other.speedup.high, 4)],
                "accept_length": round(other.accept_length, 3),
            }
    return {
        "batch_sizes": sizes,
        "requests_served": run.served,
        "train_s": run.log[-1]["seconds"],
        "wall_s": round(wall_s, 1),
        "output_dir": str(directory.path),
    }


class _RawRounds:
    """Every round of the loop, for rounds.csv."""

    def __init__(self, loop: OnlineLoop) -> None:
        self.rows: list[dict[str, object]] = []
        loop.on_round = self._add

    def _add(self, done, plain_s: float) -> None:  # type: ignore[no-untyped-def]
        self.rows.append(
            {
                "batch_size": done.batch_size,
                "plan": str(done.plan),
                "context": round(float(done.context_lengths.mean()), 1),
                "tokens": int(done.tokens.sum()),
                "correct_drafts": int(done.correct_drafts.sum()),
                "draft_s": round(done.draft_s, 7),
                "verify_s": round(done.verify_s, 7),
                "other_s": round(done.other_s, 7),
                "prefill_s": round(done.prefill_s, 7),
                "plain_s": round(plain_s, 7),
                "draft_version": done.draft_version,
            }
        )


def _write(
    directory: OutputDir,
    run: Run,
    results: dict[int, list[Measured]],
    raw: _RawRounds,
    summary: dict[str, object],
) -> None:
    run.write_results(directory)
    everything = [row for measured in results.values() for row in rows(measured)]
    directory.write_csv("measured.csv", everything)
    directory.write_csv("rounds.csv", raw.rows)
    directory.write_json("summary.json", {**summary, "environment": environment()})
    flat = [m for measured in results.values() for m in measured]
    directory.write_json("measured.json", [{k: v for k, v in asdict(m).items() if k != "sums"} for m in flat])
    directory.write_csv("blocks.csv", block_rows({None: flat}))
    plot_learning(run.log, sorted(TRAFFIC), directory.path / "learning.png")
    plot_speedups(flat, directory.path / "speedup.png")
    shown_rows = [
        {
            "batch": row["batch_size"],
            "decoding": row["plan"],
            "tokens/s": m.total_tps,
            "speedup [95 %]": shown(row) or "–",
            "accept length": m.accept_length if m.name != PLAIN else None,
        }
        for measured in results.values()
        for m, row in zip(measured, rows(measured), strict=True)
    ]
    show(table(shown_rows, title=f"Measured on held-out prompts at temperature {TEMPERATURE}"))
    show(f"draft, plans, plots and raw rounds: {directory.path}")
    show(hint(directory.path))
