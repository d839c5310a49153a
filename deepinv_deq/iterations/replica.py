r"""Shallow replicas of modules: objects of their own, shared tensors.

A replica owns every module, list, dictionary and plain object that is reachable from its roots, and shares the tensors. So
nothing that the original's owner changes later (numbers, modes, submodules, replaced tensors) reaches the replica, and nothing
that an evaluation stores on the replica reaches the original.

What cannot be made private is listed here, and only here:

- A tensor that is changed *in place* is changed for both. :class:`Watch` notices this by the tensor's version counter and its
  address. PyTorch does not count changes through ``tensor.data.mul_(...)`` or a NumPy view of the tensor.
- *Global variables* and the attributes of other classes are looked up in every evaluation. Make them attributes of the module. Whether
  samples are independent is tested again where a number or a text changes that the user's methods name directly.
- *Hooks* are the user's functions, so that what they record in a list or an object of the user reaches the user. Where they refer to a module, or to what it
  keeps, such as a dictionary of feature maps, they get that of the replica. This holds for closures, default values and arguments of ``functools.partial``. Tensors and modules in their closures are watched, those deeper inside (in a list, in a module that holds the model itself) are not. A batch
  is solved whole where a module has forward hooks, since a hook may couple samples.
- A *cache of a class*, as of a method with ``functools.lru_cache``, takes every replica for another object and keeps it alive. Give it a
  ``maxsize``, or keep such a result as a buffer.
- Objects of extension modules (random generators, C++ objects), weak dictionaries and resources (objects with ``__del__``) are
  shared.

- What *methods of a class* refer to (closures, default values) is not copied. If this, a global variable or another class is changed before the
  backward pass, :mod:`deepinv_deq.implicit.unchanged` notices that the residual has changed, and raises. An evaluation that writes there to an
  object that a module keeps as an attribute, too, raises (:mod:`deepinv_deq.iterations.originals`).
- *Identities*: an object that looks itself up by ``id(self)``, or in a weak dictionary, is not found there.

Everything else is private: numbers, containers, NumPy arrays, plain objects, what functions refer to (closures and default
values), and the attributes of a module's own class.

What an evaluation stores on a module (``self.features = ...``) stays on the replica. To look at feature maps, register a forward
hook: hooks fire on the replica as well. A network that initialises itself in its first evaluation (ActNorm) does so on every replica: call it
once before it is bound. Layers that update a buffer in place (batch norm) update the original's buffer, and an
assignment to a buffer stays on the replica, as in :class:`torch.nn.DataParallel`.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepinv_deq import compat
from deepinv_deq.compat import HOOKS, STORES
from deepinv_deq.iterations.adjoints import private_adjoint
from deepinv_deq.iterations.computed import compute_weights, renew, replicate_script
from deepinv_deq.iterations.hooks import rebind, tensors_of_hook
from deepinv_deq.iterations.objects import (
    IMMUTABLE,
    SHARED,
    Cached,
    fill,
    is_plain,
    of_class,
    of_function,
    of_local_function,
    of_tuple,
    owner_of,
    shallow,
    without_finaliser,
)

_SUFFIXES = ("_orig", "_mask", "_u", "_v", "_g")  # of the tensors from which old-style hooks compute a weight


@dataclass
class Found:
    r"""A tensor of a replica and what is known of it.

    :param torch.Tensor tensor: the tensor.
    :param str role: ``"parameter"``, ``"buffer"``, ``"computed"`` (a normalised weight), ``"plain"`` or ``"closure"``.
    :param int root: which root it was found under first.
    :param bool layer: whether it belongs to a layer of :mod:`torch.nn`.
    :param bool statistic: whether it is a running statistic of a layer in training mode.
    :param set roots: all roots under which it was found.
    """

    tensor: Tensor
    role: str
    root: int
    layer: bool
    statistic: bool
    roots: set[int]


class Replica:
    r"""Replicas of some objects, with everything they have in common.

    :param Iterable roots: modules or other objects.
    :param Mapping put: tensors to use in the place of others, by the identity of the others.
    :param Replica, None original: the replica whose roots these are. Default: they are the user's.

    ``pairs`` has the user's objects with their replicas; empty for a replica of a replica.
    """

    def __init__(self, roots: Iterable[Any], put: Mapping[int, Tensor] | None = None, original: Replica | None = None):
        self.found: dict[int, Found] = {}
        self.modules: list[list[nn.Module]] = []
        self._put, self._first = put or {}, original is None
        # the originals are kept until the end of the walk: another thread may drop one, and its address would be used again
        memo: dict[int, tuple[Any, Any]] = {}
        self._memo, self._hooks = memo, list[tuple[int, OrderedDict[int, Any]]]()  # with the root to which they belong
        self._referred: list[Any] = []  # what replicas refer to weakly
        twins = []
        for root in roots:
            self.modules.append([])
            twins.append(self._copy(root))
        # replicas share hooks, so what these refer to is the same for all of them
        self._of_hooks: list[tuple[int, Tensor]] = original._of_hooks if original else []
        if self._first:
            found = [(root, hook) for root, hooks in self._hooks for hook in hooks.values()]
            self._of_hooks = [(root, t) for root, hook in found for t in tensors_of_hook(hook, memo)]
        for root, t in self._of_hooks:
            self._tensor(t, "closure", None, root)
        rebind([hooks for _, hooks in self._hooks], memo, self._put)
        self.roots = tuple(twins)
        self.pairs = tuple(memo.values()) if self._first else ()
        del self._memo, self._hooks, self._put

    def again(self, put: Mapping[int, Tensor] | None = None) -> Replica:
        r"""A replica of this one, with other tensors in some places."""
        return Replica(self.roots, put, original=self)

    def _copy(self, value: Any) -> Any:
        kind: Any = type(value)
        if kind in (types.BuiltinFunctionType, types.MethodType):  # in PyTorch 2.4, ``apply`` of a function is a method
            if (own := private_adjoint(value, self._copy)) is not None:
                return own
        if kind is types.BuiltinFunctionType:
            owner = self._copy(owner_of(value))
            return value if owner is owner_of(value) else getattr(owner, value.__name__)
        if kind in SHARED:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)][1]
        if kind in (set, dict, list) and not value:  # as every module has
            return self._keep(value, kind())
        if kind in weakref.ProxyTypes:
            return self._refer(value, value.__repr__.__self__, weakref.proxy)
        if isinstance(value, Tensor):
            return self._tensor(value, "plain", None)
        if isinstance(value, nn.Module):
            return self._module(value)
        if kind is types.FunctionType:
            return of_function(value, self._copy, self._keep)
        if kind is types.MethodType:
            owner, function = self._copy(value.__self__), self._copy(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if kind is functools.partial:
            args, keywords = self._copy(value.args), self._copy(dict(value.keywords))
            return functools.partial(self._copy(value.func), *args, **keywords)
        if kind is Cached:  # with a memory of its own: what the original remembers may be of other attributes
            function = self._copy(value.__wrapped__)
            same = function is value.__wrapped__
            return value if same else self._keep(value, functools.lru_cache(**value.cache_parameters())(function))
        if kind is types.MappingProxyType:
            return self._keep(value, types.MappingProxyType(self._copy(dict(value))))
        if kind in (weakref.ref, weakref.WeakMethod):
            return self._refer(value, value(), kind)
        if isinstance(value, (tuple, frozenset)):
            twin = of_tuple(value, self._copy)
            return value if twin is value else self._keep(value, twin)
        if isinstance(value, type):
            return of_local_function(value, self._copy, self._keep)
        twin = shallow(value) if is_plain(kind) else value
        if twin is not value:
            fill(self._keep(value, twin), value, self._copy)
            if self._first:
                of_class(twin, self._copy)
        return twin

    def _refer(self, value: Any, target: Any, kind: Any) -> Any:
        r"""A weak reference of some kind to the replica of what ``value`` refers to."""
        self._referred.append(self._copy(target))
        return value if self._referred[-1] is target else kind(self._referred[-1])

    def _keep(self, value: Any, twin: Any) -> Any:
        self._memo[id(value)] = (value, twin)
        return twin

    def _tensor(self, t: Tensor, role: str, module: nn.Module | None, root: int | None = None) -> Tensor:
        root, found = len(self.modules) - 1 if root is None else root, self.found.get(id(t))
        if found is None:
            training = module is not None and module.training
            layer = module is not None and type(module).__module__.startswith("torch.nn.")
            statistic = role == "buffer" and training and isinstance(module, compat.layers_with_statistics())
            self.found[id(t)] = Found(t, role, root, layer, statistic, {root})
        else:
            found.roots.add(root)
            if role == "parameter":
                found.role = role
        return self._put.get(id(t), t)

    def _module(self, module: nn.Module) -> nn.Module:
        kind, inside = type(module), dict(module.__dict__)
        if isinstance(module, torch.jit.ScriptModule):
            return replicate_script(module, self._keep, self._copy, self._tensor)
        parameters, buffers, modules = stores = [dict(inside[name]) for name in STORES]
        normalised = None
        if "parametrizations" in modules and parametrize.is_parametrized(module):
            normalised = modules.pop("parametrizations")
            kind = kind.__bases__[0]  # parametrize gave the module a class of its own
        twin: nn.Module = object.__new__(without_finaliser(kind))
        self._keep(module, twin)
        object.__setattr__(twin, "__dict__", inside)
        self.modules[-1].append(twin)
        inside.update(zip(STORES, stores, strict=True))
        for name in HOOKS & inside.keys():
            inside[name] = OrderedDict(inside[name])
            if inside[name]:
                self._hooks.append((len(self.modules) - 1, inside[name]))
        computed = compute_weights(twin, normalised) if normalised is not None or inside[compat.PRE_HOOKS] else ()
        unused = {name + suffix for name in computed for suffix in _SUFFIXES}
        for store, role in ((parameters, "parameter"), (buffers, "buffer")):
            for name, t in store.items():
                if t is not None and name not in unused:
                    store[name] = self._tensor(t, "computed" if name in computed else role, twin)
        for name, child in modules.items():
            modules[name] = self._copy(child)
        for name, value in inside.items():
            if name in computed:
                inside[name] = self._tensor(value, "computed", twin)
            elif type(value) not in IMMUTABLE and name not in STORES and name not in HOOKS:
                inside[name] = self._copy(value)
        fill(twin, module, self._copy, slots_only=True)
        if self._first:
            of_class(twin, self._copy)
        renew(twin)
        compat.compile_again(module, twin)
        return twin
