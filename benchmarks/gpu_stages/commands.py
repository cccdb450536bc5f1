"""The stages that run specrl's own commands: check, train and bench."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from gpu_stages.stage import PLANS, Stage
from specrl import cli

_TESTS = ("-m", "pytest", "-q", "tests/test_cuda.py", "tests/test_static_device.py")


def run_command(*words: object) -> int:
    """Run a command of specrl in this process; returns its exit status."""
    line = [str(word) for word in words]
    print("$ specrl", *line, flush=True)
    return cli.main(line)


def check(stage: Stage) -> None:
    """Run `specrl doctor` and the tests of CUDA graphs."""
    output = stage.output / "check"
    status = run_command("doctor", "--target.device", stage.device, "--seconds", 5, "--output_dir", output)
    rows: list[dict[str, object]] = [{"check": "specrl doctor", "exit_status": status, "result": output.name}]
    stage.write("check", rows)
    try:
        root, limit = Path(__file__).parents[2], max(60.0, stage.seconds_left)
        tests = subprocess.run([sys.executable, *_TESTS], cwd=root, stdout=subprocess.PIPE, text=True, timeout=limit)
        status, text = tests.returncode, tests.stdout
    except subprocess.TimeoutExpired as error:
        status, text = 124, f"not done after {error.timeout:.0f} s"
    print(text, flush=True)
    rows.append({"check": " ".join(_TESTS[1:]), "exit_status": status, "result": text.strip().rpartition("\n")[2]})
    stage.write("check", rows)
    _require_success(row["exit_status"] for row in rows)


def train(stage: Stage) -> None:
    """Learn the target's draft online, from random initialisation, and choose a plan for each batch size."""
    output = stage.output / "train"
    schedule = ",".join(f"{batch}x32" for batch in reversed(stage.sizes.batch_sizes))
    limits = ["--serving.requests", stage.sizes.requests, "--serving.max_seconds", max(1.0, stage.seconds_left)]
    serving = ["--serving.plans", PLANS, "--serving.batch_schedule", schedule, *limits]
    log = ["--checkpoint.interval", stage.sizes.requests, "--log.tensorboard", "false"]
    _require_success([run_command("train", *_served(stage), *serving, *log, "--output_dir", output)])
    plans = json.loads((output / "plans.json").read_text())["plans"]
    stage.write("train", [{"batch_size": int(batch), "plan": plan} for batch, plan in plans.items()])


def bench(stage: Stage) -> None:
    """Measure all plans with the learned draft, at one batch size after the other until the time is over."""
    left, statuses, rows = list(stage.sizes.batch_sizes), list[int](), list[dict[str, object]]()
    while left and (stage.seconds_left or not statuses):
        seconds = max(0.5, 0.8 * stage.seconds_left / len(left))  # loading the models takes some time too
        batch = left.pop(0)
        output = stage.output / f"bench-{batch}"
        plans = ["--draft", stage.draft, "--plans", PLANS, "--batch_sizes", batch, "--measure.seconds", seconds]
        statuses.append(run_command("bench", *_served(stage), *plans, "--output_dir", output))
        if statuses[-1] == 0:
            rows += json.loads((output / "bench.json").read_text())["rows"]
            stage.write("bench", rows)
    if left:
        print(f"out of time: batch sizes {left} were not measured", flush=True)
    _require_success(statuses)


def _served(stage: Stage) -> list[object]:
    """Options of the target and the workload."""
    target = ["--target", stage.target, "--target.dtype", "bfloat16", "--target.device", stage.device]
    workload = stage.sizes.workload
    prompts = ["--workload.prompt_tokens", workload.prompt_tokens, "--workload.max_new_tokens", workload.max_new_tokens]
    return [*target, *prompts]


def _require_success(statuses: Iterable[object]) -> None:
    if any(found := list(statuses)):
        raise SystemExit(f"failed: exit statuses {found}")
