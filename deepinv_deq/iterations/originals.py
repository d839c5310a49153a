r"""Whether an evaluation of a replica writes to what the user keeps, and reads its own copy of it."""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.iterations.objects import LIBRARIES, SHARED, library
from deepinv_deq.iterations.replica import Replica
from deepinv_deq.states import State, as_tuple

_CONTAINERS = (dict, list, set, deque)
_ROUNDING, _MISSING = 1e-3, object()
_FACTORS = itertools.cycle((1.1, 0.9))  # another point each time: at the same point, what was written is what was there


class Originals:
    r"""What was replicated, to be compared before and after the first evaluation.

    An evaluation may write to a dictionary through a global variable, a class or the closure of a method, and read it as an attribute.
    The attribute is that of the replica, so that it would read what was there before. A write alone is no error: it may be a record.

    :param Iterable pairs: originals with their replicas.
    :param Callable renewed: replicates the user's objects as they are then.
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]], renewed: Callable[[], Replica]):
        self._replicated = [value for value, twin in pairs if twin is not value]
        self._known, self._renewed = list[tuple[Any, _Contents]](), renewed

    def note(self) -> None:
        r"""Note the contents."""
        bases = {base for value in self._replicated for base in type(value).__mro__ if library(base) not in LIBRARIES}
        self._known = [(value, _Contents(value)) for value in (*self._replicated, *bases)]

    @torch.no_grad()
    def refuse_stale(self, x: State, evaluate: Callable[[Replica | None, State], State]) -> None:
        r"""Compare two further evaluations, with and without what was written, if an evaluation wrote to what was noted. Numbers and
        texts do not count.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: the point of the evaluation.
        :param Callable evaluate: evaluates a replica of the user's objects; for ``None``, of these objects as they were when the map was bound.
        :raises RuntimeError: if the results differ.
        """
        if all(_Contents(value).same(before) for value, before in self._known):
            return
        factor = next(_FACTORS)
        elsewhere = tuple(factor * t + 0.1 for t in as_tuple(x))
        point = elsewhere[0] if isinstance(x, Tensor) else elsewhere
        # before the objects are replicated, since it writes to them at this point
        without = as_tuple(evaluate(None, point))
        with_it = as_tuple(evaluate(self._renewed(), point))
        if any(float((a - b).norm()) > _ROUNDING * float(b.norm()) for a, b in zip(without, with_it, strict=True)):
            raise RuntimeError(_STALE)


class _Contents:
    r"""What a container or an object holds, with the names of attributes. The objects stay alive."""

    def __init__(self, value: Any):
        items: list[tuple[Any, Any]] = []
        if isinstance(value, _CONTAINERS):
            items = list(enumerate(value.values() if isinstance(value, dict) else value))
        if hasattr(value, "__dict__"):
            items += dict(vars(value)).items()
        kept = [item for item in items if type(item[1]) not in SHARED]
        self._names, self._objects = [name for name, _ in kept], [item for _, item in kept]

    def same(self, other: _Contents) -> bool:
        r"""Whether the names are the same, and the objects are."""
        return self._names == other._names and all(map(operator.is_, self._objects, other._objects))


_STALE = (
    "An evaluation of the iteration wrote to an object through a global variable, a class, a closure or an object that a hook belongs to, and "
    "read another value of it. Each map has a copy of what the iteration keeps as attributes. Write to the attribute of the module itself "
    "(self.name), or keep the object in one place only."
)


def has_stored(used: Replica, pristine: Replica) -> bool:
    r"""Whether numbers or tensors were stored on the iteration, or numbers on the physics. Integers do not count: they may be counters.

    :param Replica used: the replica on which ``constants`` or ``init`` were called.
    :param Replica pristine: the replica of which it is one.
    """
    plain = bool, float, complex, str, type(None)
    for mine, theirs, kinds in zip(used.roots, pristine.roots, ((*plain, Tensor), plain), strict=True):
        for name, value in vars(mine).items():
            before = vars(theirs).get(name, _MISSING)
            if value is not before and type(value) in kinds and not (type(before) in plain and value == before):
                return True
    return False
