"""`specrl evaluate`: choosers of plans on profiles or on a live engine, against a reference and against bounds."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.checks import require
from specrl.core.plan import parse_plans
from specrl.evaluation.live import LiveBackend, open_live
from specrl.evaluation.regret import gap_lines
from specrl.evaluation.results import comparison_rows, shown_rows, write_evaluation
from specrl.evaluation.scores import compare_choosers
from specrl.evaluation.simulation import Schedule, SimulatedBackend
from specrl.io.output import OutputDir, hint, progress, show, table
from specrl.simulation.profile import load_profile, shipped_profiles
from specrl.simulation.shifts import parse_shifts


def evaluate(
    *,
    profiles: tuple[str, ...] = (),
    choosers: tuple[str, ...] = ("adaptive", "sglang-same", "throughput", "throughput-eager"),
    reference: str = "sglang-same",
    seeds: int = 10,
    schedule: Schedule = Schedule(),
    engine: EngineConfig = EngineConfig(),
    target: TargetConfig = TargetConfig(),
    draft: DraftConfig = DraftConfig(),
    workload: WorkloadConfig = WorkloadConfig(),
    plans: str = "0,1/1/2,2/1/3,3/1/4",
    leaderboard: Path = Path("runs/leaderboard.csv"),
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """Compare choosers of plans, in simulation or live.

    In simulation all choosers have the same random numbers with a seed. Live, plain decoding, the choosers and every
    single plan take turns in one process. The share is the time that the best plan per batch size needs for the same
    expected tokens, over the time that the choices need; the best table has 1. Live, the headroom is printed too: the
    best plan per batch size over the best single plan, each chosen on other cycles of the load than it is measured on.

    With --engine sglang two servers are launched, with and without speculation; one is idle while the other one is
    measured.

    Args:
        profiles: names or .json files; 'live' is the engine on this machine; by default all that are shipped.
        choosers: 'adaptive', 'sglang', 'sglang-same' (with our plans), 'throughput', 'throughput-0',
            'throughput-eager', 'threshold', 'median-greedy', 'ucb1', 'exp3', 'best-table', or a plan such as '3/1/4'.
        reference: the chooser that the others are compared with; one of them.
        seeds: runs of each chooser on each profile.
        engine: live: the engine that decodes.
        target: live: the target model.
        draft: live: the draft model; a random one accepts next to nothing.
        workload: live: the requests.
        plans: live: num_steps/topk/num_draft_tokens, separated by commas (SGLang: chains, or one tree); a profile
            has its own.
        leaderboard: a .csv file to which the results are appended.
        output_dir: where tables and curves are written; by default runs/evaluate-<time>.

    Example:
        specrl evaluate --choosers adaptive,sglang-same,3/1/4 --seeds 20
        specrl evaluate --profiles live --draft runs/quickstart/draft --schedule 1x64,8x32 --schedule.rounds 960
    """
    if not engine.is_local and "live" not in profiles:
        raise ValueError(f"engine is for '--profiles live', but got {engine.name!r} for {profiles or 'all profiles'}")
    require(seeds >= 2 or profiles == ("live",), "seeds", "at least 2 for an interval", seeds)
    if reference not in choosers or len(set(choosers)) < len(choosers):
        raise ValueError(f"reference must be one of the choosers, each named once, but got {reference!r} of {choosers}")
    phases, shifts = schedule.phases, parse_shifts(schedule.shifts)
    names = profiles or shipped_profiles()
    if "live" in names and shifts:
        raise ValueError(f"schedule.shifts is for simulations only, but got {schedule.shifts!r} with 'live'")
    with ExitStack() as opened:
        backends: list[SimulatedBackend | LiveBackend] = []
        for name in names:
            if name == "live":
                cycles = schedule.rounds // schedule.cycle_rounds
                live = open_live(engine, target, draft, workload, parse_plans(plans), phases, cycles)
                opened.callback(live.close)
                backends.append(live)
            else:
                backends.append(SimulatedBackend(load_profile(name), phases, schedule.rounds, shifts))
        if len({backend.name for backend in backends}) < len(backends):
            raise ValueError(f"profiles must have different names, but got {', '.join(b.name for b in backends)}")
        done = 0.0
        with progress("evaluating", seeds * len(backends) * len(choosers)) as bar:

            def advance(more: float) -> None:
                nonlocal done
                done += more
                bar(done)

            evaluations = [backend.evaluate(choosers, range(seeds), advance) for backend in backends]
    compared = compare_choosers(evaluations, reference)
    rows = comparison_rows(compared)
    title = f"{seeds} seeds, {schedule.rounds} rounds, batch sizes {schedule.batch_sizes}"
    show(table(shown_rows(compared, reference), title=title))
    for one in evaluations:
        reached = ", ".join(f"{bound} {speedup:.3f}" for bound, speedup in one.bounds.items())
        show(f"{one.source}: speedup of the bounds: {reached}", *(gap_lines(one.cycles) if one.cycles else []))
    if output_dir is not None:
        directory = OutputDir(output_dir)
        settings = {"batch_sizes": schedule.batch_sizes, "rounds": schedule.rounds, "shifts": schedule.shifts}
        write_evaluation(directory, evaluations, rows, settings=settings, leaderboard=leaderboard)
        show(f"written: {directory.path}; appended to {leaderboard}", hint(directory.path))
    return rows
