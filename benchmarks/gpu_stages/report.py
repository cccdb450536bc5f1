"""The goals, page.md and the HTML report, made from the files of the other stages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_stages.commands import run_command
from gpu_stages.plain import CONTEXTS
from gpu_stages.stage import PLANS, SIZES, Stage
from specrl.core.plan import parse_plans
from specrl.io.output import OutputDir

OF_COPY, HOST_SHARE, SPEEDUP = 0.6, 0.1, 1.5
Record = Mapping[str, Any]


def report(stage: Stage) -> None:
    """Write page.md and report/report.html, and print the goals; the last line is JSON."""
    output = stage.output
    OutputDir(output).write_text("page.md", page(output))
    runs = [path.parent for pattern in ("train/log.csv", "bench-*/bench.csv") for path in sorted(output.glob(pattern))]
    if runs and run_command("report", *runs, "--output_dir", output / "report"):
        raise SystemExit("failed: the HTML report")
    judged = goals(output)
    for goal in judged:
        print(f"{goal['verdict']}: {goal['goal']}; measured: {goal['measured']}")
    print(json.dumps({"page": str(output / "page.md"), "goals": {goal["goal"]: goal["verdict"] for goal in judged}}))


def goals(output: Path) -> list[dict[str, str]]:
    """Rows with 'goal', 'measured' and 'verdict': PASS, FAIL or NOT MEASURED.

    A goal is judged only if all its figures were measured in full size on a GPU.
    """
    plain, host, train, bench = (_read(output, name) for name in ("plain", "host", "train", "bench"))
    steps = {f"{r['of_copy']:.1%} at context {r['context']:.0f}": r["of_copy"] >= OF_COPY for r in plain["rows"]}
    shares = {
        f"{r['host_share']:.1%} (batch {r['batch_size']}, {r['plan']})": r["host_share"] < HOST_SHARE
        for r in host["rows"]
    }
    chosen = {(row["batch_size"], row["plan"]) for row in train["rows"]}
    rows = [row for row in bench["rows"] if (row["batch_size"], row["plan"]) in chosen]
    label = "{speedup:.3f} [{low:.3f}, {high:.3f}] with {plan}".format_map
    fast = {label(row): row["speedup"] >= SPEEDUP for row in rows if row["batch_size"] == 1}
    no_loss = {f"batch {row['batch_size']}: {label(row)}": row["high"] >= 1.0 for row in rows}
    rounds, batches = 2 + 2 * len(parse_plans(PLANS)), len(SIZES["full"].batch_sizes)
    return [
        _goal(f"a plain step of the 8B shape reads at >= {OF_COPY:.0%} of copy bandwidth", steps, len(CONTEXTS), plain),
        _goal(f"the host's share of a round is < {HOST_SHARE:.0%}", shares, rounds, host),
        _goal(f"the speedup of the chooser's plan at batch 1 is >= {SPEEDUP}", fast, 1, bench),
        _goal("no interval of the chooser's plans is below 1.0", no_loss, batches, bench),
    ]


def page(output: Path) -> str:
    """The results in Markdown. Each section names device, driver, torch and date."""
    lines = ["# GPU benchmark", "", *_table("Goals", goals(output)), *_table("Stages", _read(output, "stages")["rows"])]
    for name in ("check", "pretrain", "train", "bench", "host", "plain"):
        record = _read(output, name)
        lines += _table(name, record["rows"], _where(record))
    return "\n".join(lines)


def _read(output: Path, name: str) -> Record:
    """The record of a stage; without rows if there is none."""
    path = output / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def _goal(goal: str, passed: Mapping[str, bool], needed: int, record: Record) -> dict[str, str]:
    """A row of `goals`, from its figures as text and whether each is good enough."""
    judged = len(passed) >= needed and record["size"] == "full" and record["device"].startswith("cuda")
    verdict = "NOT MEASURED" if not judged else "PASS" if all(passed.values()) else "FAIL"
    return {"goal": goal, "measured": ", ".join(passed) or "nothing", "verdict": verdict}


def _where(record: Record) -> str:
    if "environment" not in record:
        return "Not run."
    named = ("cpu", "cores", "gpus", "gpu_driver", "torch", "date_utc", "commit")
    return f"Device {record['device']}; " + ", ".join(f"{name} {record['environment'][name]}" for name in named)


def _table(title: str, rows: Sequence[Record], where: str = "") -> Iterator[str]:
    """Lines of a section with a table."""
    yield from (f"## {title}", "", where, "")
    for row in rows[:1]:
        yield from ("| " + " | ".join(row) + " |", "|---" * len(row) + "|")
    for row in rows:
        yield "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
    yield ""
