"""Wrong addresses and resources are refused at once."""

from __future__ import annotations

import pytest

from specrl.cluster.connect import check_listens, need_resource


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:none"])
def test_an_address_where_nothing_listens(address: str) -> None:
    with pytest.raises((OSError, ValueError)):
        check_listens(address)


@pytest.mark.parametrize("resource", ["CPU", "specrl_device", "unknown"])
def test_more_than_the_cluster_has(two_nodes: str, resource: str) -> None:
    with pytest.raises(ValueError, match=f"engines need 9 of the resource '{resource}'"):
        need_resource(resource, 9, "engines")
