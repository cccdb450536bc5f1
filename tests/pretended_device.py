"""A pretended device: its tensors are computed on the CPU, but must not be mixed with the CPU's, as on a GPU.

It is a backend for torch's 'privateuseone' in Python: every operation checks the devices and computes on the CPU.
(`FakeTensorMode` cannot differentiate without CUDA, and has no values.) `install` changes the process permanently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretended"
_MAY_MIX = frozenset({"aten::copy_", "aten::_to_copy"})  # between devices; an index may come from the CPU, too
_IN_BFLOAT16 = ("linear", "matmul", "mm", "bmm")  # under autocast, as on CUDA
_kept: list[object] = []


class Pretended(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        strides, offset, device = inner.stride(), inner.storage_offset(), torch.device(NAME, 0)
        out: Pretended = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=strides, storage_offset=offset, dtype=inner.dtype, device=device
        )
        out.held = inner
        return out

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Handles `torch.tensor`, which bypasses the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(torch.device(NAME, 0))
        return func(*args, **kwargs)


class _Everywhere(TorchDispatchMode):
    """Handles operations that make new tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Pretended)]
    name, asked = func._schema.name, kwargs.get("device")
    on_it = bool(there)
    if asked is not None:
        on_it, kwargs = torch.device(asked).type == NAME, {**kwargs, "device": torch.device("cpu")}
    elif name == "aten::copy_":
        on_it = isinstance(args[0], Pretended)
    met = [] if name in _MAY_MIX else [x for x in tensors if not isinstance(x, Pretended) and x.ndim]
    if name == "aten::index" and isinstance(args[0], Pretended):
        met = []
    if there and met:
        raise RuntimeError(f"{name}: {len(there)} tensors on the device meet {list(met[0].shape)} on the CPU")
    inner_args, inner_kwargs = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if not on_it:
        return out
    known = {id(x.held): x for x in there}  # in-place operations return what they were given
    return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else Pretended(x), out)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> None:
    """Register the device, for the rest of the process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    products = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in _IN_BFLOAT16:
        products.impl(name, _cast_first(getattr(torch.ops.aten, name)))
    _kept.extend([others, products])


def _cast_first(operation: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        key = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*(x.to(torch.bfloat16) if isinstance(x, Tensor) else x for x in args))

    return call


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Allow computations on the device in this thread."""
    with _FromData(), _Everywhere(), torch.autograd.set_multithreading_enabled(False):
        yield torch.device(NAME, 0)
