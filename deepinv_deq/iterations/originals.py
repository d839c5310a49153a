r"""What the user's containers and classes hold, to notice that an evaluation of a replica writes to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from deepinv_deq.iterations.objects import LIBRARIES, SHARED, library

_CONTAINERS = (dict, list, set, deque)


class Originals:
    r"""The contents of what was replicated, as they were.

    An evaluation may write to a dictionary through a global variable, a class or the closure of a method, and read it as an attribute.
    The attribute is that of the replica, so that it would read what was there before.

    :param Iterable pairs: originals with their replicas.
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]]):
        pairs = [(value, twin) for value, twin in pairs if twin is not value]
        self._containers = [(value, _items(value)) for value, _ in pairs if isinstance(value, _CONTAINERS)]
        bases = {base for value, _ in pairs for base in type(value).__mro__ if library(base) not in LIBRARIES}
        self._classes = [(base, name, value) for base in bases for name, value in dict(vars(base)).items()]

    def refuse_written(self) -> None:
        r"""Compare the contents.

        :raises RuntimeError: if a container or a class attribute was written to. Numbers and texts of classes may change: they may be counters.
        """
        for container, before in self._containers:
            now = _items(container)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                raise RuntimeError(_WRITTEN.format(what=f"a {type(container).__name__}"))
        for base, name, before in self._classes:
            now = vars(base).get(name, before)
            if now is not before and type(now) not in SHARED:
                raise RuntimeError(_WRITTEN.format(what=f"the attribute {name!r} of the class {base.__name__}"))


_WRITTEN = (
    "An evaluation of the iteration wrote to {what} through a global variable, a class or a closure, and the iteration keeps the same "
    "object as an attribute, of which each map has a copy. It would read what was there before. Write to the attribute of the object (self.name), "
    "or keep it in one place only."
)


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)
