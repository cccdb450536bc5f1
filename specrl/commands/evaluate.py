"""`specrl evaluate`: choosers of plans on profiles or on a live engine, against a reference and against bounds."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from specrl.core.batch_schedule import parse_traffic
from specrl.core.plan import parse_plans
from specrl.core.statistics import Interval
from specrl.evaluation.backends import Live, Simulated, live_source
from specrl.evaluation.records import Record, write_record
from specrl.evaluation.regret import as_json, lines
from specrl.evaluation.scores import Comparison, Score, compare, curves
from specrl.evaluation.simulation import LOAD, parse_shifts
from specrl.io.output import OutputDir, environment, hint, progress, show, table
from specrl.simulation.profile import load_profile, shipped_profiles

_LEADERBOARD = ("date_utc", "source", "chooser", "seeds", "rounds", "speedup", "low", "high", "share", "end", "record")


def evaluate(
    *,
    profiles: tuple[str, ...] = (),
    choosers: tuple[str, ...] = ("adaptive", "sglang-same", "throughput", "throughput-eager"),
    reference: str = "sglang-same",
    seeds: int = 10,
    rounds: int = 2400,
    traffic: str = LOAD,
    shifts: str = "",
    engine: Literal["local", "sglang"] = "local",
    target: str = "embedded",
    draft: str | None = None,
    plans: str = "0,1/1/2,2/1/3,3/1/4",
    temperature: float = 0.7,
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    dtype: Literal["float32", "bfloat16"] = "float32",
    sglang_python: Path | None = None,
    sglang_flags: str = "",
    leaderboard: Path = Path("runs/leaderboard.csv"),
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """Compare choosers of plans, in simulation or live, and record what they did so that it can be checked.

    In simulation all choosers of a seed meet the same luck. Live, plain decoding, the choosers and every single plan
    take turns in one process, there and back. The share is what the best plan per batch size would need for the same
    expected tokens, over what the choices need: 1 is the best table. 'specrl validate' checks the records.

    With --engine sglang two servers are launched, with and without speculation, and stand still while it is another's
    turn. All lanes decode the same requests there, one going on where the other left them.

    Live, the oracle headroom is printed too: the best plan per batch size over the best single plan, each chosen on all
    cycles of the traffic but the one it is measured on, and how much of it each chooser closes.

    Args:
        profiles: names or .json files; 'live' is the engine on this machine; by default all that are shipped.
        choosers: 'adaptive', 'sglang', 'sglang-same' (with our plans), 'throughput', 'throughput-0',
            'throughput-eager', 'threshold', 'median-greedy', 'ucb1', 'exp3', 'best-table', or a plan such as '3/1/4'.
        reference: that the others are compared with; one of the choosers.
        seeds: runs of each chooser on each profile.
        rounds: of a run; live in whole cycles of the traffic.
        traffic: batch size x rounds, repeated.
        shifts: in simulation, as 'at=1200,cost=1.3,from_steps=3,log_odds=0;at=...'.
        engine: live: 'local' decodes here; 'sglang' launches SGLang.
        target: live: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: live: EAGLE3 draft directory; by default a random one, which accepts next to nothing.
        plans: live: num_steps/topk/num_draft_tokens, separated by commas (SGLang: chains, or one tree); a profile
            brings its own.
        temperature: live: of sampling; 0 is greedy.
        workload: live: 'stdlib', a .txt, .jsonl or directory of prompts, or a stream of them (see `specrl train`).
        prompt_tokens: live: tokens of a prompt.
        max_new_tokens: live: tokens generated per request.
        dtype: local: of the target; greedy tokens, which 'specrl validate' compares, surely repeat in float32 only.
        sglang_python: Python of an environment with SGLang and this package; by default this one.
        sglang_flags: further flags for sglang.launch_server, both times; they make room for the largest batch.
        leaderboard: a .csv to which each run's results are appended.
        output_dir: where tables, curves and records go; by default runs/evaluate-<time>.

    Raises:
        ValueError: an argument out of range.

    Example:
        specrl evaluate --choosers adaptive,sglang-same,3/1/4 --seeds 20
        specrl evaluate --profiles live --engine sglang --draft exported/bundle/draft --traffic 1x64,8x32 --rounds 960
    """
    if engine != "local" and "live" not in profiles:
        raise ValueError(f"--engine is what '--profiles live' decodes with, but got {engine!r} for {profiles or 'all'}")
    if seeds < 2 and profiles != ("live",):
        raise ValueError(f"seeds must be at least 2 for an interval, but got {seeds}")
    if reference not in choosers or len(set(choosers)) < len(choosers):
        raise ValueError(f"reference must be one of the choosers, each named once, but got {reference!r} of {choosers}")
    phases, moved = parse_traffic(traffic), parse_shifts(shifts)
    cycle = sum(phase.rounds for phase in phases)
    if rounds < cycle:
        raise ValueError(f"rounds must be at least one cycle of the traffic, {cycle}, but got {rounds}")
    sources: list[Simulated | Live] = []
    for name in profiles or shipped_profiles():
        if name != "live":
            sources.append(Simulated(load_profile(name), phases, rounds, moved))
        elif moved:
            raise ValueError("shifts must be left out where 'live' is evaluated, for no one can order them there")
        else:
            sources.append(
                live_source(
                    parse_plans(plans), phases, rounds // cycle, target=target, draft=draft, temperature=temperature,
                    workload=workload, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens,
                    dtype=dtype, engine=engine, sglang_flags=sglang_flags,
                    sglang_python=None if sglang_python is None else str(sglang_python),
                )
            )  # fmt: skip
    if len({source.name for source in sources}) < len(sources):
        raise ValueError(f"profiles must have different names, but got {', '.join(s.name for s in sources)}")
    scores: dict[str, dict[str, list[Score]]] = {}
    done = 0.0

    def advance(more: float) -> None:
        nonlocal done
        done += more
        bar(done)

    with ExitStack() as ending:
        for source in sources:
            if isinstance(source, Live):
                ending.callback(source.close)
        with progress("playing", seeds * len(sources) * len(choosers)) as bar:
            for source in sources:
                scores[source.name] = source.run(choosers, range(seeds), advance)
        compared = compare(scores, {source.name: source.bounds for source in sources}, reference)
        out = rows(compared)
        show(table(shown(compared, reference), title=f"{seeds} seeds, {rounds} rounds, traffic {traffic}"))
        for source in sources:
            reach = ", ".join(f"{bound} {speedup:.3f}" for bound, speedup in source.bounds.items())
            show(f"{source.name}: speedup of the bounds: {reach}")
            if isinstance(source, Live) and source.blocks is not None:
                show(*lines(source.blocks))
        if output_dir is not None:
            directory = OutputDir(output_dir)
            records = [
                (source.record(name, range(seeds), played), played)
                for source in sources
                for name, played in scores[source.name].items()
            ]
            _write(directory, out, scores, records, rounds, {s.name: s.bounds for s in sources}, leaderboard)
            for source in sources:
                if isinstance(source, Live) and source.blocks is not None:
                    directory.write_json("headroom.json", as_json(source.blocks))
    return out


def rows(compared: Sequence[Comparison]) -> list[dict[str, object]]:
    """Comparisons as rows of CSV and JSON."""
    out = []
    for c in compared:
        row: dict[str, object] = {"source": c.source, "chooser": c.chooser, "seeds": c.seeds, "regret": c.regret}
        for name in ("speedup", "share", "end", "better"):
            interval: Interval | None = getattr(c, name)
            for part in ("value", "low", "high"):
                key = name if part == "value" else f"{name}_{part}"
                row[key] = None if interval is None else getattr(interval, part)
        out.append({**row, **{f"closed to {bound}": share for bound, share in c.closed.items()}})
    return out


def shown(compared: Sequence[Comparison], reference: str) -> list[dict[str, object]]:
    """The same for people."""
    return [
        {
            "source": c.source,
            "chooser": c.chooser,
            "speedup [95 %]": _text(c.speedup),
            "share of best [95 %]": str(c.share),
            "at end": f"{c.end.value:.3f}",
            "regret": c.regret,
            f"P(> {reference})": "–" if c.better is None else f"{c.better.value:.2f}",
            "gap closed": "–" if c.closed.get("best table") is None else f"{c.closed['best table']:.2f}",
        }
        for c in compared
    ]


def _text(interval: Interval) -> str:
    """Of two or three samples the interval is so wide that its ends say nothing."""
    return str(interval) if interval.high < 10.0 * interval.value else f"{interval.value:.3f} [too few seeds]"


def _write(
    directory: OutputDir,
    out: Sequence[Mapping[str, object]],
    scores: Mapping[str, Mapping[str, Sequence[Score]]],
    records: Sequence[tuple[Record, Sequence[Score]]],
    rounds: int,
    bounds: Mapping[str, Mapping[str, float]],
    leaderboard: Path,
) -> None:
    from specrl.reports.figures import plot_regret

    where = environment()
    directory.write_csv("evaluate.csv", out)
    directory.write_json("evaluate.json", {"environment": where, "bounds": bounds, "rows": out})
    lines = curves(scores)
    directory.write_csv("regret.csv", lines)
    plot_regret(lines, directory.path / "regret.png")
    board = []
    for record, played in records:
        path = write_record(directory, record)
        claim = record.claimed
        board.append(
            {
                "date_utc": where["date_utc"],
                "source": record.source,
                "chooser": record.chooser,
                "seeds": len(record.seeds),
                "rounds": rounds,
                "speedup": f"{claim.value:.6g}",
                "low": f"{claim.low:.6g}",
                "high": f"{claim.high:.6g}",
                "share": f"{np.mean([s.share for s in played]):.6g}",
                "end": f"{np.mean([s.end for s in played]):.6g}",
                "record": path.resolve(),
            }
        )
    append(leaderboard, board)
    show(f"written: {directory.path}; appended to {leaderboard}")
    show(hint(directory.path))


def append(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a leaderboard, with a header where it is new.

    Raises:
        ValueError: the file is there but has another header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        head = file.readline().rstrip("\n")
        if head not in ("", ",".join(_LEADERBOARD)):
            raise ValueError(f"a leaderboard must have the header {','.join(_LEADERBOARD)}, but {path} has {head!r}")
        writer = csv.DictWriter(file, _LEADERBOARD, lineterminator="\n")
        if not head:
            writer.writeheader()
        writer.writerows(lines)
