"""A study's trials: asked for, run one after the other, and kept, in one process of perhaps several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from specrl.envs.device_lock import Exclusive
from specrl.io.output import OutputDir, environment
from specrl.studies.config import Study
from specrl.studies.objective import Measured, NotReached, OnBlock
from specrl.studies.store import adopt_killed, counts, open_study, retry_once, surplus, this_process

if TYPE_CHECKING:
    import optuna

FAILURES = 3  # in a row end a study


def measure_trial(spec: Study, params: Mapping[str, Any], directory: Path, on_block: OnBlock | None = None) -> Measured:
    """One trial (see `specrl.commands.study.run_trial`) of a process that owns the device."""
    options, text = spec.options(params)
    out = OutputDir(directory)
    out.write_text("config.yaml", text)
    if spec.trial == "train":
        from specrl.studies.live import train_and_measure

        found = train_and_measure(spec, options, out, on_block)
    else:
        from specrl.studies.simulated import simulated

        budget = spec.budget
        found = simulated(**options).measure(
            rounds=budget.rounds, seeds=budget.seeds, objective=spec.objectives[0], on_block=on_block
        )
    record = {"study": spec.name, "params": dict(params), "values": found.values, "intervals": found.intervals}
    out.write_json("trial.json", {**record, "blocks": found.blocks, "environment": _machine()})
    return found


class _Surplus(Exception):
    """Another process claimed the last trial first."""


@cache
def _machine() -> dict[str, object]:
    """Where this process's trials are measured, looked up once."""
    return environment()


def work(
    spec: Study,
    url: str,
    directory: Path,
    total: int,
    *,
    worker: int = 0,
    say: Callable[[int, str], object] = lambda done, line: None,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Run trials until `total` are finished, whoever runs them; this process owns the device if they are timed.

    Args:
        spec: the study.
        url: of its storage.
        directory: of its results.
        total: trials completed or pruned.
        worker: number of this process.
        say: told, after each trial, how many are finished, and a line about it.
        wanted: asked before each trial.

    Raises:
        ValueError: a trial's parameters do not fit, or three trials failed in a row.
    """
    import optuna

    kept, failed, me = open_study(spec, url, worker=worker), 0, this_process()

    def objective(trial: optuna.Trial) -> list[float]:
        trial.set_user_attr("worker", me)
        if surplus(kept, trial.number, total):
            raise _Surplus
        params = {name: suggest(trial, name, found) for name, found in spec.distributions().items()}
        place = directory / "trials" / f"{trial.number:04d}"
        trial.set_user_attr("directory", str(place))

        def on_block(number: int, value: float) -> None:
            trial.report(value, number)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            found = measure_trial(spec, params, place, on_block if len(spec.objectives) == 1 else None)
        except NotReached as error:
            trial.set_user_attr("pruned", str(error))
            raise optuna.TrialPruned from error
        trial.set_user_attr("values", found.values)
        trial.set_user_attr("intervals", {key: [i.value, i.low, i.high] for key, i in found.intervals.items()})
        for name, most in spec.constraints.items():
            trial.set_constraint(name, found.values[name] - most)
        return [found.values[name] for name in spec.objectives]

    def told(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        nonlocal failed
        failed = failed + 1 if trial.state == optuna.trial.TrialState.FAIL else 0
        done = counts(kept)[0]
        say(done, f"{done}/{total} {line(spec, trial)}")

    while wanted():
        for number in adopt_killed(kept):
            say(counts(kept)[0], f"trial {number} was killed; its parameters are tried once more")
        done, running = counts(kept)
        if done >= total:
            return
        if done + running >= total:
            Event().wait(0.2)  # for other processes' last trials, which may yet be killed
            continue
        try:
            kept.optimize(objective, n_trials=1, catch=(RuntimeError, MemoryError, _Surplus), callbacks=[told])
        except KeyboardInterrupt:
            retry_once(kept, kept.get_trials()[-1])
            raise
        if failed >= FAILURES:
            raise ValueError(f"trials must run, but the last {failed} failed; see what `specrl train` says to theirs")


def line(spec: Study, trial: optuna.trial.FrozenTrial) -> str:
    """What became of a trial."""
    params = [f"{name} {_short(value)}" for name, value in trial.params.items()]
    if trial.values is None or trial.state.name != "COMPLETE":
        return f"trial {trial.number} {trial.state.name.lower()}: {', '.join(params)}"
    intervals, values = trial.user_attrs.get("intervals", {}), []
    for name, value in zip(spec.objectives, trial.values, strict=True):
        ends = intervals.get(name, ())[1:]
        values.append(f"{name} {_short(value)}" + (f" [{', '.join(map(_short, ends))}]" if ends else ""))
    return f"trial {trial.number}: {', '.join(values)}; {', '.join(params)}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def suggest(trial: optuna.Trial, name: str, found: optuna.distributions.BaseDistribution) -> Any:
    """What a trial tries of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(found, FloatDistribution):
        return trial.suggest_float(name, found.low, found.high, step=found.step, log=found.log)
    if isinstance(found, IntDistribution):
        return trial.suggest_int(name, found.low, found.high, step=found.step, log=found.log)
    assert isinstance(found, CategoricalDistribution)
    return trial.suggest_categorical(name, found.choices)


@contextmanager
def owned(spec: Study) -> Iterator[None]:
    """The device of timed trials, until the end.

    Raises:
        ValueError: it is in use.
    """
    device = Exclusive("cpu")  # where `specrl train` runs
    try:
        if spec.timed:
            device.take()
    except ValueError as error:
        raise ValueError(
            f"a timed trial owns its device, but {device.device!r} is in use by another study or environment, and they "
            "would slow each other down; wait for its end, or study simulated trials"
        ) from error
    try:
        yield
    finally:
        device.give_back()
