"""The output of a training run: printed lines, log.csv, windows.csv, gate.csv, TensorBoard, Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from specrl.core.round_stats import StatsByWindow
from specrl.io.output import OutputDir, show
from specrl.io.read import read_rows
from specrl.training.config import LogConfig
from specrl.training.run import Run
from specrl.workloads.stream import Shifting

_COUNTS = ("open", "held", "dropped", "skipped", "passed_over", "opted_out", "bad_updates", "rollbacks")


class MetricsWriter:
    """Writes numbers to directory/tensorboard and to Weights & Biases; creates nothing before the first numbers."""

    def __init__(self, log: LogConfig, directory: Path) -> None:
        self._log, self._directory = log, directory
        try:
            self._wandb = import_module("wandb") if log.wandb else None
        except ImportError as error:
            raise ValueError(f"--wandb needs Weights & Biases, but got {error}; 'pip install wandb'") from error

    @cached_property
    def _tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._directory / "tensorboard"))

    @cached_property
    def _wandb_run(self) -> Any:
        assert self._wandb is not None
        return self._wandb.init(project=self._log.wandb, dir=str(self._directory), name=self._directory.name)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write finite numbers by name; `step` is the number of requests served."""
        if self._log.wandb:
            self._wandb_run.log(dict(numbers), step=step)
        if self._log.tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._log.wandb:
            self._wandb_run.finish()
        if self._log.tensorboard:
            self._tensorboard.close()


class TrainingLogger:
    """Logs a run: a printed line and a row of log.csv every `every_s` seconds, windows.csv, and decisions in gate.csv.

    `metrics` gets the numbers of every row too.
    """

    def __init__(
        self,
        run: Run,
        directory: OutputDir,
        every_s: float = 10.0,
        print_line: Callable[[str], None] = show,
        *,
        metrics: MetricsWriter | None = None,
    ) -> None:
        self.run, self.directory = run, directory
        self._every_s, self._print, self._metrics = every_s, print_line, metrics
        self._clock = run.loop.engine.clock
        self._began = self._logged_at = self._clock.now()
        self._decisions = [] if run.loop.deploy is None else run.loop.deploy.decisions
        self._logged_rounds, self._logged_decisions = -1, len(self._decisions)
        self._windows = StatsByWindow()
        self._window_rows = read_windows(directory.path, run.loop.requests)  # of the run that this one continues
        run.loop.on_step.append(lambda step: self._windows.add(step.round, step.plain.seconds, step.thinking_s))

    @property
    def seconds(self) -> float:
        """Seconds of the run, including the runs that it continues."""
        return self.run.seconds_before + self._clock.now() - self._began

    def log_if_due(self) -> None:
        """Write new decisions, and a row if the last one is old enough."""
        self._log_decisions()
        if self._clock.now() - self._logged_at >= self._every_s:
            self.log()

    def finish(self) -> None:
        """Write a last row, unless there was one a moment ago, and close the metrics."""
        if not self.run.log or self._clock.now() - self._logged_at > 0.2 * self._every_s:
            self.log()
        if self._metrics is not None:
            self._metrics.close()

    def log(self) -> None:
        """Write a row now, unless no round ran since the last one."""
        run, loop = self.run, self.run.loop
        self._log_decisions()
        if loop.rounds == self._logged_rounds:
            return
        self._logged_at, self._logged_rounds = self._clock.now(), loop.rounds
        row = self._row()
        run.log.append(row)
        self.directory.write_csv("log.csv", run.log)
        self._window_rows += [{"served": loop.requests, **window} for window in self._windows.take_rows()]
        self.directory.write_csv("windows.csv", self._window_rows)
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if self._metrics is not None:
            self._metrics.write(numbers, loop.requests)
        part, alpha = f"  {row['part']}" if "part" in row else "", numbers.get("alpha", 0.0)
        texts = [f"{row['seconds']:5.0f} s  {loop.requests:5d} requests{part}  alpha {alpha:.2f}"]
        for batch in sorted(loop.recent):
            plan, speedup, length = (row[f"{name}_{batch}"] for name in ("plan", "speedup", "accept_length"))
            texts.append(f"batch {batch}: {plan} {speedup:.2f}x, {length:.2f} tokens")
        self._print("  |  ".join(texts))

    def _row(self) -> dict[str, object]:
        """Return a row of log.csv."""
        run, loop = self.run, self.run.loop
        row: dict[str, object] = {
            "seconds": round(run.seconds_before + self._logged_at - self._began, 1),
            "requests": loop.requests,
            "draft_version": loop.engine.draft_version,
            "serve_s": round(loop.serve_s, 2),
            "learn_s": round(loop.learn_s, 2),
        }
        workload = loop.stream.workload
        if isinstance(workload, Shifting):
            row["part"] = workload.names[workload.part_of(max(0, loop.stream.position - 1))]
        metrics = {**loop.metrics, **(run.learner.counts() if run.learner else {})}
        row |= {"alpha": metrics.get("alpha_1", math.nan), "loss": metrics.get("loss", math.nan)}
        row |= {name: metrics.get(name, math.nan) for name in ("staleness", "tokens_per_s", *_COUNTS) if run.learner}
        for batch, stats in sorted(loop.recent.items()):
            total = stats.total
            row[f"plan_{batch}"] = str(loop.chooser.best(batch))
            row |= {f"speedup_{batch}": total.speedup, f"accept_length_{batch}": total.accept_length}
            for name, interval in zip(("speedup", "accept_length"), stats.intervals() or (), strict=False):
                row |= {f"{name}_{batch}_low": interval.low, f"{name}_{batch}_high": interval.high}
        return row

    def _log_decisions(self) -> None:
        """Write gate.csv, and print decisions of trials and on harmful drafts."""
        if len(self._decisions) == self._logged_decisions:
            return
        for decision in self._decisions[self._logged_decisions :]:
            decision.setdefault("requests", self.run.loop.requests)
            if decision["check"] == "trial" or decision["harmful"]:
                self._print(f"draft {decision['version']}, {decision['check']}: {decision['reason']}")
        self._logged_decisions = len(self._decisions)
        self.directory.write_csv("gate.csv", self._decisions)


def read_windows(directory: Path, served: int) -> list[dict[str, object]]:
    """The rows of a directory's windows.csv up to `served` requests, which a resumed run continues."""
    return [dict(row) for row in read_rows(directory / "windows.csv") if served and int(row["served"]) <= served]
