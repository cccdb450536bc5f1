"""The quickstart: train a draft from random initialisation while serving, and measure its speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain

from specrl.agents.draft.config import LearnerConfig
from specrl.config import DraftConfig, MeasureConfig, TargetConfig, WorkloadConfig
from specrl.core.clock import WallClock
from specrl.core.interfaces import Workload
from specrl.core.plan import PLAIN
from specrl.core.rollout import Step
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir, hint, show, table
from specrl.measure.arms import local_arms
from specrl.measure.machine import environment, torch_threads
from specrl.measure.paired import ArmResult, measure
from specrl.measure.plain import fastest_plain
from specrl.measure.tables import block_rows, result_rows, shown
from specrl.reports.figures import plot_learning, plot_speedups
from specrl.training.config import ServingConfig
from specrl.training.logger import TrainingLogger
from specrl.training.run import Run
from specrl.workloads.text import Split

BATCH_SIZES = (1, 4, 16)
TARGET = TargetConfig("embedded", device="cpu")
WORKLOAD = WorkloadConfig("stdlib", prompt_tokens=64, max_new_tokens=128, temperature=0.7)
SERVING = ServingConfig(batch_schedule="1x40,4x40,16x120")
PRECISION = {1: 0.025, 4: 0.04, 16: 0.04}
TIME_SHARE = {1: 0.6, 4: 0.2, 16: 0.2}  # of the seconds of the measurement
UNLEARNED = "no learning"


def open_requests(split: Split) -> Workload:
    """Open the requests; all have the same number of new tokens."""
    return WORKLOAD.open(TARGET.name, split, ignore_eos=True)


def run_quickstart(
    directory: OutputDir, *, train_seconds: float, measure_seconds: float, idle_seconds: float, seed: int
) -> dict[str, object]:
    """Serve and learn, measure, and write the results (see `specrl quickstart`); return the summary."""
    clock = WallClock()
    began = clock.now()
    target = TARGET.load()
    workload, held_out = open_requests("train"), open_requests("held_out")
    fastest = {batch: fastest_plain(TARGET, held_out, batch) for batch in BATCH_SIZES}
    for batch, setting in fastest.items():
        text = f"{setting.dtype} with {setting.threads} threads ({setting.tokens_per_s:,.0f} tok/s)"
        show(f"plain decoding at batch size {batch} is fastest in {text}")
    draft = DraftConfig().load(target, seed=seed)

    def start(learner: LearnerConfig | None) -> Run:
        engine = LocalEngine(target, draft, max_context=WORKLOAD.max_context)
        return Run.start(engine, target, draft, workload, SERVING, target=TARGET.name, learner=learner, seed=seed)

    rounds: list[dict[str, object]] = []
    with torch_threads(fastest[max(BATCH_SIZES)].threads):
        idle = start(None)
        _serve(idle, directory, seconds=idle_seconds, title="Without learning:")
        run = start(LearnerConfig())
        run.loop.on_step.append(lambda step: rounds.append(_round_row(step)))
        _serve(run, directory, seconds=train_seconds, title="Learning from the requests:")
    show(f"Measuring on held-out prompts at temperature {WORKLOAD.temperature}, alternating with plain decoding:")
    results = {}
    for batch, plan in run.table().items():
        drafts = {str(plan): (run.learned, plan)}
        if batch == 1:
            drafts[UNLEARNED] = (draft, idle.table()[batch])
        blocks = {str(plan): 2.0, UNLEARNED: 0.25}
        arms = local_arms(TARGET, target, drafts, fastest[batch], max_context=WORKLOAD.max_context, block_sizes=blocks)
        until = MeasureConfig(PRECISION[batch], measure_seconds * TIME_SHARE[batch])
        tokens = WORKLOAD.max_new_tokens
        results[batch] = measure(arms, held_out, batch_size=batch, block_tokens=tokens, until=until, seed=seed)
    summary = {
        "batch_sizes": {str(batch): _summary(*arm_results) for batch, arm_results in results.items()},
        "requests_served": run.loop.requests,
        "train_s": run.log[-1]["seconds"],
        "wall_s": round(clock.now() - began, 1),
        "output_dir": str(directory.path),
    }
    run.write_results(directory)
    directory.write_csv("rounds.csv", rounds)
    directory.write_json("summary.json", {**summary, "environment": environment()})
    _write_measured(directory, list(chain(*results.values())))
    plot_learning(run.log, directory.path / "learning.png")
    show(f"draft, plans, plots and raw rounds: {directory.path}")
    show(hint(directory.path))
    return summary


def _serve(run: Run, directory: OutputDir, *, seconds: float, title: str) -> None:
    """Serve for some seconds, or longer until every batch size was served, and log the run."""
    show(title)
    logger = TrainingLogger(run, directory, every_s=min(12.0, seconds / 2))
    clock = run.loop.engine.clock
    began = clock.now()
    while clock.now() - began < seconds or len(run.table()) < len(BATCH_SIZES):
        run.loop.step()
        logger.log_if_due()
    logger.finish()
    run.loop.close()


def _round_row(step: Step) -> dict[str, object]:
    """Return a row of rounds.csv."""
    done = step.round
    return {
        "batch_size": done.batch_size,
        "plan": str(done.plan),
        "context": round(float(done.context_lengths.mean()), 1),
        "tokens": int(done.tokens.sum()),
        "correct_drafts": int(done.correct_drafts.sum()),
        **{name: round(getattr(done, name), 7) for name in ("draft_s", "verify_s", "other_s", "prefill_s")},
        "plain_s": round(step.plain.seconds, 7),
        "draft_version": done.draft_version,
    }


def _summary(plain: ArmResult, learned: ArmResult, unlearned: ArmResult | None = None) -> dict[str, object]:
    """Return the results at one batch size, for summary.json."""
    assert learned.speedup is not None
    summary: dict[str, object] = {
        "plan": learned.plan,
        "plain_tps": round(plain.total_tps, 1),
        "spec_tps": round(learned.total_tps, 1),
        "speedup": round(learned.speedup.value, 4),
        "ci95": [round(learned.speedup.low, 4), round(learned.speedup.high, 4)],
        "accept_length": round(learned.accept_length, 3),
    }
    if unlearned is not None:
        summary["without_learning"] = _summary(plain, unlearned)
    return summary


def _write_measured(directory: OutputDir, results: Sequence[ArmResult]) -> None:
    """Write measured.csv, measured.json, blocks.csv and speedup.png, and print a table."""
    rows = result_rows(results)
    directory.write_csv("measured.csv", rows)
    measured = [{**asdict(m), "blocks": [(b.tokens, b.seconds) for b in m.blocks]} for m in results]
    directory.write_json("measured.json", measured)
    directory.write_csv("blocks.csv", block_rows({None: list(results)}))
    plot_speedups(rows, directory.path / "speedup.png")
    shown_rows = [
        {
            "batch": row["batch_size"],
            "decoding": row["plan"],
            "tokens/s": m.total_tps,
            "speedup [95 %]": shown(row) or "–",
            "accept length": m.accept_length if m.name != PLAIN else None,
        }
        for m, row in zip(results, rows, strict=True)
    ]
    show(table(shown_rows, title=f"Measured on held-out prompts at temperature {WORKLOAD.temperature}"))
