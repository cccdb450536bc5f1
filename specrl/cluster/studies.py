"""A study's trials over a Ray cluster: Ray Tune places them, its Optuna searcher asks and tells the study's storage."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrl.cluster.connect import DEVICE, need_resource
from specrl.commands.study import run_trial
from specrl.studies.config import Study
from specrl.studies.objective import NotReached
from specrl.studies.store import adopt_killed, counts, open_study, quiet, this_process
from specrl.studies.worker import line, suggest

if TYPE_CHECKING:
    import optuna

RunTrial = Callable[[Study, Mapping[str, Any], Path], Mapping[str, float]]
RETRIES = 2  # of a trial whose worker was killed
_NUMBER, _NOT_REACHED, _TOLD = "trial_number", "not_reached", "told"


def tune_study(
    spec: Study,
    url: str,
    directory: Path,
    total: int,
    *,
    run: RunTrial = run_trial,
    say: Callable[[int, str], object] = lambda done, text: None,
) -> None:
    """Run trials on the cluster that this process is connected to, until `total` are finished.

    A timed trial owns the resource `specrl_device` of its node, so none runs beside another on one device; others own
    a CPU. A trial whose worker was killed runs again. No trial is cut short: Wilcoxon's pruner compares block by
    block, and Ray Tune's searcher hears of a trial at its end.

    Args:
        spec: the study.
        url: of its storage, which only this process needs to reach.
        directory: of its results; every node must have it at this path to keep them together.
        total: trials completed or pruned.
        run: runs a trial where it was placed.
        say: told, after each trial, how many are finished, and a line about it.

    Raises:
        ValueError: the cluster has no device for a timed trial, or no trial of several in a row ran.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    import ray
    from ray import tune

    directory = directory.resolve()  # workers run elsewhere
    owned = DEVICE if spec.timed else "CPU"
    need_resource(owned, 1, "timed trials" if spec.timed else "trials")
    slots = int(ray.cluster_resources()[owned])
    trainable = tune.with_resources(_trainable(spec, directory, run), {"CPU": 1, **({DEVICE: 1} if spec.timed else {})})
    kept = open_study(spec, url)
    while True:
        adopt_killed(kept)
        done, _ = counts(kept)
        if done >= total:
            return
        asking = _Asking(spec, kept, directory)
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=asking.searcher(url), num_samples=total - done, max_concurrent_trials=slots
            ),
            run_config=tune.RunConfig(
                name=f"{spec.name}-{done}",
                storage_path=str(directory / "ray"),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[_listener(asking, say)],
                verbose=0,
            ),
        )
        results = tuner.fit()
        asking.settle()
        if counts(kept)[0] == done:
            why = " ".join(str(results.errors[0]).split())[-300:] if results.errors else "no reason was given"
            raise ValueError(f"trials must run, but none of {total - done} did; the first said: {why}")


def _trainable(spec: Study, directory: Path, run: RunTrial) -> Callable[[dict[str, Any]], None]:
    """What runs on a worker: a trial, and what it reports at its end."""

    def trial(config: dict[str, Any]) -> None:
        import ray
        from ray import tune

        place = directory / "trials" / f"{config[_NUMBER]:04d}"
        params = {name: config[name] for name in spec.search}
        node = ray.get_runtime_context().get_node_id()
        try:
            values = dict(run(spec, params, place))
        except NotReached as error:
            tune.report({**dict.fromkeys(spec.objectives, math.nan), _NOT_REACHED: str(error)})
            return
        found = place / "trial.json"
        intervals = json.loads(found.read_text(encoding="utf-8"))["intervals"] if found.is_file() else {}
        told = {"values": values, "intervals": intervals, "node": node}
        tune.report({**{name: values[name] for name in spec.objectives}, _TOLD: json.dumps(told)})

    return trial


class _Asking:
    """Between Ray Tune's trials and the study's.

    Args:
        spec: the study.
        kept: its trials.
        directory: of its results.
    """

    def __init__(self, spec: Study, kept: optuna.Study, directory: Path) -> None:
        self.spec, self.kept, self._directory = spec, kept, directory
        self._asked: dict[int, Any] = {}
        self._pruned: dict[int, str] = {}

    def searcher(self, url: str) -> Any:
        """Ray Tune's Optuna searcher on the study's own storage and sampler."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        modes = {"maximize": "max", "minimize": "min"}
        with quiet():
            return OptunaSearch(
                self._ask,
                metric=list(self.spec.objectives),
                mode=[modes[direction] for direction in self.spec.directions],
                sampler=self.kept.sampler,
                study_name=self.spec.name,
                storage=optuna.storages.get_storage(url),
            )

    def _ask(self, trial: Any) -> dict[str, Any]:
        """Fill a trial (Optuna's define-by-run); what Ray Tune's configuration holds besides its parameters."""
        trial.set_user_attr("worker", this_process())
        trial.set_user_attr("directory", str(self._directory / "trials" / f"{trial.number:04d}"))
        for name, found in self.spec.distributions().items():
            suggest(trial, name, found)
        self._asked[trial.number] = trial
        return {_NUMBER: trial.number}

    def hear(self, number: int, result: Mapping[str, Any]) -> None:
        """Keep what a trial reported, before it is finished."""
        trial = self._asked[number]
        if _NOT_REACHED in result:
            self._pruned[number] = str(result[_NOT_REACHED])
            trial.set_user_attr("pruned", self._pruned[number])
        elif _TOLD in result:
            told = json.loads(result[_TOLD])
            ends = {key: [i["value"], i["low"], i["high"]] for key, i in told["intervals"].items()}
            for key, value in {**told, "intervals": ends}.items():
                trial.set_user_attr(key, value)
            for name, most in self.spec.constraints.items():
                trial.set_constraint(name, told["values"][name] - most)

    def settle(self) -> None:
        """Finish what the searcher left: trials that reached no level, and those that failed for good."""
        from optuna.trial import TrialState

        for trial in self.kept.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in self._asked:
                state = TrialState.PRUNED if trial.number in self._pruned else TrialState.FAIL
                self.kept.tell(trial.number, state=state)

    def finished(self, number: int) -> tuple[int, str]:
        """How many are finished, and a line about a trial."""
        trial = self.kept.get_trials(deepcopy=False)[number]
        return counts(self.kept)[0], line(self.spec, trial)


def _listener(asking: _Asking, say: Callable[[int, str], object]) -> Any:
    from ray import tune

    class Listener(tune.Callback):
        """Hears what Ray Tune's trials report. A copy hears nothing: the study goes on from its own storage."""

        def __reduce__(self) -> tuple[Any, ...]:
            return tune.Callback, ()

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            asking.hear(trial.config[_NUMBER], result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            say(*asking.finished(trial.config[_NUMBER]))

    return Listener()
