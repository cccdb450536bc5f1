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
    learner's settings) and chooser (simulated).

    The same command continues an interrupted study; completed and pruned trials count as `trials`. A trial whose
    process was killed runs again with the same parameters, up to twice. Live trials are timed, so one runs at a time on
    a device; simulated ones may run in several processes, by --jobs or by the same command started again.

    Args:
        spec: a ready-made study's name or a YAML file; by default the one in output_dir, else 'learner'.
        trials: completed or pruned trials that the study ends with; by default as before, else as its file says.
        jobs: processes; more than 1 for simulated trials only.
        storage: Optuna's, such as postgresql://user:password@host/name; by default study.db in output_dir.
        ray: address of a Ray cluster whose nodes run the trials, 'auto' or 'local'. A timed trial uses one of the
            resource specrl_device of its node; no trial is pruned; all nodes must share output_dir.
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
    settings = read_study(spec or (saved if saved.is_file() else "learner"))
    require(jobs >= 1, "jobs", "at least 1", jobs)
    require(trials is None or trials >= 1, "trials", "at least 1", trials)
    alone = settings.device is not None or ray is not None
    require(jobs == 1 or not alone, "jobs", "1 for timed trials and with --ray", jobs)
    url = storage or f"sqlite:///{(out.path / 'study.db').resolve()}"
    search = open_study(settings, url)
    total = trials or search.user_attrs.get("trials") or settings.trials
    search.set_user_attr("trials", total)
    if not saved.is_file():
        out.write_text(saved.name, yaml.safe_dump(settings.to_dict(), sort_keys=False))
    done, _ = count_trials(search)
    show(f"study {settings.name!r}: {done} of {total} trials finished", *filter(None, [settings.about]))
    try:
        if ray is None:
            with device_lock(settings), _worker_processes(settings, url, out.path, total, jobs):
                optimize(settings, url, out.path, total)
        else:
            from specrl.cluster.studies import trial_runner

            with trial_runner(ray, settings) as (run, slots):
                optimize(settings, url, out.path, total, run=run, jobs=slots)
    except KeyboardInterrupt:
        show(f"to continue: specrl study --output_dir {out.path}")
        raise
    results = write_report(search, settings, out)
    show(*summarize(results, settings, url, out.path))
    return results


@contextmanager
def _worker_processes(spec: Study, url: str, directory: Path, total: int, jobs: int) -> Iterator[None]:
    """Run trials in `jobs` - 1 more processes until `total` are finished; they end with this one."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(spec, url, directory, total, n)) for n in range(1, jobs)]
    for process in workers:
        process.start()
    try:
        yield
        for process in workers:
            process.join()
    finally:
        for process in workers:
            process.terminate()


def _work(spec: Study, url: str, directory: Path, total: int, worker: int) -> None:
    parent = multiprocessing.parent_process()
    optimize(spec, url, directory, total, worker=worker, wanted=lambda: parent is None or parent.is_alive())
