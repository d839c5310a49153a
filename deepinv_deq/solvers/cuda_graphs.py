r"""Evaluations of a map as a CUDA graph: one launch instead of one per operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.autocast import Autocast
from deepinv_deq.maps import AffineMap, Delegate, Map
from deepinv_deq.states import State, as_tuple

_WARM_UPS = 2  # libraries plan and allocate in the first calls
_REMEDY = (
    "It may read a number of a tensor, such as x.max().item(), have results whose size depends on values, such as x[x > 0], or copy "
    "one from the host. Use Solver(..., cuda_graphs=False)."
)


class _Graph(Protocol):
    def replay(self) -> None: ...


@torch.no_grad()
def graphed(f: Map, x: State) -> Map:
    r"""The map as a CUDA graph of states like ``x``; the map itself where there is no GPU, or where a graph would change what it does.

    Products with Jacobians are not captured, nor are maps that record their points, or that compute under autocast: PyTorch keeps the
    weights that it has cast in a cache, whose memory a graph would outlive.

    :param Map f: the map.
    :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
    :raises RuntimeError: if the map cannot be captured.
    """
    device = as_tuple(x)[0].device.type
    if not _has_graphs(device) or isinstance(f, AffineMap) or f.records or Autocast(device).dtype is not None:
        return f
    return _Graphed(f, x)


class _Graphed(Delegate):
    def __init__(self, f: Map, x: State):
        super().__init__(f)
        self._single = isinstance(x, Tensor)
        self._x = tuple(t.clone() for t in as_tuple(x))
        self._own = f.has_own_step
        function = f.step if self._own else f.__call__
        state, given = self._state, self._x  # no reference to self in what the graph is made of

        def work() -> tuple[Tensor, ...]:
            return as_tuple(function(state(given)))

        _refuse_synchronisation(work)
        try:
            self._graph, self._out = captured(work)
        except RuntimeError as error:
            raise RuntimeError(
                f"The map cannot be captured in a CUDA graph ({str(error).splitlines()[0]}). {_REMEDY} After a capture that failed, "
                "PyTorch may refuse to draw random numbers on this GPU until the process is started again."
            ) from error

    def _state(self, tensors: tuple[Tensor, ...]) -> State:
        return tensors[0] if self._single else tensors

    def _replay(self, x: State) -> State:
        for to, t in zip(self._x, as_tuple(x), strict=True):
            to.copy_(t)
        self._graph.replay()
        return self._state(tuple(t.clone() for t in self._out))  # the next replay writes to the same memory

    def __call__(self, x: Any) -> Any:
        return self._f(x) if self._own else self._replay(x)

    def step(self, x: Any) -> Any:
        return self._replay(x) if self._own else super().step(x)


def _refuse_synchronisation(work: Callable[[], Any]) -> None:
    r"""Raise if the work synchronises host and GPU, before it is captured.

    After a capture that failed, PyTorch 2.11 draws no random numbers on that GPU any more.
    """
    found: list[str] = []

    def listed(name: str, args: Any, kwargs: Any) -> bool:
        if _depends_on_values(name) or name in ("_to_copy", "copy_") and _between_devices(args, kwargs or {}):
            found.append(name)
        return not found

    work()  # the first evaluation may check and measure what the next ones need not
    with compat.dispatch_mode(listed) or contextlib.nullcontext():
        work()
    if found:
        raise RuntimeError(
            f"The map cannot be captured in a CUDA graph: its operation {found[0]} synchronises host and GPU. {_REMEDY}"
        )


@cache
def _depends_on_values(name: str) -> bool:
    r"""Whether an operation returns a number to the host, or a tensor whose size it must know first."""
    packet = getattr(torch.ops.aten, name, None)
    tags = {tag for o in packet.overloads() for tag in getattr(packet, o).tags} if packet is not None else set()
    return not tags.isdisjoint({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


def _between_devices(args: Any, kwargs: dict[str, Any]) -> bool:
    to = kwargs.get("device")
    devices = {torch.device(to).type} if to is not None else set()
    return len(devices | {t.device.type for t in args if isinstance(t, Tensor)}) > 1


def captured(work: Callable[[], tuple[Tensor, ...]]) -> tuple[_Graph, tuple[Tensor, ...]]:
    r"""A CUDA graph of some work, and the tensors that every replay writes its results to.

    :param Callable work: reads and writes the same memory in every call, and does not wait for the GPU.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads, such as one that pins memory for a data loader, may go on calling CUDA
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = work()
    return graph, out


def _has_graphs(device: str) -> bool:
    return device == "cuda" and torch.version.cuda is not None
