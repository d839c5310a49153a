r"""A stand-in for an accelerator: tensors that are said to be on another device, and cannot be mixed with those on the CPU.

Their values are on the CPU. That device is PyTorch's ``"meta"``, because autograd knows it on every machine. Code that makes a tensor
on the wrong device fails here as it does on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_ACROSS = {"copy_", "index", "index_put", "index_put_", "_to_copy", "equal"}  # take tensors of several devices


class ThereTensor(Tensor):
    r"""A tensor whose values are in ``here``, on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> ThereTensor:
        here = here.resolve_conj().resolve_neg()  # the wrapper does not know these bits
        sparse = here.layout is torch.sparse_csr
        where = {} if sparse else {"strides": here.stride(), "storage_offset": here.storage_offset()}
        out = Tensor._make_wrapper_subclass(cls, here.size(), dtype=here.dtype, device=DEVICE, **where)
        out.here = here
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _apply(function, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ThereTensor({self.here})"

    def tolist(self) -> Any:
        return self.here.tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or DEVICE)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _apply(function, args, kwargs or {})


def _apply(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, ThereTensor)]
    name, device = function.overloadpacket.__name__, kwargs.get("device")
    if there and name not in _ACROSS:
        for t in tensors:
            if t.ndim and not isinstance(t, ThereTensor):
                raise RuntimeError(
                    f"{name} was given a tensor of shape {tuple(t.shape)} on the CPU, and others on {DEVICE}."
                )
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = kwargs | {"pin_memory": False} if "pin_memory" in kwargs else kwargs
    known = {id(t.here): t for t in there}
    out = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name in ("_local_scalar_dense", "is_nonzero"):
        return out
    if name in ("copy_", "index_put_"):
        goes = isinstance(args[0], ThereTensor)
    else:
        goes = bool(there) if device is None else torch.device(device).type == DEVICE.type
    if not goes:
        return out
    # what is changed in place stays the same object
    return tree_map(lambda t: known[id(t)] if id(t) in known else ThereTensor(t) if isinstance(t, Tensor) else t, out)


def _here(t: Any) -> Any:
    return t.here if isinstance(t, ThereTensor) else t


def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    r"""Group norm of basic operations: before PyTorch 2.14 its own has no second derivative of tensor subclasses."""
    grouped = x.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    normal = ((grouped - mean) * (variance + eps).rsqrt()).reshape(x.shape)
    weight, bias = (t.reshape(-1, *[1] * (x.ndim - 2)) for t in (weight, bias))
    return normal * weight + bias


@contextlib.contextmanager
def accelerator(monkeypatch: Any) -> Iterator[torch.device]:
    r"""Inside of it, ``"meta"`` is an accelerator. Generators of random numbers and autocast are those of the CPU."""
    tensor, generator, autocast = torch.tensor, torch.Generator, torch.autocast
    enabled, autocast_type = torch.is_autocast_enabled, torch.get_autocast_dtype

    def moved(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        out = tensor(data, dtype=dtype)
        return (out if device is None else out.to(device)).requires_grad_(requires_grad)

    def as_moved(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(data, Tensor):
            return data.to(device=data.device if device is None else device, dtype=dtype or data.dtype)
        return moved(data, dtype=dtype, device=device)

    class Kind(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, generator)

    class Generator(metaclass=Kind):
        def __new__(cls, device: Any = "cpu"):
            return generator()

    def no_autocast(device: str, *args: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if device == DEVICE.type else autocast(device, *args, **options)

    if torch.__version__ < torch.torch_version.TorchVersion("2.14"):
        monkeypatch.setattr(torch.nn.functional, "group_norm", _group_norm)
    monkeypatch.setattr(torch, "tensor", moved)
    monkeypatch.setattr(torch, "as_tensor", as_moved)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", no_autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *on: enabled(*on) if on != (DEVICE.type,) else False)
    monkeypatch.setattr(
        torch, "get_autocast_dtype", lambda on: torch.float32 if on == DEVICE.type else autocast_type(on)
    )
    with _Mode():
        yield DEVICE
