"""The output of a training run: printed lines, log.csv, windows.csv, gate.csv, TensorBoard, Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from specrl.core.rollout import Step
from specrl.core.round_stats import StatsByWindow
from specrl.io.output import OutputDir, show
from specrl.io.read import read_rows
from specrl.training.config import LogConfig
from specrl.training.run import Run
from specrl.workloads.stream import Shifting

_COUNTS = ("open", "held", "dropped", "skipped", "passed_over", "opted_out", "bad_updates", "rollbacks")


class Metrics:
    """Writes numbers to TensorBoard and Weights & Biases, as `log` says, from the first numbers on.

    Args:
        log: which of them. WANDB_MODE=offline in the environment keeps Weights & Biases on this machine.
        directory: tensorboard/ is created in it.

    Raises:
        ValueError: the package of Weights & Biases is not installed.
    """

    def __init__(self, log: LogConfig, directory: Path) -> None:
        self._log, self._directory = log, directory
        try:
            self._wandb = import_module("wandb") if log.wandb else None
        except ImportError as error:
            raise ValueError(f"--wandb needs Weights & Biases, but got {error}; 'pip install wandb'") from error

    @cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._directory / "tensorboard"))

    @cached_property
    def _run(self) -> Any:
        assert self._wandb is not None
        return self._wandb.init(project=self._log.wandb, dir=str(self._directory), name=self._directory.name)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write finite numbers by name; `step` is the number of requests served."""
        if self._log.wandb:
            self._run.log(dict(numbers), step=step)
        if self._log.tensorboard:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._log.wandb:
            self._run.finish()
        if self._log.tensorboard:
            self._writer.close()


class Reporter:
    """Logs a training run: a printed line and a row of log.csv every few seconds, and the decisions of the gate.

    Args:
        run: the training run.
        directory: for log.csv, windows.csv and gate.csv.
        every_s: seconds between two lines.
        print_line: prints a line.
        metrics: gets the numbers of every row too.
    """

    def __init__(
        self,
        run: Run,
        directory: OutputDir,
        every_s: float = 10.0,
        print_line: Callable[[str], None] = show,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self.run, self.directory, self.every_s, self.print = run, directory, every_s, print_line
        self._metrics = metrics
        self._clock = run.loop.engine.clock
        self._began = self._last = self._clock.now()
        self._reported = -1  # rounds at the last line
        self._decisions = len(run.decisions)
        self._windows = StatsByWindow()
        self._window_rows = read_windows(directory.path, run.served)  # of the run that this one continues
        run.loop.on_step.append(self._add)

    def _add(self, step: Step) -> None:
        self._windows.add(step.round, step.plain.seconds, step.thinking_s)

    @property
    def seconds(self) -> float:
        """Seconds of the run, including the runs that it continues."""
        return self.run.seconds_before + self._clock.now() - self._began

    def maybe(self) -> None:
        """Report new decisions, and write a line if it is time to."""
        self._report_decisions()
        if self._clock.now() - self._last >= self.every_s:
            self.line()

    def last(self) -> None:
        """Write a last line, unless there was one a moment ago, and close the metrics."""
        if not self.run.log or self._clock.now() - self._last > 0.2 * self.every_s:
            self.line()
        if self._metrics is not None:
            self._metrics.close()

    def line(self) -> None:
        """Write a line now, unless no round ran since the last one."""
        run, loop = self.run, self.run.loop
        self._report_decisions()
        if loop.rounds == self._reported:
            return
        self._last, self._reported = self._clock.now(), loop.rounds
        row: dict[str, object] = {
            "seconds": round(run.seconds_before + self._last - self._began, 1),
            "requests": run.served,
            "draft_version": loop.engine.draft_version,
            "serve_s": round(loop.serve_s, 2),
            "learn_s": round(loop.learn_s, 2),
        }
        source = loop.stream.workload
        if isinstance(source, Shifting):
            row["part"] = source.names[source.part_of(max(0, loop.stream.taken - 1))]
        metrics = dict(loop.metrics)
        if run.learner is not None:
            metrics |= run.learner.counts()
        row |= {"alpha": metrics.get("alpha_1", math.nan), "loss": metrics.get("loss", math.nan)}
        row |= {name: metrics.get(name, math.nan) for name in ("staleness", "tokens_per_s", *_COUNTS) if run.learner}
        parts = []
        for batch, stats in sorted(loop.recent.items()):
            plan, total = loop.chooser.best(batch), stats.total
            row |= {
                f"plan_{batch}": str(plan),
                f"speedup_{batch}": total.speedup,
                f"accept_length_{batch}": total.accept_length,
            }
            for name, interval in zip(("speedup", "accept_length"), stats.intervals() or (), strict=False):
                row |= {f"{name}_{batch}_low": interval.low, f"{name}_{batch}_high": interval.high}
            parts.append(f"batch {batch}: {plan} {total.speedup:.2f}x, {total.accept_length:.2f} tokens")
        run.log.append(row)
        self.directory.write_csv("log.csv", run.log)
        self._window_rows += [{"served": run.served, **window} for window in self._windows.take_rows()]
        self.directory.write_csv("windows.csv", self._window_rows)
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if self._metrics is not None:
            self._metrics.write(numbers, run.served)
        alpha = numbers.get("alpha", 0.0)
        where = f"  {row['part']}" if "part" in row else ""
        self.print(
            f"{row['seconds']:5.0f} s  {run.served:5d} requests{where}  alpha {alpha:.2f}  |  " + "  |  ".join(parts)
        )

    def _report_decisions(self) -> None:
        """Write gate.csv, and print decisions of trials and on harmful drafts."""
        if len(self.run.decisions) == self._decisions:
            return
        for decision in self.run.decisions[self._decisions :]:
            decision.setdefault("requests", self.run.served)
            if decision["look"] == "trial" or decision["harmful"]:
                self.print(f"draft {decision['version']}, {decision['look']}: {decision['reason']}")
        self._decisions = len(self.run.decisions)
        self.directory.write_csv("gate.csv", self.run.decisions)


def read_windows(directory: Path, served: int) -> list[dict[str, object]]:
    """The rows of a directory's windows.csv up to `served` requests, which a resumed run continues."""
    return [dict(row) for row in read_rows(directory / "windows.csv") if served and int(row["served"]) <= served]
