"""`specrl study`: hyperparameters searched with Optuna, by what trials measure."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from specrl.io.output import OutputDir, progress, show
from specrl.studies.config import Study, find_study, read_study
from specrl.studies.objective import OnBlock
from specrl.studies.report import summary, write_report
from specrl.studies.store import counts, need_optuna, open_study
from specrl.studies.worker import measure_trial, owned, work

SAVED = "study.yaml"


def study(
    *,
    spec: str | None = None,
    trials: int | None = None,
    jobs: int = 1,
    storage: str | None = None,
    ray: str | None = None,
    output_dir: Path | None = None,
) -> dict[str, Any]:
    """Search hyperparameters: every trial trains online and is measured against plain decoding, or is simulated.

    A study's file says what is asked, which parameters are searched, and what a trial may use; ready ones are
    kl_direction, sync_interval, discard_topk, lookahead and learning_rate (ablations), learner (a search of the
    learner's settings) and chooser (simulated). Where it says so, a trial that is surely worse than the best one on
    the same blocks is pruned (Wilcoxon's signed-rank test).

    The same command goes on after any interruption: `trials` counts completed and pruned ones. A trial whose process
    was killed is given up, and its parameters are tried once more. Live trials are timed, so one runs at a time on a
    device; simulated ones may run in several processes, by --jobs or by the same command started again.

    Written are trials/NNNN/ (of a live trial all that `specrl train` writes), trials.csv, study.json, importance,
    slices, curves and, of several objectives, the Pareto front.

    Args:
        spec: a ready study's name or a YAML file; by default the one in output_dir, else 'learner'.
        trials: finished ones that the study ends with; by default what it had before, else what its file says.
        jobs: processes; more than 1 for simulated trials only.
        ray: address of a Ray cluster whose nodes run the trials, 'auto' or 'local'. A timed trial owns one of the
            resource specrl_device of its node, a trial whose worker was killed runs again, and none is pruned block by
            block; output_dir must be where every node finds it.
        storage: of Optuna, such as postgresql://user:password@host/name; by default study.db in output_dir.
        output_dir: where results go; by default runs/study-<time>.

    Raises:
        ValueError: an argument out of range, a study that does not fit, or a device that is in use.

    Example:
        specrl study --spec learning_rate --output_dir runs/learning_rate
        specrl study --output_dir runs/learning_rate --trials 40
        specrl study --spec chooser --jobs 2
        specrl study --spec learner --ray 10.0.0.1:6379 --output_dir /shared/learner
    """
    need_optuna()
    out = OutputDir(output_dir or Path("runs/study"))
    asked = _asked(spec, out)
    if jobs < 1 or (trials is not None and trials < 1):
        raise ValueError(f"jobs and trials must be at least 1, but got {jobs} and {trials}")
    if jobs > 1 and asked.timed:
        raise ValueError(
            f"a timed trial owns its device, so jobs must be 1 where trials are {asked.trial!r}, but got {jobs}; "
            "several processes may run studies of simulated trials"
        )
    if jobs > 1 and ray is not None:
        raise ValueError(f"with --ray the cluster says how many trials run at once, but got jobs {jobs}; leave it out")
    url = storage or f"sqlite:///{(out.path / 'study.db').resolve()}"
    place, run = _by(asked, ray)
    with place:
        kept = open_study(asked, url)
        total = trials or kept.user_attrs.get("trials") or asked.trials
        kept.set_user_attr("trials", total)
        _keep(spec, asked, out)
        done, _ = counts(kept)
        show(f"study {asked.name!r}: {done} of {total} trials finished" + (f"; {asked.about}" if asked.about else ""))
        others = _start(asked, url, out.path, total, jobs)
        try:
            with progress(asked.name, total) as advance:

                def say(done: int, line: str) -> None:
                    show(line)
                    advance(done)

                run(asked, url, out.path, total, say=say)
        except BaseException as error:
            for process in others:
                process.terminate()
            if isinstance(error, KeyboardInterrupt):
                show(f"to go on: specrl study --output_dir {out.path}")
            raise
        for process in others:
            process.join()
    found = write_report(kept, asked, out)
    show(*summary(found, asked, url, out.path))
    return found


def run_trial(
    spec: Study | str | Path, params: Mapping[str, Any], directory: Path, *, on_block: OnBlock | None = None
) -> dict[str, float]:
    """Run one trial in this process, whoever asks for it, and write what it learned and measured.

    Args:
        spec: the study, its file or its name.
        params: a value for every searched parameter.
        directory: of the trial: trial.json, config.yaml and, of a live one, all that `specrl train` writes.
        on_block: told the number and the value of every block of the first objective; what it raises ends the trial.

    Returns:
        What was measured by name, the objectives among it.

    Raises:
        ValueError: parameters that do not fit, or a device that is in use.
        NotReached: an objective waits for a level that the trial did not reach.
    """
    asked = spec if isinstance(spec, Study) else read_study(spec)
    with owned(asked):
        return measure_trial(asked, params, directory, on_block).values


def _by(spec: Study, ray: str | None) -> tuple[AbstractContextManager[None], Callable[..., None]]:
    """Where trials run, and who runs them: this process on its device, or a cluster."""
    if ray is None:
        return owned(spec), work
    from specrl.cluster.connect import connected
    from specrl.cluster.studies import tune_study

    return connected(ray), tune_study


def _asked(spec: str | None, out: OutputDir) -> Study:
    saved = out.path / SAVED
    return read_study(spec if spec is not None else saved if saved.is_file() else "learner")


def _keep(spec: str | None, asked: Study, out: OutputDir) -> None:
    """The study's file, with its name, for whoever goes on."""
    if not (out.path / SAVED).is_file():
        import yaml  # type: ignore[import-untyped]

        found = yaml.safe_load(find_study(spec or "learner").read_text(encoding="utf-8"))
        out.write_text(SAVED, yaml.safe_dump({"name": asked.name, **found}, sort_keys=False))


def _start(spec: Study, url: str, directory: Path, total: int, jobs: int) -> list[Any]:
    """Other processes that run trials too, as long as this one lives."""
    context = multiprocessing.get_context("spawn")
    found = [context.Process(target=_assist, args=(spec, url, directory, total, n)) for n in range(1, jobs)]
    for process in found:
        process.start()
    return found


def _assist(spec: Study, url: str, directory: Path, total: int, worker: int) -> None:
    need_optuna()
    parent = multiprocessing.parent_process()
    work(spec, url, directory, total, worker=worker, wanted=lambda: parent is None or parent.is_alive())
