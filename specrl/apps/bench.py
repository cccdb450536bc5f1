"""`specrl bench`: speculative against plain decoding, by batch size and plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specrl.apps.checks import torch_threads
from specrl.apps.output import OutputDir, environment, progress, show, table, usable_cores
from specrl.apps.paired import PLAIN, Measured, Setting, measure, rows
from specrl.engines.base import Workload
from specrl.engines.local import LocalEngine
from specrl.models.draft import Draft, load_draft, new_draft
from specrl.models.target import Target, load_target
from specrl.plan import Plan, parse_plans
from specrl.streams import open_stream

_COLUMNS = {
    "batch_size": "batch",
    "plan": "plan",
    "mean_tps": "tok/s mean",
    "p50_tps": "P50",
    "p05_tps": "P05",
    "p95_tps": "P95",
    "count": "requests",
    "shown": "speedup [95 %]",
    "accept_length": "accept length",
    "round_ms": "round ms",
    "draft_ms": "draft",
    "verify_ms": "verify",
    "other_ms": "other",
}


@dataclass(frozen=True, slots=True)
class PlainSetting:
    """A way to decode plainly: the median seconds of a step in it."""

    dtype: str
    threads: int
    seconds: float


def bench(
    *,
    target: str = "embedded",
    draft: Path | None = None,
    batch_sizes: tuple[int, ...] = (1, 4, 16),
    plans: str = "0,1/1/2,3/1/4,3/2/6",
    temperature: float = 0.7,
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    use_rejection_sampling: bool = True,
    device: str | None = None,
    precision: float = 0.02,
    seconds: float = 60.0,
    seed: int = 0,
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """Measure the speedup of every plan over plain decoding, at every batch size.

    Plain decoding is decoding without any draft, in the fastest setting of dtype and threads on this machine, and
    takes turns with the plans in one process on the same prompts. The first lane is plain against itself (A/A): its
    interval must cover 1. Prompts are held out from training.

    Args:
        target: checkpoint directory, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: EAGLE3 draft directory; by default a random one, which accepts next to nothing.
        batch_sizes: requests decoded together.
        plans: num_steps/topk/num_draft_tokens, separated by commas; 0 drafts nothing but keeps the draft ready.
        temperature: of sampling; 0 is greedy.
        workload: 'stdlib', a .txt, .jsonl or directory of prompts, or a stream of them (see `specrl train`).
        prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens generated per request.
        use_rejection_sampling: sample chains from the draft; else drafts are its best tokens (SGLang's default).
        device: 'cpu' or 'cuda'; by default a GPU where there is one.
        precision: stop when every 95 % interval has a half-width of at most this.
        seconds: or when this much time is spent at a batch size.
        seed: of prompts and sampling.
        output_dir: where bench.json and bench.csv go; by default runs/bench-<time>.

    Raises:
        ValueError: an argument out of range.

    Example:
        specrl bench --batch_sizes 1,4,16 --plans 0,1/1/2,3/1/4,3/2/6 --draft runs/quickstart/draft
    """
    import torch

    if not 0 < precision < 1 or not 0 < seconds < float("inf"):
        raise ValueError(f"precision must be in (0, 1) and seconds above 0, but got {precision} and {seconds}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be numbers of at least 1, but got {list(batch_sizes)}; for example 1,4,16")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parsed = parse_plans(plans)
    model = load_target(target, device=device)
    drafted = load_draft(draft) if draft is not None else new_draft(model, intermediate_size=256)
    source = open_stream(
        workload,
        target,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ignore_eos=True,
        split="held_out",
    )
    results: list[Measured] = []
    for batch in batch_sizes:
        fastest = fastest_plain(target, source, batch, device=device)
        show(f"batch {batch}: fastest plain decoding in {fastest.dtype} with {fastest.threads} threads")
        results += measure_plans(
            model,
            {str(plan): (drafted, plan) for plan in parsed},
            source,
            fastest,
            target=target,
            batch_size=batch,
            max_context=prompt_tokens + max_new_tokens,
            block_tokens=max_new_tokens,
            precision=precision,
            seconds=seconds,
            use_rejection_sampling=use_rejection_sampling,
            seed=seed,
        )
    out = rows(results)
    show(table([{**row, "shown": shown(row)} for row in out], _COLUMNS, title=f"{target}, temperature {temperature}"))
    if output_dir is not None:
        directory = OutputDir(output_dir)
        directory.write_csv("bench.csv", out)
        show(f"written: {directory.write_json('bench.json', {'environment': environment(), 'rows': out})}")
    return out


def measure_plans(
    target_model: Target,
    lanes: Mapping[str, tuple[Draft, Plan]],
    workload: Workload,
    fastest: PlainSetting,
    *,
    target: str,
    batch_size: int,
    max_context: int,
    block_tokens: int,
    precision: float,
    seconds: float,
    use_rejection_sampling: bool = True,
    null: bool = True,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[Measured]:
    """Plain (in its fastest setting), plain again (A/A, where `null`), and every named draft and plan, taking turns.

    `shares` are tokens of a lane's blocks over those of plain's, 1 where it is not named.
    """
    engines = {
        id(draft): LocalEngine(
            target_model, draft, max_context=max_context, use_rejection_sampling=use_rejection_sampling
        )
        for draft, _ in lanes.values()
    }
    own = fastest.dtype == str(target_model.dtype).removeprefix("torch.")
    model = target_model if own else load_target(target, device=target_model.device, dtype=fastest.dtype)
    plain = LocalEngine(model, max_context=max_context)
    settings = [Setting(PLAIN, plain, None, fastest.threads)]
    if null:
        settings.append(Setting("A/A", plain, None, fastest.threads))
    settings += [
        Setting(name, engines[id(draft)], plan, fastest.threads, (shares or {}).get(name, 1.0))
        for name, (draft, plan) in lanes.items()
    ]
    with progress(f"batch {batch_size}", seconds) as advance:
        results = measure(
            settings,
            workload,
            batch_size=batch_size,
            block_tokens=block_tokens,
            precision=precision,
            seconds=seconds,
            seed=seed,
            on_block=lambda spent, _: advance(spent),
        )
    for engine in (plain, *engines.values()):
        engine.close()
    return results


def fastest_plain(
    target: str,
    workload: Workload,
    batch_size: int,
    *,
    device: str = "cpu",
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    rounds: int = 60,
) -> PlainSetting:
    """The setting of {dtype, threads} in which plain decoding is fastest here, by interleaved medians.

    Args:
        target: as for `load_target`.
        workload: prompts.
        batch_size: live requests.
        device: 'cpu' or a CUDA device, where threads do not matter.
        dtypes: to try.
        rounds: timed in each setting, in blocks of ten.
    """
    threads = (1,) if device.startswith("cuda") else tuple(sorted({1, usable_cores()}))
    sessions = {
        dtype: LocalEngine(load_target(target, device=device, dtype=dtype)).start(
            workload, batch_size=batch_size, seed=0, plain=True
        )
        for dtype in dtypes
    }
    turns = [(dtype, count) for dtype in dtypes for count in threads]
    times: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    for _ in range(max(1, rounds // 10)):
        for dtype, count in turns:
            with torch_threads(count):
                took = [sessions[dtype].round(Plan(0)).seconds for _ in range(12)]
            times[dtype, count] += took[2:]
        turns.reverse()
    for session in sessions.values():
        session.close()
    best = min(times, key=lambda turn: float(np.median(times[turn])))
    return PlainSetting(*best, float(np.median(times[best])))


def shown(row: dict[str, object]) -> str:
    """A speedup with its interval, as text."""
    return "" if row["speedup"] is None else f"{row['speedup']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
