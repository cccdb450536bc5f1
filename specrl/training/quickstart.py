"""The quickstart: train a draft from random initialisation while serving, and measure its speedup."""

from __future__ import annotations

from dataclasses import asdict

from specrl.agents.draft.config import LearnerConfig
from specrl.config import DraftConfig, MeasureConfig, TargetConfig, WorkloadConfig
from specrl.core.clock import WallClock
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.core.rollout import Step
from specrl.io.output import OutputDir, hint, show, table
from specrl.measure.arms import local_arms
from specrl.measure.machine import environment, torch_threads
from specrl.measure.paired import PLAIN, ArmResult, measure
from specrl.measure.plain import PlainSetting, fastest_plain
from specrl.measure.tables import block_rows, result_rows, shown
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.reports.figures import plot_learning, plot_speedups
from specrl.training.config import ServingConfig
from specrl.training.logger import Reporter
from specrl.training.loop import OnlineLoop
from specrl.training.run import Run
from specrl.workloads.text import Split

BATCH_SIZES = (1, 4, 16)
TARGET = TargetConfig("embedded", device="cpu")
WORKLOAD = WorkloadConfig("stdlib", prompt_tokens=64, max_new_tokens=128, temperature=0.7)
SERVING = ServingConfig(batch_schedule="1x40,4x40,16x120")
PRECISION = {1: 0.025, 4: 0.04, 16: 0.04}
UNLEARNED = "no learning"


def open_requests(split: Split) -> Workload:
    """The requests; all have the same number of new tokens."""
    return WORKLOAD.open(TARGET.name, split, ignore_eos=True)


def run_quickstart(
    directory: OutputDir, *, train_seconds: float, measure_seconds: float, idle_seconds: float, seed: int
) -> dict[str, object]:
    """Serve and learn, measure, and write the results (see `specrl quickstart`).

    Returns:
        The summary that is written to summary.json.
    """
    clock = WallClock()
    began = clock.now()
    target = TARGET.load()
    workload, held_out = open_requests("train"), open_requests("held_out")
    fastest = {batch: fastest_plain(TARGET, held_out, batch) for batch in BATCH_SIZES}
    for batch, setting in fastest.items():
        show(
            f"plain decoding at batch size {batch} is fastest in {setting.dtype} with {setting.threads} threads "
            f"({setting.tokens_per_s:,.0f} tok/s)"
        )
    draft = DraftConfig().load(target, seed=seed)
    with torch_threads(fastest[max(BATCH_SIZES)].threads):
        idle = _run(target, draft, workload, None, seed)
        _serve(idle, directory, seconds=idle_seconds, title="Without learning:")
        learning = _run(target, draft, workload, LearnerConfig(), seed)
        raw = _RawRounds(learning.loop)
        _serve(learning, directory, seconds=train_seconds, title="Learning from the requests:")
    chosen, unlearned = learning.table(), idle.table()
    show(f"Measuring on held-out prompts at temperature {WORKLOAD.temperature}, alternating with plain decoding:")
    results = _measure(target, learning.learned, draft, chosen, unlearned, held_out, fastest, measure_seconds, seed)
    summary = _summary(results, learning, directory, clock.now() - began)
    _write(directory, learning, results, raw, summary)
    return summary


def _run(target: Target, draft: Draft, workload: Workload, learner: LearnerConfig | None, seed: int) -> Run:
    return Run.start(
        target,
        draft,
        workload,
        SERVING,
        target=TARGET.name,
        learner=learner,
        max_context=WORKLOAD.max_context,
        seed=seed,
    )


def _serve(run: Run, directory: OutputDir, *, seconds: float, title: str) -> None:
    """Serve for some seconds, or longer until every batch size was served, and print a line now and then."""
    show(title)
    report = Reporter(run, directory, every_s=min(12.0, seconds / 2))
    clock = run.engine.clock
    began = clock.now()
    while clock.now() - began < seconds or len(run.table()) < len(BATCH_SIZES):
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
) -> dict[int, list[ArmResult]]:
    """Measure the learned draft with its chosen plans, and at batch size 1 the result without learning too."""
    time = {1: 0.6, 4: 0.2, 16: 0.2}
    results = {}
    for batch, plan in chosen.items():
        drafts = {str(plan): (learned, plan)}
        if batch == 1:
            drafts[UNLEARNED] = (untrained, unlearned[batch])
        arms = local_arms(
            TARGET,
            target,
            drafts,
            fastest[batch],
            max_context=WORKLOAD.max_context,
            block_sizes={str(plan): 2.0, UNLEARNED: 0.25},
        )
        results[batch] = measure(
            arms,
            workload,
            batch_size=batch,
            block_tokens=WORKLOAD.max_new_tokens,
            until=MeasureConfig(PRECISION[batch], seconds * time[batch]),
            seed=seed,
        )
    return results


def _summary(results: dict[int, list[ArmResult]], run: Run, directory: OutputDir, wall_s: float) -> dict[str, object]:
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
    """Collects every round of the loop, for rounds.csv."""

    def __init__(self, loop: OnlineLoop) -> None:
        self.rows: list[dict[str, object]] = []
        loop.on_step.append(self._add)

    def _add(self, step: Step) -> None:
        done = step.round
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
                "plain_s": round(step.plain.seconds, 7),
                "draft_version": done.draft_version,
            }
        )


def _write(
    directory: OutputDir,
    run: Run,
    results: dict[int, list[ArmResult]],
    raw: _RawRounds,
    summary: dict[str, object],
) -> None:
    run.write_results(directory)
    everything = [row for measured in results.values() for row in result_rows(measured)]
    directory.write_csv("measured.csv", everything)
    directory.write_csv("rounds.csv", raw.rows)
    directory.write_json("summary.json", {**summary, "environment": environment()})
    flat = [m for measured in results.values() for m in measured]
    raw_results = [{**asdict(m), "blocks": [(b.tokens, b.seconds) for b in m.blocks]} for m in flat]
    directory.write_json("measured.json", raw_results)
    directory.write_csv("blocks.csv", block_rows({None: flat}))
    plot_learning(run.log, directory.path / "learning.png")
    plot_speedups(everything, directory.path / "speedup.png")
    shown_rows = [
        {
            "batch": row["batch_size"],
            "decoding": row["plan"],
            "tokens/s": m.total_tps,
            "speedup [95 %]": shown(row) or "–",
            "accept length": m.accept_length if m.name != PLAIN else None,
        }
        for measured in results.values()
        for m, row in zip(measured, result_rows(measured), strict=True)
    ]
    show(table(shown_rows, title=f"Measured on held-out prompts at temperature {WORKLOAD.temperature}"))
    show(f"draft, plans, plots and raw rounds: {directory.path}")
    show(hint(directory.path))
