r"""Hooks of replicas: what they refer to, and hooks that refer to replicas."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from deepinv_deq.iterations.objects import SHARED, contents, is_plain, slots


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


def rebind(hooks: Iterable[dict[int, Any]], memo: Mapping[int, tuple[Any, Any]], put: Mapping[int, Tensor]) -> None:
    r"""Let the hooks of replicas act on replicas: what a hook does to a module, or to what it keeps, it does to the replica.

    :param Iterable hooks: the dictionaries of the hooks, changed in place.
    :param Mapping memo: originals and replicas, by the identity of the original.
    :param Mapping put: tensors to use in the place of others, by the identity of the others.
    """

    def twin_of(value: Any) -> Any:
        return put.get(id(value), value) if isinstance(value, Tensor) else memo.get(id(value), (None, value))[1]

    for each in hooks:
        for key, hook in each.items():
            each[key] = rebound(hook, twin_of)


def rebound(value: Any, twin_of: Callable[[Any], Any], inside_of: frozenset[int] = frozenset()) -> Any:
    r"""A hook that refers to replicas in the place of what was replicated, and goes on sharing everything else with the user's hook.

    :param object value: the hook, or what it refers to.
    :param Callable twin_of: the replica of an object; the object itself where there is none.
    :param frozenset inside_of: identities of the functions and objects around it, which may refer to themselves.
    :return: ``value`` itself where it refers to nothing that was replicated.
    """
    twin, kind = twin_of(value), cast(Any, type(value))
    if twin is not value or kind in SHARED or id(value) in inside_of:
        return twin

    def again(part: Any) -> Any:
        return rebound(part, twin_of, inside_of | {id(value)})

    if kind is types.FunctionType:
        cells = tuple(_rebound_cell(cell, again) for cell in value.__closure__ or ())
        defaults = again(value.__defaults__), again(value.__kwdefaults__)
        if all(
            a is b for a, b in zip((*cells, *defaults), (*(value.__closure__ or ()), *_defaults(value)), strict=True)
        ):
            return value
        function = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults[0], cells)
        function.__kwdefaults__ = defaults[1]
        function.__dict__.update(value.__dict__)
        return function
    if kind is types.MethodType:
        owner = again(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if kind is functools.partial:
        parts = again(value.func), again(value.args), again(value.keywords)
        same = all(a is b for a, b in zip(parts, (value.func, value.args, value.keywords), strict=True))
        return value if same else functools.partial(parts[0], *parts[1], **parts[2])
    if kind in (tuple, dict):
        items = [again(item) for item in (value.values() if kind is dict else value)]
        if all(a is b for a, b in zip(items, value.values() if kind is dict else value, strict=True)):
            return value
        return dict(zip(value, items, strict=True)) if kind is dict else tuple(items)
    if is_plain(kind) and hasattr(value, "__dict__") and not slots(kind):
        # an object that only refers to a network, as to look at its activations, stays the user's, and what it records with it
        attributes = {
            name: item if isinstance(item, nn.Module) else twin_of(item) for name, item in vars(value).items()
        }
        if any(item is not vars(value)[name] for name, item in attributes.items()):
            twin = object.__new__(kind)
            twin.__dict__.update(attributes)
            return twin
    return value


def _defaults(function: types.FunctionType) -> tuple[Any, Any]:
    return function.__defaults__, function.__kwdefaults__


def _rebound_cell(cell: types.CellType, again: Callable[[Any], Any]) -> types.CellType:
    r"""The cell itself where its contents stay: a hook may count in a variable of the user."""
    with contextlib.suppress(ValueError):
        inside = again(cell.cell_contents)
        return cell if inside is cell.cell_contents else types.CellType(inside)
    return cell
