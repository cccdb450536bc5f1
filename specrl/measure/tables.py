"""Tables of measurements: rows for people, CSV, JSON and Markdown, and the columns of SGLang's benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specrl.core.plan import PLAIN, Plan
from specrl.io.output import OutputDir, to_json
from specrl.measure.bench import Cells
from specrl.measure.machine import environment
from specrl.measure.paired import AA_CONTROL, ArmResult

COLUMNS = {
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
_PUBLISHED = tuple(COLUMNS)[: tuple(COLUMNS).index("accept_length") + 1]  # columns of published tables


def result_rows(results: Sequence[ArmResult]) -> list[dict[str, object]]:
    """Return a row for each arm, the columns of published tables first."""
    rows: list[dict[str, object]] = []
    for r in results:
        interval = ("value", "low", "high")
        speedup = [None if r.speedup is None else round(getattr(r.speedup, name), 4) for name in interval]
        rows.append(
            {
                "batch_size": r.batch_size,
                "plan": r.plan if r.name in (PLAIN, r.plan) else f"{r.plan} ({r.name})",
                **{n: getattr(r, n) for n in ("mean_tps", "p50_tps", "p05_tps", "p95_tps", "total_tps", "count")},
                **dict(zip(("speedup", "low", "high"), speedup, strict=True)),
                "accept_length": round(r.accept_length, 3),
                **{n: getattr(r, n) for n in ("round_ms", "draft_ms", "verify_ms", "other_ms", "prefill_s")},
            }
        )
    return rows


def shown(row: Mapping[str, object]) -> str:
    """Return a speedup with its interval as text; '' if the row has none."""
    return "" if row["speedup"] is None else f"{row['speedup']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def cell_rows(cells: Cells) -> list[dict[str, object]]:
    """Return a row for each temperature, batch size and arm."""
    return [{"temperature": t, **row} for t, results in cells.items() for row in result_rows(results)]


def block_rows(cells: Cells) -> list[dict[str, object]]:
    """Return a row for each block; block n of an arm is paired with block n of plain decoding at its batch size."""
    return [
        {"temperature": t, "batch_size": m.batch_size, "arm": m.name, "block": n, "seconds": b.seconds, **b.row()}
        for t, results in cells.items()
        for m in results
        for n, b in enumerate(m.blocks)
    ]


def sglang_rows(results: Sequence[ArmResult], completion_tokens: int) -> list[dict[str, object]]:
    """Return rows with the columns of SGLang's scripts/playground/bench_speculative.py.

    As there, step_time is the 20th percentile of a round's seconds and speed = acc_length / step_time. Plain decoding
    has 0 steps, topk and num_draft_tokens; plan 0 of an engine with a draft and the A/A control are left out. Our
    acc_length is the mean over rounds; SGLang's also counts the token of the prefill, +1 / rounds of a request.
    """
    rows: list[dict[str, object]] = []
    for m in results:
        if m.name == AA_CONTROL or m.plan == str(Plan(0)):
            continue
        plan = None if m.name == PLAIN else Plan.parse(m.plan)
        rows.append(
            {
                "batch_size": m.batch_size,
                "steps": plan.num_steps if plan else 0,
                "topk": plan.topk if plan else 0,
                "num_draft_tokens": plan.num_draft_tokens if plan else 0,
                "acc_length": round(m.accept_length, 3),
                "step_time": m.round_p20_s,
                "speed": round(m.accept_length / m.round_p20_s, 3),
                "completion_tokens": completion_tokens,
            }
        )
    return rows


def markdown(rows: Sequence[Mapping[str, object]], title: str, source: str) -> str:
    """Return the published columns as a Markdown table, and a line that names the source."""
    several = len({row["temperature"] for row in rows}) > 1
    columns = {"temperature": "temperature"} if several else {}
    columns |= {key: COLUMNS[key] for key in _PUBLISHED}
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = {**row, "shown": shown(row) or "–"}
        lines.append("| " + " | ".join(_text(key, cells[key]) for key in columns) + " |")
    return "\n".join([f"### {title}", "", *lines, "", source]) + "\n"


def _text(key: str, value: object) -> str:
    if isinstance(value, float) and key != "temperature":
        return f"{value:.2f}" if key == "accept_length" else f"{value:.1f}"
    return str(value)


def write_bench(
    directory: OutputDir, cells: Cells, *, title: str, measured: Mapping[str, object], new_tokens: int
) -> None:
    """Write bench.json, bench.csv, bench.md, blocks.csv and bench_speculative.jsonl (one for each temperature).

    `measured` are the settings; those of a simulation hold 'profile' and 'source'. `new_tokens` is for each request.
    """
    rows, where = cell_rows(cells), environment()
    directory.write_csv("bench.csv", rows)
    directory.write_csv("blocks.csv", block_rows(cells))
    if "profile" in measured:
        source = f"Simulated on profile {measured['profile']}, no measurement: {measured['source']}"
    else:
        gpus = f", GPUs {where['gpus']}, driver {where['gpu_driver']}" if where["gpus"] else ""
        source = f"{where['cpu']}, {where['cores']} cores{gpus}; torch {where['torch']}; {where['date_utc']}; "
        source += f"commit {where['commit'] or 'unknown'}"
    directory.write_text("bench.md", markdown(rows, title, source))
    for temperature, results in cells.items():
        name = "bench_speculative" + (f"-{temperature:g}" if len(cells) > 1 else "")
        text = "".join(to_json(row) + "\n" for row in sglang_rows(results, new_tokens))
        directory.write_text(f"{name}.jsonl", text)
    directory.write_json("bench.json", {"environment": where, "measured": measured, "rows": rows})
