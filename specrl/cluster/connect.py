"""Connects to a running Ray cluster, or starts one on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from specrl.core.checks import require

DEVICE = "specrl_device"  # custom resource of a timed trial; a node has one for each device
_ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster.

    Args:
        address: of the cluster, 'auto' or 'local'.
        engines: number of engines that serve, each with its own requests and chooser.
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
        require(self.engines >= 1, "ray.engines", "at least 1", self.engines)
        require(self.max_pending_calls >= 1, "ray.max_pending_calls", "at least 1", self.max_pending_calls)


def need_ray(*, loopback: bool = False) -> None:
    """Import Ray without its warnings and usage reports; raise a ValueError if it is not installed.

    With `loopback`, nodes that this process starts listen on loopback only, unless Ray is imported already.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # hide GPUs from actors that ask for none
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if loopback:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--ray needs Ray, but got {error}; 'pip install specrl[ray]'") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster; nothing happens if it is connected already.

    `address` is host:port of the head of a running cluster, 'auto' for the one on this machine, or 'local' to start one
    on this machine that listens on loopback only, has no dashboard and ends with the context.

    Raises:
        ValueError: Ray is not installed, or no such cluster runs.
    """
    need_ray(loopback=address == "local")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options |= {"include_dashboard": False, "dashboard_host": "127.0.0.1", "resources": {DEVICE: 1}}
    try:
        if address not in ("local", "auto"):
            check_listens(address)
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--ray must be the address of a running cluster, 'auto' or 'local', but got {address!r}: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def check_listens(address: str) -> None:
    """Raise an OSError or a ValueError if nothing listens at 'host:port'; Ray itself would try for minutes."""
    head = urlsplit(address if "://" in address else f"//{address}")
    socket.create_connection((head.hostname or "", head.port or 0), timeout=_ANSWER_TIMEOUT_S).close()


def take_one(resource: str) -> dict[str, Any]:
    """Return Ray's options for an actor or task with one CPU, and one GPU or one custom resource, of its node."""
    others: dict[str, dict[str, Any]] = {"CPU": {}, "GPU": {"num_gpus": 1}}
    return {"num_cpus": 1, **others.get(resource, {"resources": {resource: 1}})}


def need_resource(resource: str, count: int, purpose: str) -> None:
    """Raise a ValueError if the cluster has less than `count` of a resource; Ray itself would wait for it."""
    import ray

    available = ray.cluster_resources().get(resource, 0.0)
    if available < count:
        option = "" if resource in ("CPU", "GPU") else f" --resources='{{\"{resource}\": 1}}'"
        raise ValueError(
            f"{purpose} need {count} of the resource {resource!r}, but the cluster has {available:g}; ask for fewer, "
            f"or add nodes by 'ray start --address=...{option}'"
        )
