r"""Maps as solvers see them: of ``(B, N)`` matrices, counted, restricted to some samples, with an approximate inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from deepinv_deq._states import WORTH, Layout, Rows, State
from deepinv_deq.maps import AffineMap


@runtime_checkable
class SeparableMap(Protocol):
    r"""A map of batches that can be restricted to some samples, so that a solver need not evaluate all of them."""

    def separable(self, x: Any, fx: Any = None) -> bool:
        r"""Whether :meth:`select` is faithful, told by evaluations at the state ``x``, whose image is ``fx`` if known."""

    def select(self, rows: Rows) -> Callable[[Any], Any]:
        r"""The map of the samples ``rows``, in a batch of their own."""


def preconditioner(f: Any, x: State) -> Callable[[Any], Any] | None:
    r"""What a map offers as an approximate inverse of the identity minus its Jacobian, for states like ``x``."""
    offered = getattr(f, "preconditioner", None)
    return None if offered is None else offered(x)


class FlatMap:
    r"""A map of states as a map of ``(B, N)`` matrices that counts its evaluations, and what they cost in samples."""

    def __init__(self, f: Callable[[Any], Any], layout: Layout, count: list[int] | None = None):
        self._f, self._layout, self._count = f, layout, [0, 0] if count is None else count
        # no method of self: the cycle would keep the graph that f holds alive until the garbage collector comes
        self._evaluate = _counting(f.linear if isinstance(f, AffineMap) else f, layout, self._count)
        if isinstance(f, AffineMap):
            self.linear, self.offset = self._evaluate, layout.pack(f.offset)
        self.precondition: Callable[[Tensor], Tensor] | None = None

    def use(self, precondition: Callable[[Any], Any] | None) -> None:
        r"""Let solvers use a map of states near to the inverse of the identity minus the Jacobian."""
        layout = self._layout
        self.precondition = precondition and (lambda r: layout.pack(precondition(layout.unpack(r))))

    @property
    def evaluations(self) -> int:
        r"""Calls of the map."""
        return self._count[0]

    @property
    def samples(self) -> int:
        r"""Evaluations of single samples."""
        return self._count[1]

    def __call__(self, x: Tensor, tau: float = 1.0) -> Tensor:  # TorchDEQ's own plain iteration damps by tau
        fx = self._evaluate(x) + self.offset if isinstance(self._f, AffineMap) else self._evaluate(x)
        return fx if tau == 1.0 else tau * fx + (1 - tau) * x

    def subset(self, rows: Tensor, x: Tensor, fx: Tensor) -> FlatMap | None:
        r"""The map of some samples, if it is worth it and possible; ``x`` and its image ``fx`` are those of all samples."""
        f, layout = self._f, self._layout
        if x.numel() < WORTH or layout.batch == 1 or not isinstance(f, SeparableMap):
            return None
        if not f.separable(layout.unpack(x), layout.unpack(fx)):
            return None
        part, part_layout = f.select(rows), layout.select(rows)
        flat = FlatMap(part, part_layout, self._count)
        flat.use(self.precondition and preconditioner(part, part_layout.unpack(x[rows])))
        return flat


def _counting(f: Callable[[Any], Any], layout: Layout, count: list[int]) -> Callable[[Tensor], Tensor]:
    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        count[1] += x.shape[0]
        return layout.pack(f(layout.unpack(x)))

    return counted
