"""A Ray cluster: one that is there, or one of this machine for as long as it is needed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray binds to loopback, as by default on other systems
DEVICE = "specrl_device"  # the custom resource that a timed trial owns: a node has one for each device
_ANSWERS_WITHIN_S = 5.0
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without a GPU sees none; said once, not warned of
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths mean in a trial what they mean here
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
}


def need_ray(*, loopback: bool = False) -> None:
    """Import Ray and quieten it.

    Args:
        loopback: nodes that this process starts are of this machine alone; to be asked for before Ray is imported.

    Raises:
        ValueError: it is not installed.
    """
    for name, value in (_QUIET | ({_LOOPBACK_ONLY: "0"} if loopback else {})).items():
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--ray needs Ray, but got {error}; 'pip install specrl[ray]'") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster at `address` meanwhile; where this process is one already, it stays one.

    Args:
        address: host:port of a running cluster's head, 'auto' for the one that runs on this machine, or 'local': one of
            this machine alone, bound to loopback, without a dashboard, that ends with the block.

    Raises:
        ValueError: Ray is not installed, or no cluster is there.
    """
    need_ray(loopback=address == "local")
    import ray

    if ray.is_initialized():
        yield
        return
    if address not in ("local", "auto"):
        _check_listens(address)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address == "local":
            one = {DEVICE: 1}  # timed trial at once
            ray.init("local", include_dashboard=False, dashboard_host=LOOPBACK, resources=one, **common)
        else:
            ray.init(address, **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--ray must be the address of a cluster that runs, 'auto' or 'local', but got {address!r}: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Refuse at once an address where nobody listens: Ray tries for minutes, and says so in many lines."""
    head = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((head.hostname or "", head.port or 0), timeout=_ANSWERS_WITHIN_S).close()
    except (OSError, ValueError) as error:  # a ValueError: a port that is none
        raise ValueError(
            f"--ray must be the address of a cluster that runs, 'auto' or 'local', but got {address!r}: {error}"
        ) from error


def one_of(resource: str) -> dict[str, Any]:
    """Options of an actor or a task that owns one CPU, one GPU or one of a custom resource of its node."""
    kinds: Mapping[str, dict[str, Any]] = {
        "CPU": {"num_cpus": 1},
        "GPU": {"num_cpus": 1, "num_gpus": 1},
    }
    return dict(kinds.get(resource, {"num_cpus": 1, "resources": {resource: 1}}))


def need_resource(resource: str, count: int, for_what: str) -> None:
    """Refuse what could never be placed, instead of waiting for it.

    Raises:
        ValueError: the cluster has less of it.
    """
    import ray

    have = ray.cluster_resources().get(resource, 0.0)
    if have < count:
        given = "" if resource in ("CPU", "GPU") else f" --resources='{{\"{resource}\": 1}}'"
        raise ValueError(
            f"{for_what} need {count} of the resource {resource!r}, but the cluster has {have:g}; ask for fewer, or "
            f"add nodes by 'ray start --address=...{given}'"
        )
