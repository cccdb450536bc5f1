"""What speculation gains on a GPU, in about eight minutes and without network.

    python benchmarks/gpu.py all [--minutes 8] [--output runs/gpu]
    python benchmarks/gpu.py pretrain|train|bench|... [--seconds 120] [--output runs/gpu]

Stages, each in a process of its own, with its share of the time:

    check      `specrl doctor` and the tests that need a GPU
    pretrain   a Llama of 300 M parameters on the Python sources of this machine
    train      `specrl train`: its EAGLE3 draft from random initialisation, and a plan for each batch size
    bench      `specrl bench` for each batch size: all plans against the fastest plain decoding
    host       the share of a round in which the GPU waits for the host
    plain      a plain step of Llama-3.1-8B's shape with random weights, against copy bandwidth
    report     page.md, report/report.html (`specrl report`) and the goals, from the files of the others

A stage needs the files of earlier ones in --output only. On a CPU everything is small and no goal is judged.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # pretraining
sys.path.insert(0, str(Path(__file__).parents[1]))  # specrl

from gpu_stages.commands import bench, check, train
from gpu_stages.host import host
from gpu_stages.plain import plain
from gpu_stages.pretrain import pretrain
from gpu_stages.report import report
from gpu_stages.stage import SIZES, Stage

from specrl.core.clock import WallClock
from specrl.io.output import OutputDir

STAGES: dict[str, Callable[[Stage], None]] = {
    "check": check,
    "pretrain": pretrain,
    "train": train,
    "bench": bench,
    "host": host,
    "plain": plain,
    "report": report,
}
SHARES = {"check": 0.12, "pretrain": 0.3, "train": 0.23, "bench": 0.24, "host": 0.05, "plain": 0.06}  # of the time
REPORT_SECONDS = 30.0

RunStage = Callable[[Sequence[str], float], int]  # command line and seconds -> exit status


def run_stage(words: Sequence[str], seconds: float) -> int:
    """Run a stage in a new process, so that a fault of the device ends no other; 124 if it takes far too long."""
    try:
        return subprocess.run([sys.executable, __file__, *words], timeout=2 * seconds + 30).returncode
    except subprocess.TimeoutExpired:
        return 124


def run_all(output: Path, options: Sequence[str], *, minutes: float, run_stage: RunStage = run_stage) -> int:
    """Run all stages, also after one fails, and write stages.json; returns how many failed.

    Args:
        output: directory of the results.
        options: further options of every stage.
        minutes: of all stages together. Time that one does not use goes to the later ones.
        run_stage: runs one stage.
    """
    clock, rows = WallClock(), list[dict[str, object]]()
    deadline = clock.now() + 60 * minutes
    for number, stage in enumerate(STAGES):
        shares = [SHARES.get(name, 0.0) for name in list(STAGES)[number:]]
        began = clock.now()
        left = max(0.0, deadline - began)
        seconds = left * shares[0] / sum(shares) if shares[0] else REPORT_SECONDS
        status = run_stage([stage, "--output", str(output), "--seconds", f"{seconds:.1f}", *options], seconds)
        took = clock.now() - began
        rows.append({"stage": stage, "seconds_given": seconds, "seconds": took, "exit_status": status})
        OutputDir(output).write_json("stages.json", {"rows": rows})
        print(f"{stage}: {took:.0f} s of {seconds:.0f} s, exit status {status}", flush=True)
    return sum(row["exit_status"] != 0 for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage, or all; returns the exit status."""
    description, _, stages = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=stages, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("all", *STAGES))
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="directory of all results")
    parser.add_argument("--minutes", type=float, default=8.0, help="of 'all'")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a single stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: 'full' on a GPU, 'small' on a CPU")
    args = parser.parse_args(arguments)
    size = args.size or ("full" if args.device.startswith("cuda") else "small")
    if args.stage == "all":
        options = ["--device", args.device, "--size", size]
        return 1 if run_all(args.output, options, minutes=args.minutes) else 0
    clock = WallClock(args.device)
    STAGES[args.stage](Stage(args.output, args.device, size, clock, clock.now() + args.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
