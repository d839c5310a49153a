r"""Kinds of objects that replicas treat in their own way: plain objects, normalised weights, lazy functions, compiled code."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import sys
import types
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from deepinv.physics import Tomography
from torch import Tensor, nn

from deepinv_deq import compat

SHARED = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType, range}
    | {object, torch.dtype, torch.device, torch.Size, torch.Generator}
)  # immutable, or the same for everyone
_CONTAINERS = (dict, list, set, deque, bytearray, array, np.ndarray, types.SimpleNamespace)
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}
_LIBRARIES = _FOREIGN | {"deepinv", "deepinv_deq"}


class _AnyShape:
    r"""Equal to every shape, so that deepinv does not build its own adjoint for another one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class _Adjoint:
    r"""The adjoint of a :class:`deepinv.physics.Tomography` by backpropagation through one graph.

    deepinv keeps such a function on the module. It refers to the original, and it is a class inside a reference cycle, which
    keeps its graph until the garbage collector runs.

    :param deepinv.physics.Tomography physics: replica.
    """

    _shared_by_replicas = True  # every replica gets its own

    def __init__(self, physics: Tomography):
        self._physics = weakref.ref(physics)
        self._graph: tuple[Any, Tensor, Tensor] | None = None

    def __call__(self, y: Tensor) -> Tensor:
        return _AdjointProduct.apply(y, self, self._physics())

    def product(self, y: Tensor, physics: Tomography) -> Tensor:
        r"""Apply the adjoint to measurements."""
        shape = (*y.shape[:2], physics.img_width, physics.img_width)
        with torch.inference_mode(False), torch.enable_grad():
            if self._graph is None or self._graph[0] != (shape, y.device):
                x = torch.zeros(shape, device=y.device, dtype=physics.dtype, requires_grad=True)
                self._graph = (shape, y.device), x, physics.A(x)
            _, x, measured = self._graph
            cotangent = (y.clone() if y.is_inference() else y.detach()).to(measured.dtype)
            return torch.autograd.grad(measured, x, cotangent, retain_graph=True)[0]


class _AdjointProduct(torch.autograd.Function):
    r"""The adjoint, whose own adjoint is the operator."""

    @staticmethod
    def forward(y: Tensor, adjoint: _Adjoint, physics: Tomography) -> Tensor:
        return adjoint.product(y, physics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.physics = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.physics.A(g), None, None


def renew(module: nn.Module) -> None:
    r"""Give a replica its own version of what deepinv built on first use from the original."""
    if isinstance(module, Tomography) and "_auto_grad_adjoint_fn" in module.__dict__:
        module.__dict__["_auto_grad_adjoint_fn"] = _Adjoint(module)
        module.__dict__["_auto_grad_adjoint_input_shape"] = _AnyShape()


def compute_weights(twin: nn.Module, normalised: nn.ModuleDict | None) -> set[str]:
    r"""Compute normalised weights once, and put them in place as plain tensors.

    In training mode, spectral norm changes with every access.

    :param torch.nn.Module twin: replica.
    :param torch.nn.ModuleDict, None normalised: parametrisations of the original.
    :return: names of the weights.
    """
    inside, names = twin.__dict__, set[str]()
    for name, parametrization in ({} if normalised is None else dict(normalised.items())).items():
        store = compat.STORES[0 if len(list(parametrization.parameters(recurse=False))) else 1]
        inside[store][name] = parametrization()
        names.add(name)
    hooks = inside[compat.PRE_HOOKS]
    kinds, pruning = compat.weight_hooks() if hooks else ((), None)
    for key, hook in list(hooks.items()):
        if isinstance(hook, kinds):
            hook(twin, None)
            names.add(hook._tensor_name if pruning and isinstance(hook, pruning) else hook.name)
            del hooks[key]
    return names


def replicate_script(
    module: Any,
    keep: Callable[[Any, Any], Any],
    replicate: Callable[[Any], Any],
    place: Callable[[Tensor, str, None], Tensor],
) -> nn.Module:
    r"""Replicate a module of TorchScript, whose tensors are in C++, as PyTorch's own data parallelism does.

    :param torch.jit.ScriptModule module: the module, or a replica.
    :param Callable keep: notes a replica.
    :param Callable replicate: replicates a submodule.
    :param Callable place: the tensor to use in the place of another.
    :return: the replica.
    """
    known = module.__dict__.get(
        "_of_replica"
    )  # in a replica, neither tensors nor submodules are in PyTorch's own lists
    if known is None:
        stores = (("parameter", module._parameters), ("buffer", module._buffers))
        tensors = {name: (t, role) for role, store in stores for name, t in store.items()}
        known = dict(module._modules.items()), tensors
    twin = keep(module, compat.replica_of_script(module))
    children = {name: replicate(child) for name, child in known[0].items()}
    placed = {name: (place(t, role, None), role) for name, (t, role) in known[1].items()}
    for name, value in (*children.items(), *((name, t) for name, (t, _) in placed.items())):
        setattr(twin, name, value)
    twin.__dict__["_of_replica"] = children, placed
    return twin


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
    if isinstance(value, dict):
        for key, item in dict(value).items():
            dict.__setitem__(twin, key, replicate(item))
    elif isinstance(value, (list, deque)):
        for i, item in enumerate(list(value)):
            twin[i] = replicate(item)
    elif isinstance(value, set):
        twin.clear()
        twin.update([replicate(item) for item in set(value)])
    elif isinstance(value, np.ndarray) and value.dtype == object:
        twin.flat = [replicate(item) for item in value.flat]
    if hasattr(value, "__dict__"):
        twin.__dict__.update({name: replicate(item) for name, item in dict(value.__dict__).items()})


def of_class(twin: Any, replicate: Callable[[Any], Any]) -> None:
    r"""Put what the user's classes keep (tensors, numbers, containers) on the replica, where it is looked up first."""
    for base in type(twin).__mro__ if hasattr(twin, "__dict__") else ():
        if _library(base) not in _LIBRARIES:
            for name, value in dict(vars(base)).items():
                data = isinstance(value, (Tensor, nn.Module)) or not (callable(value) or hasattr(value, "__get__"))
                if data and not name.startswith("__") and not hasattr(type(value), "__set__"):
                    twin.__dict__.setdefault(name, replicate(value))


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
