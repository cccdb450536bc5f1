"""Models of a GPU that runs the functions of a round, for a machine without one.

`RecordedGraphs` replays recorded operations at their addresses, as a CUDA graph does, and overwrites the results of
other graphs in the pool that they share. `fake_cuda` runs functions on CUDA tensors without memory: operations that
wait for the device, or mix devices, raise an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
Operation = tuple[Any, Any, Any, Any]  # the function, its arguments, keyword arguments and result
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")  # for the device


def tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def memory(tensor: Tensor) -> int:
    return id(tensor) if tensor.layout == torch._mkldnn else tensor.untyped_storage().data_ptr()  # type: ignore[attr-defined]


class Recorder(TorchDispatchMode):
    """Records every operation, its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def names(self) -> list[str]:
        """Names of the operations, without views."""
        return [func.overloadpacket.__name__ for func, *_ in self.operations if not func.is_view]


class RecordedGraphs:
    """Stands for `specrl.decoding.cuda_graphs.Graphs`: a replay knows only the addresses and values of the capture."""

    made: list[RecordedGraphs] = []
    captures = False  # memory of the host is not pinned

    def __init__(self, device: str, *, pool: object = None) -> None:
        self.replays, self.ran_uncaptured, self.inside = 0, 0, False
        self.graphs: dict[Hashable, tuple[list[Operation], dict[int, Tensor], Any]] = {}
        self._latest: dict[int, Tensor] = {}
        self.made.append(self)

    def __len__(self) -> int:
        return len(self.graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.graphs

    def capture(self, key: Hashable, function: Callable[[], object]) -> None:
        if key in self:
            return
        function()
        with Recorder() as recorder:
            out = function()
        names = recorder.names()
        assert not set(WAITS) & set(names) and not [n for n in names if "rand" in n or "uniform" in n], names
        made: dict[int, Tensor] = {}  # the graph's own memory, by address
        outside: set[int] = set()
        for func, args, kwargs, result in recorder.operations:
            outside |= {memory(t) for t in tensors((args, kwargs)) if memory(t) not in made}
            made |= {memory(t): t for t in tensors(result) if memory(t) not in outside and not func.is_view}
        self.graphs[key] = recorder.operations, made, out

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        if key not in self.graphs:
            self.ran_uncaptured += 1
            return function()
        operations, made, out = self.graphs[key]
        self.inside = True
        if self._latest is not made:  # the memory of all other graphs is overwritten already
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
        return cast(T, out)


class OnDevice(TorchDispatchMode):
    """Raises an AssertionError if an operation reads or makes a tensor of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors((args, kwargs, out)):
            assert tensor.device.type == "cuda", f"{func} uses a tensor of the host"
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
    """The view of an index without its tensors, and these tensors by dimension."""
    index = index if isinstance(index, tuple) else (index,)
    missing = x.ndim - sum(item is not None and item is not Ellipsis for item in index)
    tensors: list[Tensor | None] = []
    for item in index:
        dim = len(tensors)
        if isinstance(item, int):
            x = x.select(dim, item)
        elif item is None:
            x = x.unsqueeze(dim)
        elif isinstance(item, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, item.start, item.stop, item.step or 1)
        if item is Ellipsis:
            tensors += [None] * missing
        elif not isinstance(item, int):
            tensors.append(item if isinstance(item, Tensor) else None)
    return x, tensors if any(item is not None for item in tensors) else []


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Make tensors with shapes and devices, but without entries."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, _Indexing(), torch.inference_mode():
        yield mode
