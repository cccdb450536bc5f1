"""What speculation gains on a GPU: one command, one machine, no network, in under nine minutes.

    python benchmarks/gpu.py run [--minutes 8] [--output runs/gpu]
    python benchmarks/gpu.py report [--output runs/gpu] [--page docs/results/h200.md]   # from the raw data alone

Stages, each with its share of the time, which it keeps by a clock and says what it did:
  pretrain   a Llama of 300 M parameters on the Python sources of this machine, with a tokenizer trained on the spot
  learn      its EAGLE3 draft from random initialisation, online, with the default learner and chooser
  measure    batch 1, 8, 16, 32 x lookahead 0, 3, 4, 5 in turns with the fastest plain decoding, then the share of a
             round in which the device waits for the host
  plain_8b   a plain step of Llama-3.1-8B's shape with random weights, against the device's copy bandwidth

Raw data: `gpu.json` in --output, with the seconds of every block; goals are judged from it. On a CPU everything is
shrunk, and shows no more than that it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # gpu_stages, also when tests import this file
sys.path.insert(1, str(Path(__file__).parents[1] / "tools"))  # pretraining

from gpu_stages.learn import learn
from gpu_stages.measure import host_shares, measure
from gpu_stages.plain import plain
from gpu_stages.pretrain import pretrain
from gpu_stages.report import goals, page
from gpu_stages.sizes import SHARES, SIZES

from specrl.core.clock import Clock, WallClock
from specrl.io.output import OutputDir, show, table
from specrl.measure.machine import environment, keep_large_blocks
from specrl.models.target import load_target

_HOST = 0.2  # of the time of 'measure', for what comes after the table
RAW = "gpu.json"


def run(
    minutes: float,
    output: Path,
    device: str,
    size: str,
    clock: Clock | None = None,
    learner_device: str | None = None,
) -> dict[str, Any]:
    """All stages, their time counted on `clock` (None: the machine's); the raw data, which is written after each."""
    sizes, clock, directory = SIZES[size], clock or WallClock(device), OutputDir(output)
    began, total = clock.now(), minutes * 60
    ends, so_far = {}, 0.0
    for name, share in SHARES.items():
        so_far += share
        ends[name] = began + so_far * total
    raw: dict[str, Any] = {
        "command": f"python benchmarks/gpu.py run --minutes {minutes:g} --device {device} --size {size}",
        "size": size,
        "on_gpu": device.startswith("cuda"),
        "device": about(device),
        "environment": environment(),
        "batch_sizes": list(sizes.batch_sizes),
        "minutes": minutes,
        "stages": {},
        "times": [],
    }

    def keep(name: str, stage: str, done: dict[str, Any]) -> None:
        now = clock.now()
        raw["stages"][name] = done
        raw["times"].append({"stage": name, "until_s": ends[stage] - began, "ended_s": now - began})
        raw["seconds"] = now - began
        directory.write_json(RAW, raw)
        brief = {k: v for k, v in done.items() if not isinstance(v, (list, dict))}
        show(f"{name}: ended at {now - began:.0f} s of {ends[stage] - began:.0f} s; {json.dumps(brief)}")

    target = directory.path / "target"
    keep("pretrain", "pretrain", pretrain(target, sizes, device, clock, ends["pretrain"]))
    model = load_target(target, device=device, dtype=torch.bfloat16)
    served, done = learn(model, target, sizes, directory, clock, ends["learn"], learner_device)
    keep("learn", "learn", done)
    table_end = ends["measure"] - _HOST * SHARES["measure"] * total
    keep("measure", "measure", measure(model, served.learned, target, sizes, clock, table_end))
    keep("host", "measure", host_shares(model, served.learned, target, sizes, clock, ends["measure"]))
    del model, served
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    keep("plain_8b", "plain_8b", plain(sizes, device, clock, ends["plain_8b"]))
    return raw


def about(device: str) -> dict[str, Any]:
    """The device's name, its driver, and what torch knows of it."""
    if not device.startswith("cuda"):
        return {"name": "CPU", "driver": None}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = ""
    known = torch.cuda.get_device_properties(device)
    return {
        "name": known.name,
        "driver": driver.strip() or None,
        "cuda": torch.version.cuda,
        "memory_bytes": known.total_memory,
        "multiprocessors": known.multi_processor_count,
    }


def tell(raw: dict[str, Any]) -> None:
    """The table, the picks and the goals, and a line of JSON last."""
    stages = raw["stages"]
    keys = ["batch_size", "plan", "mean_tps", "p50_tps", "p05_tps", "p95_tps", "speedup", "low", "high"]
    keys += ["accept_length", "round_ms", "draft_ms", "verify_ms", "other_ms"]
    show(table(stages["measure"]["rows"], keys, title="Speculative against plain decoding, temperature 0.7"))
    host = stages["host"]
    if host["defined"]:
        show(table(host["rows"], title="Seconds of a round, and the host's share"))
    else:
        show(f"host share: not defined here ({host['why']})")
    columns = ["context", "seconds", "bytes_per_s", "of_copy"]
    show(table(stages["plain_8b"]["rows"], columns, title="A plain step of random weights, batch 1"))
    show("the chooser's plans: " + ", ".join(f"batch {b}: {p}" for b, p in stages["learn"]["picks"].items()))
    for goal, found, verdict in goals(raw):
        show(f"{verdict}: {goal}; measured: {found}")
    print(json.dumps({"goals": {goal: verdict for goal, _, verdict in goals(raw)}, "seconds": raw["seconds"]}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--learner_device", help="of the draft's learner; by default the same, in turns with serving")
    parser.add_argument("--size", choices=tuple(SIZES), help="by default 'full' on a GPU, 'small' on a CPU")
    parser.add_argument("--page", type=Path, help="of 'report': write the page there, and not to standard output")
    args = parser.parse_args(arguments)
    if args.what == "run":
        keep_large_blocks()
        on_gpu = args.device.startswith("cuda")
        size = args.size or ("full" if on_gpu else "small")
        tell(run(args.minutes, args.output, args.device, size, learner_device=args.learner_device))
        return
    text = page(json.loads((args.output / RAW).read_text()))
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
