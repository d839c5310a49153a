r"""All random generators that a training run draws from: where they are."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import PurePath
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from deepinv_deq.files import digest
from deepinv_deq.iterations.objects import names_in, slots
from deepinv_deq.training.kinds import global_states, kind_of, set_global_states, set_state, state_of

__all__ = ["find", "global_states", "kind_of", "set_global_states", "set_state", "state_of"]

_LIMIT = 300_000  # objects that are looked at: a second or so
_ATOMS = (
    int,
    float,
    str,
    bytes,
    bool,
    complex,
    type(None),
    torch.Tensor,
    np.generic,
    torch.dtype,
    torch.device,
    PurePath,
)
_ITERATORS = frozenset(("builtins", "itertools"))
# iterators of one epoch, made anew in the next
_PASSING = frozenset(("current_train_iterators", "current_eval_iterators", "_iterator"))


def find(root: Any, streams: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    r"""Every generator that an object holds, directly or through what it holds.

    Attributes, slots, containers, bound methods, closures and defaults of functions are searched, and global variables that
    functions and methods of user code name.

    :param root: the object, such as a Trainer.
    :param Collection[str] streams: attributes of ``root`` below which an iterator has a state that matters.
    :return: generators by path, in an order that depends on the structure only; paths of what has a state that cannot
        be saved.
    """
    found: dict[str, Any] = {}
    lost: list[str] = []
    seen: dict[int, Any] = {}  # the objects too: an id is unique only among objects that are alive
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, _ATOMS) or isinstance(value, ModuleType) or id(value) in seen:
            continue
        if len(seen) >= _LIMIT:
            lost.append(f"what is found after {_LIMIT:,} objects (the last was {path})")
            break
        seen[id(value)] = value
        if kind_of(value) is not None:
            try:
                digest(state_of(value))
                found[path] = value
            except (NotImplementedError, TypeError, AttributeError):
                lost.append(f"{path} ({type(value).__name__}, whose state cannot be read)")
        elif isinstance(value, Iterator) and type(value).__module__ in _ITERATORS:
            if path.split(".")[0].split("[")[0] in streams:
                lost.append(f"{path} (an iterator, {type(value).__name__})")
        elif isinstance(value, set | frozenset):
            if any(kind_of(item) is not None for item in value):
                lost.append(f"{path} (a set, which has no order)")
        else:
            todo += reversed(list(_parts(path, value)))
    return found, lost


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    r"""What an object holds, with the paths of it."""
    if isinstance(value, dict | list | tuple | deque):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        # by position where the key is no name: hooks, for example, are numbered through the whole process
        names = (f"{path}[{k!r}]" if isinstance(k, str) else f"{path}[{i}]" for i, (k, _) in enumerate(items))
        content = value.values() if isinstance(value, dict) else value
        yield from ((name, item) for name, item in zip(names, content, strict=True) if not isinstance(item, _ATOMS))
    elif isinstance(value, np.ndarray):
        if value.dtype == object:
            yield from ((f"{path}[{i}]", item) for i, item in enumerate(value.flat))
    elif isinstance(value, functools.partial):
        yield from ((f"{path}.func", value.func), (f"{path}.args", value.args), (f"{path}.keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from ((f"{path}.__self__", value.__self__), (f"{path}.__func__", value.__func__))
    elif isinstance(value, BuiltinMethodType):  # such as rng.normal
        yield f"{path}.__self__", value.__self__
    elif isinstance(value, FunctionType):
        yield from _of_function(path, value)
    elif isinstance(value, type):
        yield from _of_class(value)
        return
    dot = f"{path}." if path else ""
    try:
        attributes = list(vars(value).items())
    except TypeError:  # it has none
        attributes = []
    for name, item in attributes:
        if name not in _PASSING:
            yield f"{dot}{name}", item
    kind: Any = type(value)
    yield from ((f"{dot}{name}", getattr(value, name)) for name in slots(kind) if hasattr(value, name))
    yield from ((f"class {cls.__qualname__}", cls) for cls in type(value).__mro__ if _is_users(cls))


@functools.cache
def _is_users_module(root: str) -> bool:
    r"""Whether a module is user code. Functions of libraries draw from global generators, or from one an object holds."""
    module = sys.modules.get(root)
    place = f"{getattr(module, '__file__', '')} {list(getattr(module, '__path__', []))}"
    library = root in sys.stdlib_module_names or root in ("deepinv", "deepinv_deq")
    return not (library or "site-packages" in place or "dist-packages" in place)


def _is_users(value: Any) -> bool:
    root = (getattr(value, "__module__", None) or "builtins").split(".")[0]
    return root == "__main__" or _is_users_module(root)


def _of_class(cls: type) -> Iterator[tuple[str, Any]]:
    if _is_users(cls):
        for name, item in vars(cls).items():
            item = item.__func__ if isinstance(item, classmethod | staticmethod) else item
            item = item.fget if isinstance(item, property) else item
            if isinstance(item, FunctionType) or kind_of(item) is not None:
                yield f"{cls.__qualname__}.{name}", item


def _of_function(path: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:  # a cell that is still empty
            pass
    yield from ((f"{path}.__defaults__", function.__defaults__), (f"{path}.__kwdefaults__", function.__kwdefaults__))
    if not _is_users(function):
        return
    names, scope = names_in(function.__code__), function.__globals__
    for name in names:
        item = scope.get(name)
        if isinstance(item, ModuleType):  # such as settings.rng
            inside = [(f"{item.__name__}.{n}", vars(item).get(n)) for n in names if n in vars(item)]
            users = _is_users_module(item.__name__.split(".")[0])
            yield from (pair for pair in inside if users and kind_of(pair[1]) is not None)
        elif item is not None and (kind_of(item) is not None or _is_users(item) or _is_users(type(item))):
            yield f"{function.__module__}.{name}", item
