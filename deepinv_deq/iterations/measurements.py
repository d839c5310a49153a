r"""Whether measurements fit a physics, and whether they are left as they were."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from deepinv.physics import Physics
from torch import Tensor, nn

from deepinv_deq.compat import version
from deepinv_deq.iterations.replica import Replica
from deepinv_deq.states import as_tuple

_LIMIT = 64  # measurement shapes remembered per physics


@contextlib.contextmanager
def unwritten(y: Any, physics: Any, iteration: Any) -> Iterator[None]:
    r"""Inside of it, the measurements must not be changed in place: every further call would change them once more.

    :raises RuntimeError: if they were.
    """
    before = [version(t) for t in as_tuple(y)]
    yield
    if [version(t) for t in as_tuple(y)] != before:
        raise RuntimeError(
            f"{type(physics).__name__}, or constants or init of {type(iteration).__name__}, wrote to the measurements y in place, "
            "which are used again. Return a new tensor, or write to a copy (y.clone())."
        )


class Fits:
    r"""Whether measurements fit a physics, checked once for each shape of measurements and of the physics' tensors, and for its numbers."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Physics, set[Any]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def check(self, y: Any, of: Physics, physics: Any, replica: Replica) -> None:
        r"""Evaluate :math:`A` once: some operators broadcast measurements of a wrong shape in silence.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics of: the user's physics.
        :param deepinv.physics.Physics physics: its replica.
        :param Replica replica: the replica of the iteration and of the physics.
        :raises RuntimeError: if the shapes do not fit.
        """
        tensors = _kind(f.tensor for f in replica.found.values() if 1 in f.roots)
        key = _kind(as_tuple(y)), tensors, _numbers(replica.modules[1])
        with self._lock:
            if key in self._known.get(of, ()):
                return
        with torch.no_grad():
            image = physics.A_adjoint(y)
            expected = shape(physics.A(image))
        if expected != shape(y):
            raise RuntimeError(f"A maps images of shape {shape(image)} to measurements of shape {expected}")
        with self._lock:
            known = self._known.setdefault(of, set())
            if len(known) >= _LIMIT:
                known.clear()
            known.add(key)


fits = Fits()


def _numbers(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    r"""The whole numbers and texts of modules, such as a number of views, on which shapes may depend."""
    return tuple((name, v) for m in modules for name, v in vars(m).items() if type(v) in (int, bool, str))


def _kind(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple((t.shape, t.dtype, t.device) for t in tensors)


def shape(y: Any) -> Any:
    r"""Shape of measurements, of every part where there are several."""
    of = y.shape
    return tuple(of) if isinstance(of, torch.Size) else tuple(tuple(s) for s in of)
