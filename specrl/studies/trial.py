"""Runs one trial of a study in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specrl.envs.device_lock import DeviceLock
from specrl.io.output import OutputDir
from specrl.measure.machine import environment
from specrl.studies.config import Study, read_study
from specrl.studies.goals import Measured, OnBlock

RunTrial = Callable[[Study, Mapping[str, Any], Path, OnBlock | None], Measured]


def run_trial(
    study: Study | str | Path, params: Mapping[str, Any], directory: Path, on_block: OnBlock | None = None
) -> Measured:
    """Run one trial in this process, for programs that search or schedule trials themselves.

    Args:
        study: the study, its YAML file, or the name of a ready-made study.
        params: a value for every searched parameter.
        directory: where trial.json, config.yaml and, of a live trial, the results of `specrl train` are written.
        on_block: called with the number and the value of every block of the first objective. An exception that it
            raises ends the trial.

    Raises:
        ValueError: parameters that do not fit the study, or another program uses the device of a timed trial.
        NotReached: the trial did not reach the level that an objective waits for.
    """
    study = study if isinstance(study, Study) else read_study(study)
    with device_lock(study):
        return measure_trial(study, params, directory, on_block)


def measure_trial(
    study: Study, params: Mapping[str, Any], directory: Path, on_block: OnBlock | None = None
) -> Measured:
    """`run_trial` in a process that holds the device of timed trials already."""
    trial, text = study.make_trial(params)
    out = OutputDir(directory)
    out.write_text("config.yaml", text)
    measured = trial.measure(study, out, on_block)
    record = {"study": study.name, "params": dict(params), **asdict(measured), "environment": environment()}
    out.write_json("trial.json", record)
    return measured


@contextmanager
def device_lock(study: Study) -> Iterator[None]:
    """Hold the device of timed trials; raise a ValueError if another program times something on it."""
    if study.device is None:
        yield
        return
    lock = DeviceLock(study.device)
    try:
        lock.acquire()
    except ValueError as error:
        raise ValueError(
            f"a timed trial needs its device alone, but {study.device!r} is in use by another study or environment; "
            "wait until that one ends, or study simulated trials"
        ) from error
    try:
        yield
    finally:
        lock.release()
