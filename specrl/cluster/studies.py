"""Trials of a study on a Ray cluster: Ray runs `run_trial`, and the process that started the study asks Optuna."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specrl.cluster.connect import DEVICE, connected, need_resource, take_one
from specrl.studies.config import Study
from specrl.studies.goals import Measured, OnBlock
from specrl.studies.trial import RunTrial, run_trial

RETRIES = 2  # of a trial whose worker was killed


@contextmanager
def trial_runner(address: str, study: Study, *, run: RunTrial = run_trial) -> Iterator[tuple[RunTrial, int]]:
    """Yield a function that runs one trial on the cluster and waits for it, and the number of parallel trials.

    A timed trial uses one `specrl_device` of its node, other trials one CPU. A trial whose worker was killed runs
    again. Blocks are not reported while a trial runs, so none is pruned.

    Args:
        address: of the cluster (see `connected`).
        study: the study of the trials; every node must find their directories at the same path.
        run: the function that a worker calls.

    Raises:
        ValueError: no such cluster, or it has no resource for a trial.
    """
    with connected(address):
        import ray

        resource = DEVICE if study.device is not None else "CPU"
        need_resource(resource, 1, "trials")
        task = ray.remote(run).options(**take_one(resource), max_retries=RETRIES)

        def run_there(
            study: Study, params: Mapping[str, Any], directory: Path, on_block: OnBlock | None = None
        ) -> Measured:
            try:
                measured: Measured = ray.get(task.remote(study, dict(params), directory.resolve()))
            except ray.exceptions.WorkerCrashedError as error:
                raise RuntimeError(f"its worker was killed {RETRIES + 1} times") from error
            return measured

        yield run_there, int(ray.cluster_resources()[resource])
