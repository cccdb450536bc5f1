"""Settings of online training on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster.

    Args:
        address: of the cluster, 'auto' or 'local'.
        engines: how many engines serve, each with its own requests and chooser.
        max_pending_calls: calls per engine that the learner has not answered yet; further traces are dropped and
            counted.
        engine_resource: resource of the cluster that each engine takes one of: 'CPU', 'GPU' or a name of your own.
        learner_resource: the same for the learner.

    Raises:
        ValueError: a number below 1.
    """

    address: str = "auto"
    engines: int = 1
    max_pending_calls: int = 2
    engine_resource: str = "CPU"
    learner_resource: str = "CPU"

    def __post_init__(self) -> None:
        for name in ("engines", "max_pending_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"ray.{name} must be at least 1, but got {getattr(self, name)}")
