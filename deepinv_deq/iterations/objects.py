r"""Private copies of plain objects, containers and functions."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import sys
import types
import weakref
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

SHARED = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType, range}
    | {object, torch.dtype, torch.device, torch.Size, torch.Generator}
)  # immutable, or the same for everyone
IMMUTABLE = SHARED - {types.BuiltinFunctionType}  # a method of an object in C belongs to that object
Cached = type(functools.lru_cache(lambda: None))  # a class of C
_Functions: Any = type(torch.autograd.Function)
# attributes that Python and PyTorch add to every class of this kind
_OF_FUNCTIONS = frozenset(vars(_Functions("Empty", (torch.autograd.Function,), {})))
_CONTAINERS = (dict, list, set, deque, bytearray, array, np.ndarray, types.SimpleNamespace)
# modules of large libraries whose objects are Python objects that hold numbers or tensors
_DATA = ("argparse", "optparse", "collections", "torch.distributions", "numpy.polynomial")
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}
LIBRARIES = _FOREIGN | {"deepinv", "deepinv_deq"}


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
        _fill_dict(twin, replicate)
    elif isinstance(twin, (list, deque)):
        set_item: Any = list.__setitem__ if isinstance(twin, list) else deque.__setitem__  # a subclass may refuse
        for i, item in enumerate(list(twin)):
            set_item(twin, i, replicate(item))
    elif isinstance(twin, set):
        items = [replicate(item) for item in twin]
        twin.clear()
        twin.update(items)
    elif isinstance(twin, np.ndarray) and twin.dtype == object:
        for i, item in enumerate(twin.flat):
            twin.flat[i] = replicate(item)
    if hasattr(value, "__dict__"):
        twin.__dict__.update({name: replicate(item) for name, item in dict(value.__dict__).items()})


def _fill_dict(twin: dict[Any, Any], replicate: Callable[[Any], Any]) -> None:
    pairs = [(replicate(key), key, item) for key, item in list(twin.items())]
    kind: Any = OrderedDict if isinstance(twin, OrderedDict) else dict  # a subclass may refuse
    if any(new is not key for new, key, _ in pairs):  # such as layers, which are found by their identity
        kind.clear(twin)
    for new, _, item in pairs:
        kind.__setitem__(twin, new, replicate(item))
    if isinstance(twin, defaultdict):
        twin.default_factory = replicate(twin.default_factory)


def of_class(twin: Any, replicate: Callable[[Any], Any]) -> None:
    r"""Put what the user's classes keep (tensors, numbers, containers) on the replica, where it is looked up first."""
    derived: set[str] = set()  # names that more derived classes define: the methods and properties among them must stay
    for base in classes_up_to_users(type(twin)) if hasattr(twin, "__dict__") else ():
        names = dict(vars(base))
        for name, value in names.items() if library(base) not in LIBRARIES else ():
            data = isinstance(value, (Tensor, nn.Module)) or not (callable(value) or hasattr(value, "__get__"))
            if data and name not in derived and not name.startswith("__") and not hasattr(type(value), "__set__"):
                twin.__dict__.setdefault(name, replicate(value))
        derived.update(names)


def of_tuple(value: tuple[Any, ...] | frozenset[Any], replicate: Callable[[Any], Any]) -> Any:
    r"""A tuple or a frozen set with private contents and attributes; the object itself where nothing can change."""
    kind: Any = type(value)
    if kind is tuple and IMMUTABLE.issuperset(map(type, value)):
        return value
    items = [replicate(item) for item in value]
    inside = {name: replicate(item) for name, item in getattr(value, "__dict__", {}).items()}
    if not inside and all(a is b for a, b in zip(items, value, strict=True)):
        return value
    with_attributes = inside or hasattr(kind, "_fields")
    base: Any = tuple if isinstance(value, tuple) else frozenset
    twin = base.__new__(kind, items) if with_attributes else kind(items)
    if inside:
        twin.__dict__.update(inside)
    return twin


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


def of_local_function(cls: Any, replicate: Callable[[Any], Any], keep: Callable[[Any, Any], Any]) -> Any:
    r"""A :class:`torch.autograd.Function` that is defined inside of a function, with private closures.

    :param type cls: any class.
    :param Callable replicate: replicates what is inside.
    :param Callable keep: notes a replica.
    :return: the replica; the class itself if it is another one, or where nothing can change.
    """
    if not (issubclass(cls, torch.autograd.Function) and "<locals>" in cls.__qualname__):
        return cls
    inside = {name: value for name, value in vars(cls).items() if name not in _OF_FUNCTIONS}
    functions = {name: value.__func__ if isinstance(value, staticmethod) else value for name, value in inside.items()}
    own = {name: replicate(value) for name, value in functions.items()}
    if all(own[name] is value for name, value in functions.items()):
        return cls
    static = {name: staticmethod(v) if isinstance(inside[name], staticmethod) else v for name, v in own.items()}
    return keep(cls, type(cls)(cls.__name__, cls.__bases__, static))


def _cell(cell: types.CellType, replicate: Callable[[Any], Any], keep: Callable[[Any, Any], Any]) -> types.CellType:
    known = replicate(cell)  # functions that share a variable go on sharing it
    return keep(cell, types.CellType()) if known is cell else known


def owner_of(builtin: types.BuiltinFunctionType) -> Any:
    r"""The object of which a function written in C is a method, such as a tensor; ``None`` for a function of a module."""
    owner = builtin.__self__
    return None if isinstance(owner, types.ModuleType) else owner


def contents(function: Any) -> Iterator[Any]:
    r"""What a closure refers to."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


@functools.cache
def slots(kind: Any) -> tuple[str, ...]:
    found = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def names_in(code: types.CodeType) -> tuple[str, ...]:
    r"""Global names and attributes in a function, and in the functions inside of it."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return (*code.co_names, *(name for names in inner for name in names))


def library(kind: Any) -> str:
    return kind.__module__.partition(".")[0]


def classes_up_to_users(kind: type) -> tuple[type, ...]:
    r"""A class and its bases, up to the last one that belongs to no library."""
    users = [i for i, base in enumerate(kind.__mro__) if library(base) not in LIBRARIES]
    return kind.__mro__[: users[-1] + 1] if users else ()


_quiet: WeakKeyDictionary[type, weakref.ref[type]] = WeakKeyDictionary()


def without_finaliser(kind: type) -> type:
    r"""The class for the replicas of a class: itself, or a subclass without ``__del__``, so that dropping a replica frees nothing."""
    if not hasattr(kind, "__del__"):
        return kind
    known = _quiet.get(kind)
    found = None if known is None else known()
    if found is None:
        own = {"__del__": lambda self: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        found = type(kind)(kind.__name__, (kind,), own)
        _quiet[kind] = weakref.ref(found)
    return found


@functools.cache
def is_plain(kind: Any) -> bool:
    r"""Whether objects of a class are plain Python objects or containers, which can be replicated part by part."""
    if issubclass(kind, _CONTAINERS) or any(f"{kind.__module__}.".startswith(f"{name}.") for name in _DATA):
        return True
    if library(kind) in _FOREIGN or issubclass(kind, (type, enum.Enum)):
        return False
    return not any(hasattr(kind, name) for name in ("__del__", "_shared_by_replicas"))
