r"""Exact memory: the bytes of all tensors that are alive, at their peak, whatever the allocator and the system make of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    r"""Watches every operation inside a ``with`` block and adds up the storages that were made in it and are still alive.

    What an operation uses for itself (a convolution's workspace) is not seen. The attribute ``peak`` is in bytes.

    |sep|

    :Example:

    >>> import torch
    >>> from tests.benchmarks.live_bytes import LiveBytes
    >>> with LiveBytes() as memory:
    ...     a = torch.zeros(1000)
    ...     b = a.exp()[:10]
    ...     del a, b
    ...     c = torch.zeros(1500)
    >>> memory.peak
    8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            storage = t.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size and address not in given | self._alive:
                self._alive.add(address)
                self.now += size
                weakref.finalize(storage, self._gone, address, size)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.layout == torch.strided]
