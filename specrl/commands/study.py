"""`specrl study`: searches hyperparameters with Optuna; its trials are measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specrl.core.checks import require
from specrl.io.output import OutputDir, show
from specrl.studies.config import Study, read_study
from specrl.studies.optimize import count_trials, need_optuna, open_study, optimize
from specrl.studies.report import summarize, write_report
from specrl.studies.trial import device_lock


def study(
    *,
    spec: str | None = None,
    trials: int | None = None,
    jobs: int = 1,
    storage: str | None = None,
    ray: str | None = None,
    output_dir: Path | None = None,
) -> dict[str, Any]:
    """Search hyperparameters. Each trial trains online and is measured against plain decoding, or is simulated.

    A study's file names the objectives, the searched parameters and the budget of a trial. The ready-made studies are
    kl_direction, sync_interval, discard_topk, lookahead and learning_rate (ablations), learner (a search of the
    learner's settings) and chooser (simulated). If the file names a pruner, a trial that is significantly worse than
    the best one on the same blocks is stopped early (Wilcoxon's signed-rank test).

    The same command continues an interrupted study; completed and pruned trials count as `trials`. A trial whose
    process was killed is run again with the same parameters, up to twice, a minute after its last heartbeat. Live
    trials are timed, so one runs at a time on a device; simulated ones may run in several processes, by --jobs or by
    the same command started again.

    Results are trials/NNNN/ (of a live trial, the results of `specrl train`), trials.csv, values.csv, study.json,
    and plots of the history, slices, importance, blocks and, of several objectives, the Pareto front.

    Args:
        spec: a ready-made study's name or a YAML file; by default the one in output_dir, else 'learner'.
        trials: completed or pruned trials that the study ends with; by default as before, else as its file says.
        jobs: processes; more than 1 for simulated trials only.
        storage: Optuna's, such as postgresql://user:password@host/name; by default study.db in output_dir.
        ray: address of a Ray cluster whose nodes run the trials, 'auto' or 'local'. A timed trial uses one of the
            resource specrl_device of its node, a trial whose worker was killed runs again, and none is pruned block by
            block; output_dir must be a directory that all nodes share.
        output_dir: where results are written; by default runs/study-<time>.

    Raises:
        ValueError: an argument out of range, a study that does not fit, or a device that is in use.

    Example:
        specrl study --spec learning_rate --output_dir runs/learning_rate
        specrl study --output_dir runs/learning_rate --trials 40
        specrl study --spec chooser --jobs 2
        specrl study --spec learner --ray 10.0.0.1:6379 --output_dir /shared/learner
    """
    import yaml  # type: ignore[import-untyped]

    need_optuna()
    out = OutputDir(output_dir or Path("runs/study"))
    saved = out.path / "study.yaml"
    asked = read_study(spec or (saved if saved.is_file() else "learner"))
    require(jobs >= 1, "jobs", "at least 1", jobs)
    require(trials is None or trials >= 1, "trials", "at least 1", trials)
    if jobs > 1 and (asked.device is not None or ray is not None):
        why = "with --ray the cluster decides how many trials run at once" if ray else "a timed trial needs its device"
        raise ValueError(f"{why}, so jobs must be 1, but got {jobs}; leave it out")
    url = storage or f"sqlite:///{(out.path / 'study.db').resolve()}"
    kept = open_study(asked, url)
    total = trials or kept.user_attrs.get("trials") or asked.trials
    kept.set_user_attr("trials", total)
    if not saved.is_file():
        out.write_text(saved.name, yaml.safe_dump(asked.to_dict(), sort_keys=False))
    done, _ = count_trials(kept)
    show(f"study {asked.name!r}: {done} of {total} trials finished" + (f"; {asked.about}" if asked.about else ""))
    try:
        if ray is None:
            with device_lock(asked), _helpers(asked, url, out.path, total, jobs):
                optimize(asked, url, out.path, total)
        else:
            from specrl.cluster.studies import trial_runner

            with trial_runner(ray, asked) as (run, slots):
                optimize(asked, url, out.path, total, run=run, jobs=slots)
    except KeyboardInterrupt:
        show(f"to continue: specrl study --output_dir {out.path}")
        raise
    found = write_report(kept, asked, out)
    show(*summarize(found, asked, url, out.path))
    return found


@contextmanager
def _helpers(spec: Study, url: str, directory: Path, total: int, jobs: int) -> Iterator[None]:
    """Other processes that run trials until `total` are finished; they end with this one."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_help, args=(spec, url, directory, total, n)) for n in range(1, jobs)]
    for process in others:
        process.start()
    try:
        yield
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()


def _help(spec: Study, url: str, directory: Path, total: int, worker: int) -> None:
    parent = multiprocessing.parent_process()
    optimize(spec, url, directory, total, worker=worker, wanted=lambda: parent is None or parent.is_alive())
