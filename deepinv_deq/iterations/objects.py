r"""Private copies of plain objects, containers and functions, and what tells whether something in them changed."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import numbers
import sys
import types
from array import array
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepinv_deq.compat import HOOKS, OF_MODULES

SHARED = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType, range}
    | {object, torch.dtype, torch.device, torch.Size, torch.Generator}
)  # immutable, or the same for everyone
Cached = type(functools.lru_cache(lambda: None))  # a class of C
_CONTAINERS = (dict, list, set, deque, bytearray, array, np.ndarray, types.SimpleNamespace)
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}
_LIBRARIES = _FOREIGN | {"deepinv", "deepinv_deq"}


def shallow(value: Any) -> Any:
    r"""A new object with the same contents; the object itself where that is not possible.

    Methods such as ``__getstate__`` may leave attributes out, so they are not used.
    """
    try:
        return object.__new__(type(value))
    except TypeError:  # a container, whose contents are in C
        return copy.copy(value) if isinstance(value, _CONTAINERS) else value


def fill(twin: Any, value: Any, replicate: Callable[[Any], Any], slots_only: bool = False) -> None:
    r"""Replicate the contents and the attributes of an object.

    :param object twin: what :func:`shallow` returned.
    :param object value: the object.
    :param Callable replicate: replicates what is inside.
    :param bool slots_only: whether only attributes in slots are still missing.
    """
    for name in slots(type(value)):  # type: ignore[arg-type]
        if hasattr(value, name):
            object.__setattr__(twin, name, replicate(getattr(value, name)))
    if slots_only:
        return
    # the contents of a container are in the twin already, and another thread may change those of the original
    if isinstance(twin, dict):
        for key, item in list(twin.items()):
            dict.__setitem__(twin, key, replicate(item))
    elif isinstance(twin, (list, deque)):
        for i, item in enumerate(list(twin)):
            twin[i] = replicate(item)
    elif isinstance(twin, set):
        items = [replicate(item) for item in twin]
        twin.clear()
        twin.update(items)
    elif isinstance(twin, np.ndarray) and twin.dtype == object:
        for i, item in enumerate(twin.flat):
            twin.flat[i] = replicate(item)
    if hasattr(value, "__dict__"):
        twin.__dict__.update({name: replicate(item) for name, item in dict(value.__dict__).items()})


def of_class(twin: Any, replicate: Callable[[Any], Any]) -> None:
    r"""Put what the user's classes keep (tensors, numbers, containers) on the replica, where it is looked up first."""
    derived: set[str] = set()  # names that more derived classes define: the methods and properties among them must stay
    for base in type(twin).__mro__ if hasattr(twin, "__dict__") else ():
        names = dict(vars(base))
        for name, value in names.items() if _library(base) not in _LIBRARIES else ():
            data = isinstance(value, (Tensor, nn.Module)) or not (callable(value) or hasattr(value, "__get__"))
            if data and name not in derived and not name.startswith("__") and not hasattr(type(value), "__set__"):
                twin.__dict__.setdefault(name, replicate(value))
        derived.update(names)


def of_function(
    function: types.FunctionType, replicate: Callable[[Any], Any], keep: Callable[[Any, Any], Any]
) -> types.FunctionType:
    r"""A function with private closure, default values and attributes.

    :param Callable function: the function.
    :param Callable replicate: replicates what is inside.
    :param Callable keep: notes a replica.
    :return: the replica; the function itself where nothing can change.
    """
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if not (function.__closure__ or function.__dict__) and all(type(value) in SHARED for value in defaults):
        return function
    cells = tuple(_cell(cell, replicate, keep) for cell in function.__closure__ or ())
    twin = keep(function, types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells))
    for cell, original in zip(cells, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            cell.cell_contents = replicate(original.cell_contents)
    twin.__defaults__, twin.__kwdefaults__ = replicate(function.__defaults__), replicate(function.__kwdefaults__)
    twin.__dict__.update({name: replicate(value) for name, value in function.__dict__.items()})
    return twin


def _cell(cell: types.CellType, replicate: Callable[[Any], Any], keep: Callable[[Any, Any], Any]) -> types.CellType:
    known = replicate(cell)  # functions that share a variable go on sharing it
    return keep(cell, types.CellType()) if known is cell else known


def contents(function: Any) -> Iterator[Any]:
    r"""What a closure refers to."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def tensors_of_hook(hook: Any, known: Container[int]) -> Iterator[Tensor]:
    r"""The tensors to which a hook refers, also those of modules of which no part is known.

    :param Callable hook: the hook.
    :param Container known: identities of what was replicated.
    """
    for value in contents(hook):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module) and not any(id(m) in known for m in value.modules()):
            yield from value.parameters()
            # a layer in training mode changes its buffers itself
            yield from (b for m in value.modules() if not m.training for b in m.buffers(recurse=False))


@functools.cache
def slots(kind: Any) -> tuple[str, ...]:
    found = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _library(kind: Any) -> str:
    return kind.__module__.partition(".")[0]


@functools.cache
def is_plain(kind: Any) -> bool:
    r"""Whether objects of a class are plain Python objects or containers, which can be replicated part by part."""
    if issubclass(kind, _CONTAINERS) or kind.__module__ == "collections":
        return True
    if _library(kind) in _FOREIGN or issubclass(kind, (type, enum.Enum)):
        return False
    return not any(hasattr(kind, name) for name in ("__del__", "_shared_by_replicas"))


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
    r"""An object that replicas share, such as a generator: equal to itself only."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


_VALUES = SHARED | {torch.Size, types.BuiltinFunctionType, type} - {torch.Generator}


def _code(kind: type) -> tuple[Any, ...]:
    r"""The code of the user's classes, whose methods may be replaced."""
    user = (base for base in kind.__mro__ if _library(base) not in _LIBRARIES)
    return tuple(f.__code__ for base in user for f in vars(base).values() if type(f) is types.FunctionType)
