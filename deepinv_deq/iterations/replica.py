r"""Shallow replicas of modules: objects of their own, shared tensors.

A replica owns every module, list, dictionary and plain object that is reachable from its roots, and shares the tensors. So
nothing that the original's owner changes later (numbers, modes, submodules, replaced tensors) reaches the replica, and nothing
that an evaluation stores on the replica reaches the original.

Three things cannot be made private. They are listed here, and only here:

- A tensor that is changed *in place* is changed for both. :class:`Watch` notices this by the tensor's version counter.
- A *closure*, as in ``LinearPhysics(A=lambda x: mask * x)``, keeps its own references. The tensors in it are watched for changes
  in place. A variable that is given another value is not noticed. Make the tensor an attribute of the module instead.
- Objects of extension modules (random generators, C++ objects) and resources (objects with ``__del__`` or ``__exit__``) are
  shared. NumPy arrays are copied.

What an evaluation stores on a module (``self.features = ...``) stays on the replica. To look at feature maps, register a forward
hook: hooks fire on the replica as well. Layers that update a buffer in place (batch norm) update the original's buffer, and an
assignment to a buffer stays on the replica, as in :class:`torch.nn.DataParallel`.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepinv_deq import compat
from deepinv_deq.iterations.objects import (
    compute_weights,
    contents,
    is_plain,
    renew,
    replicate_script,
    shallow,
    slots,
)

_SHARED = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType, range}
    | {torch.dtype, torch.device, torch.Size, torch.Generator}
)
_STORES = ("_parameters", "_buffers", "_modules")  # in PyTorch 2.4 ordered dictionaries, as hooks are
_HOOKS = frozenset(k for k, value in nn.Module().__dict__.items() if isinstance(value, OrderedDict)).difference(_STORES)
_SUFFIXES = ("_orig", "_mask", "_u", "_v", "_g")  # of the tensors from which old-style hooks compute a weight


@dataclass
class Found:
    r"""A tensor of a replica and what is known of it.

    :param torch.Tensor tensor: the tensor.
    :param str role: ``"parameter"``, ``"buffer"``, ``"computed"`` (a normalised weight), ``"plain"`` or ``"closure"``.
    :param int root: which root it was found under first.
    :param bool layer: whether it belongs to a layer of :mod:`torch.nn`.
    :param bool statistic: whether it is a running statistic of a layer in training mode.
    :param bool training: whether its module is in training mode.
    """

    tensor: Tensor
    role: str
    root: int
    layer: bool
    statistic: bool
    training: bool
    roots: set[int]


class Replica:
    r"""Replicas of some objects, with everything they have in common.

    :param Iterable roots: modules or other objects.
    :param Mapping put: tensors to use in the place of others, by the identity of the others.
    """

    def __init__(self, roots: Iterable[Any], put: Mapping[int, Tensor] | None = None):
        self.found: dict[int, Found] = {}
        self.modules: list[list[nn.Module]] = []
        self._put = put or {}
        # the originals are kept until the end of the walk: another thread may drop one, and its address would be used again
        memo: dict[int, tuple[Any, Any]] = {}
        self._memo, self._hooks = memo, list[OrderedDict[int, Any]]()
        twins = []
        for root in roots:
            self.modules.append([])
            twins.append(self._copy(root))
        for hooks in self._hooks:  # a bound method of a module that was replicated acts on the replica
            for key, hook in hooks.items():
                if type(hook) is types.MethodType and id(hook.__self__) in memo:
                    hooks[key] = types.MethodType(hook.__func__, memo[id(hook.__self__)][1])
        self.roots = tuple(twins)
        del self._memo, self._hooks, self._put

    def again(self, put: Mapping[int, Tensor] | None = None) -> Replica:
        r"""A replica of this one, with other tensors in some places."""
        return Replica(self.roots, put)

    def _copy(self, value: Any) -> Any:
        kind: Any = type(value)
        if kind in _SHARED:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)][1]
        if isinstance(value, Tensor):
            return self._tensor(value, "plain", None)
        if isinstance(value, nn.Module):
            return self._module(value)
        if kind is types.FunctionType:
            self._watch_closure(value)
            return value
        if kind is types.MethodType:
            owner = self._copy(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if kind is functools.partial:
            args, keywords = self._copy(value.args), self._copy(dict(value.keywords))
            return functools.partial(self._copy(value.func), *args, **keywords)
        if isinstance(value, dict):
            twin = self._keep(value, shallow(value))
            for key, item in list(twin.items()):
                twin[key] = self._copy(item)
            return twin
        if isinstance(value, list):
            twin = self._keep(value, shallow(value))
            twin[:] = [self._copy(item) for item in value]
            return twin
        if isinstance(value, tuple):
            if all(type(item) in _SHARED for item in value):
                return value
            items = [self._copy(item) for item in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return kind._make(items) if hasattr(kind, "_make") else kind(items)
        if isinstance(value, set):
            return self._keep(value, shallow(value))
        if kind is np.ndarray:
            return self._keep(value, value.copy())
        return self._object(value) if is_plain(kind) else value

    def _keep(self, value: Any, twin: Any) -> Any:
        self._memo[id(value)] = (value, twin)
        return twin

    def _tensor(self, t: Tensor, role: str, module: nn.Module | None) -> Tensor:
        root, found = len(self.modules) - 1, self.found.get(id(t))
        if found is None:
            training = module is not None and module.training
            layer = module is not None and type(module).__module__.startswith("torch.nn.")
            statistic = role == "buffer" and training and isinstance(module, compat.layers_with_statistics())
            self.found[id(t)] = Found(t, role, root, layer, statistic, training, {root})
        else:
            found.roots.add(root)
            if role == "parameter":
                found.role = role
        return self._put.get(id(t), t)

    def _object(self, value: Any) -> Any:
        kind: Any = type(value)
        twin = self._keep(value, kind.__new__(kind))
        for name in slots(kind):
            if hasattr(value, name):
                object.__setattr__(twin, name, self._copy(getattr(value, name)))
        if hasattr(value, "__dict__"):
            inside = dict(value.__dict__)
            twin.__dict__.update({name: self._copy(item) for name, item in inside.items()})
        return twin

    def _module(self, module: nn.Module) -> nn.Module:
        kind, inside = type(module), dict(module.__dict__)
        if isinstance(module, torch.jit.ScriptModule):
            return replicate_script(module, self._keep, self._copy, self._tensor)
        stores = {name: dict(inside[name]) for name in _STORES}
        normalised = stores["_modules"].pop("parametrizations", None) if parametrize.is_parametrized(module) else None
        if normalised is not None:
            kind = kind.__bases__[0]  # parametrize gave the module a class of its own
        twin = object.__new__(kind)
        self._keep(module, twin)
        object.__setattr__(twin, "__dict__", inside)
        self.modules[-1].append(twin)
        inside |= stores
        for name in _HOOKS & inside.keys():
            inside[name] = OrderedDict(inside[name])
            if inside[name]:
                self._hooks.append(inside[name])
        computed = compute_weights(twin, normalised)
        unused = {name + suffix for name in computed for suffix in _SUFFIXES}
        for name, t in stores["_parameters"].items():
            if t is not None and name not in unused:
                role = "computed" if name in computed else "parameter"
                stores["_parameters"][name] = self._tensor(t, role, twin)
        for name, t in stores["_buffers"].items():
            if t is not None and name not in unused:
                role = "computed" if name in computed else "buffer"
                stores["_buffers"][name] = self._tensor(t, role, twin)
        for name, child in stores["_modules"].items():
            if child is not None:
                stores["_modules"][name] = self._copy(child)
        for name, value in inside.items():
            if name in computed:
                inside[name] = self._tensor(value, "computed", twin)
            elif type(value) not in _SHARED and name not in stores and name not in _HOOKS:
                inside[name] = self._copy(value)
        renew(twin)
        if inside.get("implicit_backward_solver") is True and isinstance(twin, Physics):
            # deepinv's own backward of prox_l2 solves with the physics as it is then, and adds to the ``grad`` of its tensors
            inside["implicit_backward_solver"] = False
        compat.compile_again(module, twin)
        return twin

    def _watch_closure(self, function: Callable[..., Any]) -> None:
        for value in contents(function):
            for t in [value] if isinstance(value, Tensor) else value if isinstance(value, (list, tuple)) else []:
                if isinstance(t, Tensor):
                    self._tensor(t, "closure", None)
