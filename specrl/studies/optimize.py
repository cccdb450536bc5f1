"""Where a study's trials are kept, and what becomes of those whose process was killed.

A trial names its process: on this machine a process that is gone is seen at once. Trials of other machines, in a
storage that several share, are given up once their heartbeat has stopped for two minutes.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrl.io.output import to_json
from specrl.studies.config import Study

if TYPE_CHECKING:
    import optuna

HEARTBEAT_S, GRACE_S = 30, 120  # between two signs of life; without any
_YOUNG_S = 10.0  # within which a trial that began names its process
_RETRIES = "retry_of"


def need_optuna() -> None:
    """Import Optuna and quieten it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna

        importlib.import_module("scipy.stats")  # the pruner's test
    except ImportError as error:
        raise ValueError(f"'specrl study' needs Optuna, but got {error}; 'pip install specrl[study]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes on parts of it that are experimental."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_study(spec: Study, url: str, *, worker: int = 0) -> optuna.Study:
    """The study of this name in a storage, made if need be.

    Args:
        spec: what it asks.
        url: of the storage, as SQLAlchemy writes it.
        worker: number of the process, so that two do not draw alike.

    Raises:
        ValueError: a study of this name asks something else, or the storage does not open.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    local = url.startswith("sqlite")
    try:
        with quiet():
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if local else None,
                heartbeat_interval=None if local else HEARTBEAT_S,
                grace_period=None if local else GRACE_S,
                heartbeat_stale_trial_callback=retry_once,
            )
        study = optuna.create_study(
            storage=storage,
            study_name=spec.name,
            directions=spec.directions,
            load_if_exists=True,
            pruner=_pruner(spec),
        )
    except (ImportError, SQLAlchemyError) as error:
        raise ValueError(f"storage must be a database that opens, but {url!r} does not: {error}") from error
    asks = {key: value for key, value in asdict(spec).items() if key not in ("about", "trials")}
    found = study.user_attrs.get("asks")
    if found is None:
        study.set_user_attr("asks", json.loads(to_json(asks)))
    elif found != json.loads(to_json(asks)):
        changed = ", ".join(key for key in asks if found.get(key) != json.loads(to_json(asks))[key])
        raise ValueError(
            f"a study goes on as it began, but {changed} of {spec.name!r} changed; take another name or output_dir"
        )
    study.sampler = _sampler(spec, worker + 997 * len(study.get_trials(deepcopy=False)))
    return study


def _pruner(spec: Study) -> optuna.pruners.BasePruner:
    import optuna

    if spec.pruner is None:
        return optuna.pruners.NopPruner()
    try:
        with quiet():
            return optuna.pruners.WilcoxonPruner(**spec.pruner)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"pruner must hold p_threshold and n_startup_steps, but got {spec.pruner!r}: {error}"
        ) from error


def _sampler(spec: Study, drawn: int) -> optuna.samplers.BaseSampler:
    """`drawn` sets what a resumed study or another process draws apart from what was drawn."""
    import optuna

    if spec.sampler == "grid":  # numbers its points by the seed, so that is the same in all processes
        points = {name: list(dimension.points() or ()) for name, dimension in spec.search.items()}
        return optuna.samplers.GridSampler(points, seed=spec.seed)
    if spec.sampler == "random":
        return optuna.samplers.RandomSampler(seed=spec.seed + drawn)
    return optuna.samplers.TPESampler(seed=spec.seed + drawn)


def counts(study: optuna.Study) -> tuple[int, int]:
    """Trials finished (completed or pruned), and running."""
    from optuna.trial import TrialState

    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED), states.count(TrialState.RUNNING)


def surplus(study: optuna.Study, number: int, total: int) -> bool:
    """Whether enough trials were claimed before the one of this number: two processes may ask for the last at once."""
    from optuna.trial import TrialState

    claimed = (t for t in study.get_trials(deepcopy=False) if t.number < number and t.state != TrialState.FAIL)
    return sum(1 for _ in claimed) >= total


def retry_once(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue a trial's parameters again, unless that was done before."""
    if trial.params and _RETRIES not in trial.user_attrs:
        study.enqueue_trial(dict(trial.params), user_attrs={_RETRIES: trial.number})


def adopt_killed(study: optuna.Study) -> list[int]:
    """Give up trials whose process is gone and queue their parameters once more; their numbers."""
    import optuna
    from optuna.trial import TrialState

    with quiet():
        optuna.storages.fail_stale_trials(study)
    found = []
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        by = trial.user_attrs.get("worker")
        young = trial.datetime_start is not None and (datetime.now() - trial.datetime_start).total_seconds() < _YOUNG_S
        if (by is None and young) or (by is not None and alive(by)):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, RuntimeError):  # another process was faster
            continue
        retry_once(study, trial)
        found.append(trial.number)
    return found


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, JSON-able."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}


def alive(worker: Mapping[str, Any]) -> bool:
    """Whether a process runs; True where it is another machine's, which only its heartbeat can tell."""
    if worker["host"] != platform.node():
        return True
    if worker["started"] is not None:
        return _started(worker["pid"]) == worker["started"]
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None: it is gone, or the system does not say."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
