"""The goals and the Markdown page, from raw data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specrl.measure.tables import markdown

OF_COPY, HOST_SHARE, SPEEDUP = 0.6, 0.1, 1.5
PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "NOT MEASURED"
Raw = Mapping[str, Any]


def goals(raw: Raw) -> list[tuple[str, str, str]]:
    """Goal, what was measured, and PASS, FAIL or NOT MEASURED, which a run on a CPU or one cut short leaves behind."""
    return [_plain_step(raw), _host_share(raw), _speedup_at_1(raw), _never_slower(raw)]


def _judged(goal: str, raw: Raw, found: str | None, holds: bool) -> tuple[str, str, str]:
    if found is None or not raw["on_gpu"]:
        return goal, found or "nothing", NOT_MEASURED
    return goal, found, PASS if holds else FAIL


def _plain_step(raw: Raw) -> tuple[str, str, str]:
    goal = f"8B plain step at batch 1 reads at >= {OF_COPY:.0%} of copy bandwidth"
    rows = raw["stages"].get("plain_8b", {}).get("rows", [])
    found = ", ".join(f"{row['of_copy']:.1%} at context {row['context']:.0f}" for row in rows)
    return _judged(goal, raw, found or None, all(row["of_copy"] >= OF_COPY for row in rows))


def _host_share(raw: Raw) -> tuple[str, str, str]:
    goal = f"host share of every round < {HOST_SHARE:.0%}"
    rows = raw["stages"].get("host", {}).get("rows", [])
    found = ", ".join(f"{row['share']:.1%} (batch {row['batch_size']}, {row['plan']})" for row in rows)
    return _judged(goal, raw, found or None, all(row["share"] < HOST_SHARE for row in rows))


def _picked(raw: Raw) -> dict[int, Mapping[str, Any] | None]:
    """The measured row of the plan that the chooser picked at each batch size; None: it was not measured."""
    stages = raw["stages"]
    rows = stages.get("measure", {}).get("rows", [])
    found: dict[int, Mapping[str, Any] | None] = {}
    for batch in raw["batch_sizes"]:
        plan = stages.get("learn", {}).get("picks", {}).get(str(batch))
        here = [row for row in rows if row["batch_size"] == batch and row["plan"] == plan]
        found[batch] = here[0] if here else None
    return found


def _speedup_at_1(raw: Raw) -> tuple[str, str, str]:
    goal = f"speedup at batch 1 of the chooser's plan >= {SPEEDUP}"
    row = _picked(raw).get(1)
    return _judged(goal, raw, row and _said(row), bool(row) and row["speedup"] >= SPEEDUP)


def _never_slower(raw: Raw) -> tuple[str, str, str]:
    """A plan is surely slower where its whole interval lies below 1; plan 0 is as fast as plain decoding, or less."""
    goal = "the chooser's plan is never surely slower than plain decoding (interval below 1.0)"
    rows = _picked(raw)
    found = ", ".join(f"batch {batch}: {_said(row)}" for batch, row in rows.items() if row)
    complete = all(rows.values())
    return _judged(goal, raw, found if complete else None, all(row and row["high"] >= 1.0 for row in rows.values()))


def _said(row: Mapping[str, Any]) -> str:
    return f"{row['speedup']:.3f} [{row['low']:.3f}, {row['high']:.3f}] with {row['plan']}"


def page(raw: Raw) -> str:
    """The run as a page of Markdown."""
    stages, where = raw["stages"], raw["environment"]
    device = raw["device"]
    said = (
        f"{device['name']}, driver {device['driver'] or 'none'}; {where['cpu']}, {where['cores']} cores; torch "
        f"{where['torch']}; {where['date_utc']}; commit {where['commit'] or 'unknown'}"
    )
    lines = [f"# {device['name']}", "", f"`{raw['command']}`, {raw['seconds']:.0f} s. {said}.", ""]
    if not raw["on_gpu"]:
        lines += ["Shrunk, on a CPU: this shows that the benchmark runs, and nothing about speed.", ""]
    lines += ["## Goals", "", *_table(("goal", "measured", ""), goals(raw)), ""]
    if "pretrain" in stages:
        p = stages["pretrain"]
        lines += [
            "## Target",
            "",
            f"{p['parameters'] / 1e6:.1f} M parameters, {p['tokens'] / 1e6:.2f} M tokens in {p['training_s']:.0f} s "
            f"({p['tokens_per_s']:,.0f} tokens/s), {p['held_out_nats_per_token']:.3f} nats per token held out.",
            "",
        ]
    if "learn" in stages:
        n = stages["learn"]
        lines += [
            "## Learning online",
            "",
            f"{n['requests']} requests, {n['updates']} updates on {n['learner_device']}; for each request "
            f"{n['serving_s_per_request']:.4f} s serving and {n['learning_s_per_request']:.4f} s learning, in turns.",
            "",
            *_table(("batch", "the chooser's plan"), [(b, p) for b, p in n["picks"].items()]),
            "",
        ]
    if "measure" in stages and stages["measure"]["rows"]:
        rows = stages["measure"]["rows"]
        title = "Speculative against plain decoding, temperature 0.7"
        lines += [markdown(rows, title, "Plans 0, 3/1/4, 4/1/5 and 5/1/6 are lookahead 0, 3, 4 and 5."), ""]
        parts = [
            (r["batch_size"], r["plan"], *(f"{r[k]:.3f}" for k in ("round_ms", "draft_ms", "verify_ms", "other_ms")))
            for r in rows
        ]
        lines += ["### A round", "", *_table(("batch", "plan", "ms", "draft", "verify", "other"), parts), ""]
    host = stages.get("host")
    if host and host["defined"]:
        parts = [
            (r["batch_size"], r["plan"], f"{r['wall_s'] * 1e3:.3f}", f"{r['busy_s'] * 1e3:.3f}", f"{r['share']:.1%}")
            for r in host["rows"]
        ]
        heads = ("batch", "plan", "wall ms", "device-busy ms", "host share")
        lines += ["### What the device waits for", "", *_table(heads, parts), ""]
    elif host:
        lines += [f"Host share: not defined here ({host['why']}).", ""]
    if "plain_8b" in stages:
        p = stages["plain_8b"]
        parts = [
            (f"{r['context']:.0f}", f"{r['seconds'] * 1e3:.3f}", f"{r['bytes_per_s'] / 1e9:.1f}", f"{r['of_copy']:.1%}")
            for r in p["rows"]
        ]
        lines += [
            "## A plain step of random weights, batch 1",
            "",
            f"{p['parameters'] / 1e9:.3f} B parameters in bfloat16; copies run at {p['copy_bytes_per_s'] / 1e9:.1f} "
            "GB/s, read and written both counted. No speedup is quoted, for random weights have none.",
            "",
            *_table(("context", "ms", "GB/s", "of the copy"), parts),
            "",
        ]
    parts = [
        (n, f"{b:.0f}", f"{s:.0f}") for n, b, s in ((t["stage"], t["until_s"], t["ended_s"]) for t in raw["times"])
    ]
    lines += ["## Time", "", *_table(("stage", "was to end at second", "ended at"), parts), ""]
    return "\n".join(lines)


def _table(heads: tuple[str, ...], rows: list[Any]) -> list[str]:
    cells = [heads, ("---",) * len(heads), *rows]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells]
