r"""What the user's containers and classes hold, to notice that an evaluation of a replica writes to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import nn

from deepinv_deq.iterations.objects import LIBRARIES, SHARED, library

_CONTAINERS = (dict, list, set, deque)


class Originals:
    r"""The contents of what was replicated.

    An evaluation may write to a dictionary through a global variable, a class or the closure of a method, and read it as an attribute.
    The attribute is that of the replica, so that it would read what was there before.

    :param Iterable pairs: originals with their replicas.
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]]):
        replicated = [value for value, twin in pairs if twin is not value]
        self._containers = [value for value in replicated if isinstance(value, _CONTAINERS)]
        self._modules = [value for value in replicated if isinstance(value, nn.Module)]
        self._classes = {base for value in replicated for base in type(value).__mro__ if library(base) not in LIBRARIES}

    def note(self) -> None:
        r"""Note the contents."""
        self._known = [(container, _items(container)) for container in self._containers]
        owners = (*self._classes, *self._modules)
        self._attributes = [(owner, dict(vars(owner))) for owner in owners]

    def refuse_written(self) -> None:
        r"""Compare the contents with those that were noted.

        :raises RuntimeError: if a container or a class attribute was written to. Numbers and texts of classes may change: they may be counters.
        """
        for container, before in self._known:
            now = _items(container)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                raise RuntimeError(_WRITTEN.format(what=f"a {type(container).__name__}"))
        for owner, attributes in self._attributes:
            for name, value in dict(vars(owner)).items():
                known = attributes.get(name, value if isinstance(owner, type) else None)
                if value is not known and type(value) not in SHARED:
                    of = (
                        f"the class {owner.__name__}"
                        if isinstance(owner, type)
                        else f"the user's {type(owner).__name__}"
                    )
                    raise RuntimeError(_WRITTEN.format(what=f"the attribute {name!r} of {of}"))


_WRITTEN = (
    "An evaluation of the iteration wrote to {what} through a global variable, a class, a closure or an object that a hook belongs to. Each map "
    "has a copy of what the iteration keeps as attributes, so that it would read what was there before. Write to the attribute of the module itself (self.name), "
    "or keep it in one place only."
)


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)
