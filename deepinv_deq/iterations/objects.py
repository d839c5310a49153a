r"""What :mod:`deepinv_deq.iterations.replica` has to know of kinds of Python objects, of deepinv's lazy functions and of compiled code."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from deepinv.physics import Tomography
from torch import nn

# functions that deepinv builds on first use from the state of the module
_LAZY: tuple[tuple[type, str], ...] = ((Tomography, "_auto_grad_adjoint_fn"),)


def forget(module: nn.Module) -> None:
    for kind, name in _LAZY:
        if isinstance(module, kind) and name in module.__dict__:
            module.__dict__[name] = None


def shallow(value: Any) -> Any:
    return type(value)(value) if type(value) in (dict, list, set, OrderedDict) else copy.copy(value)


def contents(function: Any) -> Iterator[Any]:
    r"""What a closure refers to."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            yield cell.cell_contents


@functools.cache
def slots(kind: type) -> tuple[str, ...]:
    names = [name for base in kind.__mro__ for name in _as_names(base.__dict__.get("__slots__", ()))]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _as_names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.cache
def is_plain(kind: type) -> bool:
    r"""Whether objects of a class are plain Python objects, which can be replicated attribute by attribute."""
    library = kind.__module__.partition(".")[0]
    if kind is types.SimpleNamespace:
        return True
    if library in sys.stdlib_module_names or library in ("torch", "numpy") or issubclass(kind, type):
        return False
    resource = any(hasattr(kind, name) for name in ("__del__", "__exit__", "_shared_by_replicas"))
    return kind.__new__ is object.__new__ and not resource


def compile_again(module: nn.Module, twin: nn.Module) -> None:
    r"""Compile the replica as the original was: what was compiled refers to the original. The compiled code is found again in
    PyTorch's cache."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return
    if isinstance(module, getattr(frames, "OptimizedModule", ())):
        twin._initialize()  # type: ignore[operator]
    if twin.__dict__.get("_compiled_call_impl") is not None:
        kind = getattr(frames, "_TorchDynamoContext", ())
        contexts = [c for c in contents(module._compiled_call_impl) if isinstance(c, kind)]
        twin.__dict__["_compiled_call_impl"] = contexts[0](twin._call_impl) if contexts else None
