"""What a GPU would do with a round's functions, on a machine without one.

`RecordedGraphs` replays recorded operations on the addresses they had, as a CUDA graph does, and spoils what other
graphs left in the pool they share. `fake_cuda` runs functions on CUDA tensors without memory: what would wait for the
device, or mix devices, raises.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specrl.decoding.cuda_graphs import Graphs

T = TypeVar("T")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")  # for the device


def tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def memory(tensor: Tensor) -> int:
    return id(tensor) if tensor.layout == torch._mkldnn else tensor.untyped_storage().data_ptr()  # type: ignore[attr-defined]


class Recorder(TorchDispatchMode):
    """Notes every operation, its arguments and what it yields."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def names(self) -> list[str]:
        """Of the operations that do work: views are none."""
        return [func.overloadpacket.__name__ for func, *_ in self.operations if not func.is_view]


class RecordedGraphs(Graphs):
    """Graphs on a CPU: a replay knows the addresses and host values of the capture, and nothing else."""

    made: list[RecordedGraphs] = []

    def __init__(self, device: str, *, max_graphs: int = 256, pool: object = None) -> None:
        super().__init__(device, max_graphs=max_graphs, pool=pool)
        self.replays, self.ran_uncaptured, self.inside = 0, 0, False
        self._latest: dict[int, Tensor] = {}
        self.made.append(self)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def capture(self, key: Hashable, function: Callable[[], object]) -> None:
        if key in self:
            return
        function()
        with Recorder() as recorder:
            out = function()
        names = recorder.names()
        assert not set(WAITS) & set(names) and not [n for n in names if "rand" in n or "uniform" in n], names
        made: dict[int, Tensor] = {}  # memory of the graph's own, by address
        outside: set[int] = set()
        for func, args, kwargs, result in recorder.operations:
            outside |= {memory(t) for t in tensors((args, kwargs)) if memory(t) not in made}
            made |= {memory(t): t for t in tensors(result) if memory(t) not in outside and not func.is_view}
        self._held[key] = (recorder.operations, made), out

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        if key not in self._held:
            self.ran_uncaptured += 1
            return function()
        (operations, made), out = self._held[key]
        self.inside = True
        if self._latest is not made:  # every other's are spoilt already
            for tensor in self._latest.values():
                if tensor.layout == torch.strided:
                    tensor.untyped_storage().fill_(0x7F)  # type: ignore[attr-defined]
        self._latest = made
        for func, args, kwargs, result in operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if memory(old) != memory(new):
                    old.copy_(new)
        self.inside, self.replays = False, self.replays + 1
        return out


class OnDevice(TorchDispatchMode):
    """Raises an AssertionError where an operation reads or makes a tensor off the GPU: a copy from or to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors((args, kwargs, out)):
            assert tensor.device.type == "cuda", f"{func} has to do with a tensor of the host"
        return out


class _Indexing(TorchFunctionMode):
    """`x[index]` and `copy_` by operations: torch without CUDA refuses them in Python even for fake CUDA tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            view, indices = _view(*args)
            return torch.ops.aten.index.Tensor(view, indices) if indices else view
        if func is Tensor.__setitem__:
            view, indices = _view(*args[:2])
            if indices:
                torch.ops.aten.index_put_.default(view, indices, args[2])
            else:
                torch.ops.aten.copy_.default(view, args[2])
            return None
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _view(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that all but the tensors of an index make, and those tensors by dimension."""
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [item for item in index if not isinstance(item, Tensor)]:
        at = next(i for i, item in enumerate(index) if item is Ellipsis)
        missing = x.ndim - sum(item is not None and item is not Ellipsis for item in index)
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    found: list[Tensor | None] = []
    for item in index:
        at = len(found)
        if isinstance(item, int):
            x = x.select(at, item)
        elif item is None:
            x = x.unsqueeze(at)
            found.append(None)
        elif isinstance(item, slice):
            x = torch.ops.aten.slice.Tensor(x, at, item.start, item.stop, item.step or 1)
            found.append(None)
        else:
            found.append(item)
    return x, found if any(item is not None for item in found) else []


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Tensors made here have shapes and devices, but no entries."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, _Indexing(), torch.inference_mode():
        yield mode
