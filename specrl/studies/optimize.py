"""Searches with Optuna: opens a study in its storage and runs its trials.

Several processes may run one study. Every trial records a heartbeat in the storage. Once the heartbeat of a trial has
stopped for a minute, because its process was killed, Optuna fails the trial and queues it again.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from specrl.studies.config import Study, attributes
from specrl.studies.goals import NotReached
from specrl.studies.trial import RunTrial, measure_trial

if TYPE_CHECKING:
    import optuna

GRACE_S = 60  # without a heartbeat, after which a trial is failed and queued again
MAX_FAILURES = 3  # in a row, after which a study ends
MAX_RETRIES = 2  # of a trial whose process was killed


def need_optuna() -> None:
    """Import Optuna and what its pruner needs; raise a ValueError if it is not installed."""
    try:
        importlib.import_module("optuna")
        importlib.import_module("scipy.stats")  # for WilcoxonPruner
    except ImportError as error:
        raise ValueError(f"'specrl study' needs Optuna, but got {error}; 'pip install specrl[study]'") from error


def open_study(spec: Study, url: str, *, worker: int = 0, grace_s: int = GRACE_S) -> optuna.Study:
    """Open the study of this name in a storage, or create it; this process no longer warns of experimental features.

    Args:
        spec: the study.
        url: of the storage, as SQLAlchemy writes it.
        worker: number of the process, for random numbers of its own.
        grace_s: seconds without a heartbeat after which a trial is failed and queued again.

    Raises:
        ValueError: the storage holds another study of this name, or does not open.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
            heartbeat_interval=max(1, grace_s // 4),
            grace_period=grace_s,
            heartbeat_stale_trial_callback=_retry,
        )
        study = optuna.create_study(
            storage=storage, study_name=spec.name, directions=spec.directions, load_if_exists=True, pruner=_pruner(spec)
        )
    except (ImportError, SQLAlchemyError) as error:
        raise ValueError(f"storage must be a database that opens, but {url!r} does not: {error}") from error
    now = {name: value for name, value in spec.to_dict().items() if name not in ("about", "trials")}
    before = study.user_attrs.get("spec")
    if before is None:
        study.set_user_attr("spec", now)
    elif changed := [key for key in now if before.get(key) != now[key]]:
        raise ValueError(
            f"a study must keep its settings, but {', '.join(changed)} of {spec.name!r} changed; take another name or "
            "output_dir"
        )
    study.sampler = _sampler(spec, worker + 997 * len(study.get_trials(deepcopy=False)))
    return study


def _retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue a trial again."""
    import optuna

    optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)(study, trial)


def _pruner(spec: Study) -> optuna.pruners.BasePruner:
    import optuna

    if spec.pruner is None:
        return optuna.pruners.NopPruner()
    try:
        return optuna.pruners.WilcoxonPruner(**spec.pruner)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pruner must hold p_threshold and n_startup_steps, but got {spec.pruner}: {error}") from error


def _sampler(spec: Study, offset: int) -> optuna.samplers.BaseSampler:
    """Return the sampler; `offset` gives a resumed study and other processes random numbers of their own."""
    import optuna

    if spec.sampler == "grid":  # numbers its points by the seed, so all processes need the same
        return optuna.samplers.GridSampler(spec.grid(), seed=spec.seed)
    make = optuna.samplers.RandomSampler if spec.sampler == "random" else optuna.samplers.TPESampler
    return make(seed=spec.seed + offset)


def count_trials(study: optuna.Study) -> tuple[int, int]:
    """Return trials that are completed or pruned, and trials that run."""
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return states.count("COMPLETE") + states.count("PRUNED"), states.count("RUNNING")


def optimize(
    spec: Study,
    url: str,
    directory: Path,
    total: int,
    *,
    run: RunTrial = measure_trial,
    jobs: int = 1,
    worker: int = 0,
    grace_s: int = GRACE_S,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Run trials until `total` are completed or pruned, those of other processes included.

    Two processes that begin their last trials at the same moment may run one more.

    Args:
        spec: the study.
        url: of its storage.
        directory: of its results.
        total: trials.
        run: runs one trial; this process holds the device of timed trials already.
        jobs: threads that call `run` at once.
        worker, grace_s: as for `open_study`.
        wanted: asked before new trials begin.

    Raises:
        ValueError: a trial's parameters do not fit, or three trials in a row failed.
    """
    import optuna

    study = open_study(spec, url, worker=worker, grace_s=grace_s)

    def objective(trial: optuna.Trial) -> list[float]:
        params = {}
        for name, distribution in spec.distributions.items():
            suggest = getattr(trial, f"suggest_{type(distribution).__name__.removesuffix('Distribution').lower()}")
            params[name] = suggest(name, **attributes(distribution))
        trial_directory = directory / "trials" / f"{trial.number:04d}"
        trial.set_user_attr("directory", str(trial_directory))

        def on_block(number: int, value: float) -> None:
            trial.report(value, number)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            measured = run(spec, params, trial_directory, on_block if len(spec.objectives) == 1 else None)
        except NotReached as error:
            raise optuna.TrialPruned(str(error)) from error
        except KeyboardInterrupt:
            _retry(study, study.get_trials()[trial.number])
            raise
        trial.set_user_attr("values", measured.values)
        trial.set_user_attr("intervals", {name: [i.value, i.low, i.high] for name, i in measured.intervals.items()})
        for name, limit in spec.constraints.items():
            trial.set_constraint(name, measured.values[name] - limit)
        return [measured.values[name] for name in spec.objectives]

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        last = [trial.state.name for trial in study.get_trials(deepcopy=False)[-MAX_FAILURES:]]
        if last == ["FAIL"] * MAX_FAILURES:
            raise ValueError(f"trials must run, but the last {MAX_FAILURES} failed; see Optuna's log for their errors")
        if sum(count_trials(study)) >= total or not wanted():
            study.stop()

    while wanted():
        _wait_for_others(study, total, grace_s)
        done, running = count_trials(study)
        if done >= total:
            return
        left = max(1, total - done - running)
        study.optimize(objective, left, n_jobs=jobs, catch=(RuntimeError, MemoryError), callbacks=[after])


def _wait_for_others(study: optuna.Study, total: int, grace_s: int) -> None:
    """Fail trials without heartbeats. If running trials may be the last ones, wait until they end or are failed."""
    import optuna

    for _ in range(5 * (grace_s + 5)):
        optuna.storages.fail_stale_trials(study)
        done, running = count_trials(study)
        if done >= total or done + running < total:
            return
        Event().wait(0.2)
