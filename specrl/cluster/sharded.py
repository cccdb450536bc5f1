"""A draft in shards: each process keeps its rows of every tensor, and what is made of them is in shards too.

A learner holds 24 bytes for a weight: the weight, its running average, the copy to return to, AdamW's two moments and
the gradient. Each process then keeps its part of all of these (ZeRO, Rajbhandari et al., 2020, arXiv:1910.02054); the
whole weights and gradients, 8 bytes, are there during an update only. The shards are torch's `DTensor`, which its
optimisers, norms and copies know, so the learner is the same one.

All of these are asked for by every process of the group of `torch.distributed` at once, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from specrl.models.draft import Draft


def sharded(draft: Draft) -> Draft:
    """The draft in shards; its vocabulary map stays whole."""
    fixed = ("d2t", "t2d")
    return Draft(draft.config, {n: t if n in fixed else to_shard(t) for n, t in draft.tensors.items()})


def to_shard(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that every process has; a single number stays whole."""
    if tensor.ndim == 0:
        return tensor
    mesh = init_device_mesh(tensor.device.type, (torch.distributed.get_world_size(),))
    shard = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)  # each takes from its own: nothing is sent
    return shard.clone()  # else a view that keeps the whole


def to_whole(tensor: Tensor) -> Tensor:
    """All rows (all-gather); a tensor that is not in shards is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean(gradient: Tensor, like: Tensor) -> Tensor:
    """The mean of every process's gradient, whole (all-reduce), or in shards where `like` is (reduce-scatter)."""
    parts = torch.distributed.get_world_size()
    if isinstance(like, DTensor):
        whole = DTensor.from_local(gradient, like.device_mesh, [Partial()], run_check=False)
        return whole.redistribute(like.device_mesh, like.placements).div_(parts)
    torch.distributed.all_reduce(gradient)
    return gradient.div_(parts)
