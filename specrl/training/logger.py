"""The output of a training run: printed lines, log.csv, windows.csv, gate.csv, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from specrl.core.rollout import Step
from specrl.core.round_stats import StatsByWindow
from specrl.io.output import OutputDir, show
from specrl.training.config import LogConfig
from specrl.training.run import Run

_COUNTS = ("open", "held", "dropped", "skipped", "passed_over", "opted_out", "bad_updates", "rollbacks")


class TensorBoard:
    """Scalars in a directory for `tensorboard --logdir`; a step is a number of requests served."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def _writer(self) -> Any:  # creates the directory with the first numbers
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._directory))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write finite numbers by name."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run in a project of Weights & Biases; WANDB_MODE=offline keeps it on this machine.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, project: str, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"--wandb needs Weights & Biases, but got {error}; 'pip install wandb'") from error
        self._begin = partial(wandb.init, project=project, dir=str(directory), name=directory.name)

    @cached_property
    def _run(self) -> Any:
        return self._begin()

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write finite numbers by name."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Flush and close."""
        self._run.finish()


Sink = TensorBoard | WeightsAndBiases


def open_sinks(directory: OutputDir, log: LogConfig) -> list[Sink]:
    """The places beside log.csv that the numbers of a run are written to."""
    found: list[Sink] = [WeightsAndBiases(log.wandb, directory.path)] if log.wandb else []
    return [*found, TensorBoard(directory.path / "tensorboard")] if log.tensorboard else found


class Reporter:
    """Logs a training run: a printed line and a row of log.csv every few seconds, and the decisions of the gate.

    Args:
        run: the training run.
        directory: for log.csv, windows.csv and gate.csv.
        every_s: seconds between two lines.
        print_line: prints a line.
        sinks: further places for the numbers of a row.
        part: returns the part of its stream that a request belongs to, by the request's number; None: no parts.
    """

    def __init__(
        self,
        run: Run,
        directory: OutputDir,
        every_s: float = 10.0,
        print_line: Callable[[str], None] = show,
        *,
        sinks: Sequence[Sink] = (),
        part: Callable[[int], str] | None = None,
    ) -> None:
        self.run, self.directory, self.every_s, self.print = run, directory, every_s, print_line
        self._sinks, self._part = sinks, part
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
        """Write a last line, unless there was one a moment ago, and close the sinks."""
        if not self.run.log or self._clock.now() - self._last > 0.2 * self.every_s:
            self.line()
        for sink in self._sinks:
            sink.close()

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
        if self._part is not None:
            row["part"] = self._part(max(0, loop.stream.taken - 1))
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
        for sink in self._sinks:
            sink.write(numbers, run.served)
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
    path = directory / "windows.csv"
    if served == 0 or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file) if int(row["served"]) <= served]
