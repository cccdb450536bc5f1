"""What a training run says: a line now and then, log.csv and kin, and metrics for TensorBoard or Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from specrl.core.round_stats import Windows, read_windows
from specrl.io.output import OutputDir, show
from specrl.training.drift_watch import RECENT
from specrl.training.run import Run

_COUNTS = ("open", "held", "dropped", "skipped", "passed_over", "opted_out", "bad_updates", "rollbacks")


class Sink(Protocol):
    """Where numbers go."""

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Take finite numbers by name; `step` is requests served."""
        ...

    def close(self) -> None:
        """Write what waits."""
        ...


class TensorBoard:
    """Numbers as scalars in a directory that `tensorboard --logdir` reads; made when the first ones come."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Take numbers by name."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory))
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Numbers as a run of a project of Weights & Biases; WANDB_MODE=offline keeps them on this machine.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, project: str, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"--wandb needs Weights & Biases, but got {error}; 'pip install wandb'") from error
        self._begin = lambda: wandb.init(project=project, dir=str(directory), name=directory.name)
        self._run: Any = None

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Take numbers by name."""
        self._run = self._run or self._begin()
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Write what waits."""
        if self._run is not None:
            self._run.finish()


def sinks(directory: OutputDir, *, tensorboard: bool, wandb: str | None) -> list[Sink]:
    """Those asked for."""
    found: list[Sink] = [WeightsAndBiases(wandb, directory.path)] if wandb else []
    return [*found, TensorBoard(directory.path / "tensorboard")] if tensorboard else found


class Reporter:
    """A line every few seconds, for people, and log.csv, for programs; lines for alarms of drift, too.

    Args:
        run: that is reported on.
        directory: for log.csv and gate.csv.
        every_s: seconds between two lines.
        print_line: where lines go.
        sinks: where the row's numbers go too.
        part: which part of its stream the run is in; None: it has no parts.
    """

    def __init__(
        self,
        run: Run,
        directory: OutputDir,
        every_s: float = 10.0,
        print_line: Callable[[str], None] = show,
        *,
        sinks: list[Sink] | None = None,
        part: Callable[[int], str] | None = None,
    ) -> None:
        self.run, self.directory, self.every_s, self.print = run, directory, every_s, print_line
        self._sinks, self._part = sinks or [], part
        self._clock = run.engine.clock
        self._began = self._last = self._clock.now()
        self._reported = -1  # rounds at the last line
        self._decisions, self._alarms = len(run.decisions), len(run.loop.drift.alarms)
        self._windows = Windows(run.loop.on_round)
        run.loop.on_round = self._windows.take
        self._rows = read_windows(directory.path, run.served)  # of earlier runs that this one goes on from

    @property
    def seconds(self) -> float:
        """Since the run began, earlier runs that it goes on from included."""
        return self.run.seconds_before + self._clock.now() - self._began

    def maybe(self) -> None:
        """Report if it is time to, and what a gate decided in any case."""
        self._decided()
        self._drifted()
        if self._clock.now() - self._last >= self.every_s:
            self.line()

    def last(self) -> None:
        """Report at the end, unless it was done a moment ago, and close the sinks."""
        if not self.run.log or self._clock.now() - self._last > 0.2 * self.every_s:
            self.line()
        for sink in self._sinks:
            sink.close()

    def line(self) -> None:
        """Report now, unless nothing happened since."""
        run, loop = self.run, self.run.loop
        self._decided()
        if loop.rounds == self._reported:
            return
        self._last, self._reported = self._clock.now(), loop.rounds
        row: dict[str, object] = {
            "seconds": round(run.seconds_before + self._last - self._began, 1),
            "requests": run.served,
            "draft_version": run.engine.draft_version,
            "serve_s": round(loop.serve_s, 2),
            "learn_s": round(loop.learn_s, 2),
        }
        if self._part is not None:
            row["part"] = self._part(max(0, loop.stream.taken - 1))
        metrics = dict(loop.metrics)
        if run.learner is not None:
            metrics |= run.learner.counts()
        row |= {"first_draft": loop.drift.level, "drift_alarms": len(loop.drift.alarms)}
        row |= {"alpha": metrics.get("alpha_1", math.nan), "loss": metrics.get("loss", math.nan)}
        row |= {name: metrics.get(name, math.nan) for name in ("staleness", "tokens_per_s", *_COUNTS) if run.learner}
        parts = []
        for batch, tally in sorted(loop.tallies.items()):
            plan = run.chooser.best(batch)
            row |= {
                f"plan_{batch}": str(plan),
                f"speedup_{batch}": tally.speedup,
                f"accept_length_{batch}": tally.accept_length,
            }
            for name, interval in zip(("speedup", "accept_length"), tally.intervals() or (), strict=False):
                row |= {f"{name}_{batch}_low": interval.low, f"{name}_{batch}_high": interval.high}
            parts.append(f"batch {batch}: {plan} {tally.speedup:.2f}x, {tally.accept_length:.2f} tokens")
        run.log.append(row)
        self.directory.write_csv("log.csv", run.log)
        self._rows += self._windows.rows(run.served)
        self.directory.write_csv("windows.csv", self._rows)
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for sink in self._sinks:
            sink.write(numbers, run.served)
        alpha = numbers.get("alpha", 0.0)
        where = f"  {row['part']}" if "part" in row else ""
        self.print(
            f"{row['seconds']:5.0f} s  {run.served:5d} requests{where}  alpha {alpha:.2f}  |  " + "  |  ".join(parts)
        )

    def _drifted(self) -> None:
        """drift.csv, and a line for every alarm."""
        alarms = self.run.loop.drift.alarms
        if len(alarms) == self._alarms:
            return
        for alarm in alarms[self._alarms :]:
            self.print(
                f"drift: after {alarm['requests']:.0f} requests first drafts stand less often, "
                f"{alarm['before']:.0%} before and {alarm['after']:.0%} over the last {RECENT}"
            )
        self._alarms = len(alarms)
        self.directory.write_csv("drift.csv", [dict(alarm) for alarm in alarms])

    def _decided(self) -> None:
        """gate.csv, and a line for what passed a trial or was refused as harmful or after a trial."""
        if len(self.run.decisions) == self._decisions:
            return
        for decision in self.run.decisions[self._decisions :]:
            decision.setdefault("requests", self.run.served)
            if decision["look"] == "trial" or decision["harmful"]:
                self.print(f"draft {decision['version']}, {decision['look']}: {decision['reason']}")
        self._decisions = len(self.run.decisions)
        self.directory.write_csv("gate.csv", self.run.decisions)
