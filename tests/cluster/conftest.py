"""What the tests on a Ray cluster share: two nodes on this machine. They run by `make test-ray`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent, ROOT, ROOT / "tools")))  # for Ray's workers

from own_locks import own_locks  # noqa: E402, F401 - used by all tests

from specrl.cluster.connect import DEVICE, need_ray  # noqa: E402


def pytest_configure() -> None:
    try:
        need_ray(loopback=True)
    except ValueError as error:
        raise pytest.UsageError(f"these tests need Ray; run them with 'make test-ray' ({error})") from error


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes, which this process is connected to."""
    import ray
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {DEVICE: 1}, **node})
    cluster.add_node(num_cpus=2, resources={DEVICE: 1}, **node)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    cluster.wait_for_nodes(timeout=180)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()
