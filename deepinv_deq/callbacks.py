r"""Functions that a model calls after every solve."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch.utils.hooks import RemovableHandle

from deepinv_deq.implicit.hook import OnSolve as OnSolve
from deepinv_deq.solvers import SolverStat


class Callbacks:
    r"""Functions that are called after every solve. They are not part of the model's state: copies have none."""

    def __init__(self) -> None:
        self._functions: OrderedDict[int, OnSolve] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Callbacks, ()

    def add(self, callback: OnSolve) -> RemovableHandle:
        r"""Call a function after every solve from now on.

        :param Callable callback: called as ``callback(which, stat)``.
        :return: a handle; ``handle.remove()`` ends it.
        :raises TypeError: if it cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"on_solve needs a function callback(which, stat), got {type(callback).__name__}.")
        handle = RemovableHandle(self._functions)
        self._functions[handle.id] = callback
        return handle

    def __call__(self, which: str, stat: SolverStat) -> None:
        for function in list(self._functions.values()):  # a callback may remove itself
            function(which, stat)
