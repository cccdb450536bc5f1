"""Serving until a run is over, with checkpoints."""

from __future__ import annotations

import math

from specrl.training.config import CheckpointConfig, ServingConfig
from specrl.training.logger import Reporter


def serve(report: Reporter, serving: ServingConfig, checkpoint: CheckpointConfig) -> None:
    """Serve until enough requests have finished or the time is over, with a checkpoint at the end.

    Args:
        report: the run, its directory, and its log.
        serving: `requests` to finish, including those before a resumption, or `max_seconds` of this call, which is
            checked after each round.
        checkpoint: when to write checkpoints.
    """
    run, clock = report.run, report.run.loop.engine.clock
    deadline = clock.now() + (math.inf if serving.max_seconds is None else serving.max_seconds)
    saved, done = run.served, run.served >= serving.requests
    while not done:
        run.loop.step()
        done = run.served >= serving.requests or clock.now() >= deadline
        if done or run.served - saved >= checkpoint.interval:
            saved = run.served
            run.loop.end_session()
            report.line()
            run.save(report.directory.path, seconds=report.seconds, replay=checkpoint.keep_replay_buffer)
            if not done:
                run.loop.start_session()
        else:
            report.maybe()
    report.last()
