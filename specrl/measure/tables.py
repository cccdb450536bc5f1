"""What a benchmark leaves behind: tables for people, CSV and JSON, and the lines of SGLang's own benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specrl.core.plan import Plan
from specrl.io.output import OutputDir, environment, to_json
from specrl.measure.local_arms import NULL
from specrl.measure.paired import PLAIN, Measured, rows

Cells = Mapping[float | None, Sequence[Measured]]  # temperature (None: a profile's) -> lanes
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
_PUBLISHED = tuple(COLUMNS)[: tuple(COLUMNS).index("accept_length") + 1]


def shown(row: Mapping[str, object]) -> str:
    """A speedup with its interval, as text."""
    return "" if row["speedup"] is None else f"{row['speedup']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def cell_rows(cells: Cells) -> list[dict[str, object]]:
    """A row for every temperature, batch size and lane, in the published tables' columns and a few more."""
    return [{"temperature": t, **row} for t, results in cells.items() for row in rows(results)]


def block_rows(cells: Cells) -> list[dict[str, object]]:
    """A row for every block; the n-th of a lane is paired with the n-th of plain decoding at its batch size."""
    return [
        {"temperature": t, "batch_size": m.batch_size, "lane": m.name, "block": n, "seconds": seconds, **sums.row()}
        for t, results in cells.items()
        for m in results
        for n, ((_, seconds), sums) in enumerate(zip(m.blocks, m.sums, strict=True))
    ]


def sglang_rows(results: Sequence[Measured], completion_tokens: int) -> list[dict[str, object]]:
    """Results under the names that SGLang's scripts/playground/bench_speculative.py writes, one JSON object a line.

    step_time is the 20th percentile of a round's seconds and speed = acc_length / step_time, as there. steps, topk and
    num_draft_tokens of 0 are plain decoding; plan 0 of a speculating engine and the A/A lane have no place in it. Our
    acc_length is of rounds; SGLang's also counts the token of prefill, +1 / rounds of a request.
    """
    out: list[dict[str, object]] = []
    for m in results:
        if m.name == NULL or m.plan == str(Plan(0)):
            continue
        plan = None if m.name == PLAIN else Plan.parse(m.plan)
        out.append(
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
    return out


def markdown(lines: Sequence[Mapping[str, object]], title: str, where: str) -> str:
    """The published columns as a Markdown table, and a line that says where they come from."""
    several = len({line["temperature"] for line in lines}) > 1
    keys = [*(["temperature"] if several else []), *_PUBLISHED]
    text = [
        f"### {title}",
        "",
        "| " + " | ".join(COLUMNS.get(key, key) for key in keys) + " |",
        "|---" * len(keys) + "|",
    ]
    for line in lines:
        cells = {**line, "shown": shown(line) or "–"}
        text.append("| " + " | ".join(_text(key, cells[key]) for key in keys) + " |")
    return "\n".join([*text, "", where]) + "\n"


def _text(key: str, value: object) -> str:
    if isinstance(value, float) and key != "temperature":
        return f"{value:.2f}" if key == "accept_length" else f"{value:.1f}"
    return str(value)


def write(directory: OutputDir, cells: Cells, *, title: str, measured: Mapping[str, object], new_tokens: int) -> None:
    """bench.json, bench.csv, bench.md, blocks.csv, and bench_speculative.jsonl (a file for each temperature)."""
    lines, where = cell_rows(cells), environment()
    directory.write_csv("bench.csv", lines)
    directory.write_csv("blocks.csv", block_rows(cells))
    if "profile" in measured:
        said = f"Simulated on profile {measured['profile']}, no measurement: {measured['source']}"
    else:
        gpus = f", GPUs {where['gpus']}" if where["gpus"] else ""
        said = f"{where['cpu']}, {where['cores']} cores{gpus}; torch {where['torch']}; {where['date_utc']}; "
        said += f"commit {where['commit'] or 'unknown'}"
    directory.write_text("bench.md", markdown(lines, title, said))
    for temperature, results in cells.items():
        name = "bench_speculative" + (f"-{temperature:g}" if len(cells) > 1 else "")
        text = "".join(to_json(row) + "\n" for row in sglang_rows(results, new_tokens))
        directory.write_text(f"{name}.jsonl", text)
    directory.write_json("bench.json", {"environment": where, "measured": measured, "rows": lines})
