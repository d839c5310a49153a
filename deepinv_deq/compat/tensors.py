r"""Private names of tensors and operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deepinv_deq.compat.names import find


def dispatch_mode(listed: Callable[[str, Any, Any], bool]) -> Any:
    r"""A context manager that passes the name and the arguments of every operation inside to a function.

    Its attribute ``certain`` tells whether the function returned True for all. Without the name: ``None``, and batches are solved
    whole.
    """
    base = find("torch.utils._python_dispatch.TorchDispatchMode")
    if base is None:
        return None

    class Watching(base):  # type: ignore[misc, valid-type]
        certain = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.certain = self.certain and listed(func.overloadpacket.__name__, args, kwargs)
            return func(*args, **(kwargs or {}))

    return Watching()


def version(t: Tensor) -> int | None:
    r"""How often a tensor was changed in place; ``None`` for inference tensors, which do not count.

    Without the name: ``None``, and changes in place are not noticed.
    """
    return None if t.is_inference() else getattr(t, "_version", None)


def sparse_pieces(t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Indices and values of a COO tensor. Without the names: after summing entries of the same index."""
    if not hasattr(t, "_indices") or not hasattr(t, "_values"):
        t = t.coalesce()
        return t.indices(), t.values()
    return t._indices(), t._values()
