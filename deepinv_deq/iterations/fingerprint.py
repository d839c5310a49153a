r"""What tells whether anything but tensors changed in modules, plain objects and functions."""

from __future__ import annotations

import functools
import numbers
import types
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepinv_deq.compat import HOOKS, OF_MODULES
from deepinv_deq.iterations.objects import (
    LIBRARIES,
    SHARED,
    Cached,
    contents,
    is_plain,
    library,
    names_in,
    owner_of,
    slots,
)


def fingerprint(value: Any, skip: Container[str] = (), seen: set[int] | None = None) -> Any:
    r"""What tells whether anything but tensors changed: code, numbers, containers, plain objects.

    :param object value: a module or any other object.
    :param Container skip: names of attributes that do not matter.
    :param set, None seen: objects that are in the fingerprint already.
    :return: hashable; equal where nothing changed.
    """
    kind: Any = type(value)
    if kind in _VALUES:
        return value
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, Tensor) or (seen and isinstance(value, nn.Module)):
        return kind  # tensors are compared by their versions, modules are in the list of all modules
    if getattr(kind, "_shared_by_replicas", False):
        return kind  # Derived data of this package; ignored in comparisons.
    seen.add(id(value))

    def inside(parts: Iterable[Any]) -> Any:
        return tuple(fingerprint(part, skip, seen) for part in parts)

    if isinstance(value, nn.Module):
        own = {name: item for name, item in vars(value).items() if name not in OF_MODULES}
        # replicas share hooks, and what a hook records changes all the time
        found = [hook for name in sorted(HOOKS) for hook in vars(value).get(name, {}).values()]
        hooks = tuple(_Same(getattr(hook, "__func__", hook)) for hook in found)
        names = tuple(name for name, _ in value.named_children())
        return kind, _code(kind), value.training, names, hooks, fingerprint(own, skip, seen)
    if kind is types.FunctionType:
        cells = contents(value)
        return value.__code__, inside([value.__defaults__, value.__kwdefaults__, value.__dict__, *cells])
    if kind is types.BuiltinFunctionType:
        return (value,) if owner_of(value) is None else inside([owner_of(value)])
    if kind is types.MethodType:
        return inside([value.__func__, value.__self__])
    if kind is functools.partial:
        return inside([value.func, value.args, value.keywords])
    if kind is Cached:
        return inside([value.__wrapped__])
    if isinstance(value, Mapping):
        return kind, tuple((str(key), fingerprint(item, skip, seen)) for key, item in value.items() if key not in skip)
    if isinstance(value, (list, tuple, deque)):
        return kind, inside(value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(inside(value))
    if hasattr(value, "tobytes"):
        return kind, value.tobytes()
    if is_plain(kind):
        own = {name: getattr(value, name, None) for name in (*slots(kind), "__dict__")}
        return kind, fingerprint(own, skip, seen)
    if isinstance(value, (numbers.Number, range, slice)):
        return kind, repr(value)
    return _Same(value)


class _Same:
    r"""An object that replicas share, such as a generator: equal to itself only. It is not kept alive where that can be avoided."""

    def __init__(self, value: Any):
        self._hash = id(value)
        self._value: Callable[[], Any] = weakref.ref(value) if type(value).__weakrefoffset__ else lambda: value

    def __eq__(self, other: object) -> bool:
        value = self._value()
        return isinstance(other, _Same) and value is not None and value is other._value()

    def __hash__(self) -> int:
        return self._hash


_NUMBERS = frozenset({int, float, bool, str, bytes, complex, type(None)})
_VALUES = SHARED - {torch.Generator, types.BuiltinFunctionType}


def _code(kind: type) -> tuple[Any, ...]:
    r"""The code of the user's classes, whose methods may be replaced, and the plain variables in it, global or of a closure."""
    user = (base for base in kind.__mro__ if library(base) not in LIBRARIES)
    found = [_function(value) for base in user for value in dict(vars(base)).values()]
    functions = [f for f in found if type(f) is types.FunctionType]
    # what lists in a closure hold may be a record, which changes all the time
    return tuple((f.__code__, _globals(f), tuple(v for v in contents(f) if type(v) in _NUMBERS)) for f in functions)


_INSIDE = {
    staticmethod: "__func__",
    classmethod: "__func__",
    property: "fget",
    Cached: "__wrapped__",
    functools.cached_property: "func",
    functools.partialmethod: "func",
}


def _function(value: Any) -> Any:
    r"""The function of a method of any kind."""
    while type(value) in _INSIDE:
        value = getattr(value, _INSIDE[type(value)])
    return value


def _globals(function: types.FunctionType) -> tuple[Any, ...]:
    r"""Names and values of the plain global variables of a function, also of those in the user's modules that it names."""
    names = names_in(function.__code__)
    of = [vars(v) for v in map(function.__globals__.get, names) if isinstance(v, types.ModuleType) and _users(v)]
    pairs = ((name, space[name]) for space in (function.__globals__, *of) for name in names if name in space)
    return tuple((name, value) for name, value in pairs if type(value) in _NUMBERS)


def _users(module: types.ModuleType) -> bool:
    return module.__name__.partition(".")[0] not in LIBRARIES
