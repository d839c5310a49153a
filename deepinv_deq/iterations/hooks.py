r"""Hooks of replicas: what they refer to, and hooks that refer to replicas."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deepinv_deq.iterations.objects import contents


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

    What a hook refers to in a closure, as a default value or as an argument of ``functools.partial`` is replaced by its replica, if it has one. Everything
    else goes on being the user's, so that what a hook records in it reaches the user.

    :param Iterable hooks: the dictionaries of the hooks, changed in place.
    :param Mapping memo: originals and replicas, by the identity of the original.
    :param Mapping put: tensors to use in the place of others, by the identity of the others.
    """
    again = _Again(memo, put)
    for each in hooks:
        for key, hook in each.items():
            each[key] = again(hook)


class _Again:
    r"""What a hook is to refer to. No recursive function: it would refer to itself, and keep replicas alive."""

    def __init__(self, memo: Mapping[int, tuple[Any, Any]], put: Mapping[int, Tensor]):
        self._memo, self._put = memo, put
        self._known: dict[int, tuple[Any, Any]] = {}  # functions may refer to one another

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._put.get(id(value), value)
        found = self._memo.get(id(value)) or self._known.get(id(value))
        if found is not None:
            return found[1]
        if type(value) in (types.FunctionType, types.MethodType, functools.partial):
            self._known[id(value)] = value, value
            self._known[id(value)] = value, _rebound(value, self)
            return self._known[id(value)][1]
        return value


def _rebound(value: Any, again: Callable[[Any], Any]) -> Any:
    r"""A function, bound method or partial that refers to what ``again`` returns; itself where that is the same."""
    if isinstance(value, types.MethodType):
        owner = again(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        old: list[Any] = [value.func, *value.args, *value.keywords.values()]
        new: list[Any] = [again(part) for part in old]
        stop = 1 + len(value.args)
        if all(a is b for a, b in zip(old, new, strict=True)):
            return value
        return functools.partial(new[0], *new[1:stop], **dict(zip(value.keywords, new[stop:], strict=True)))
    cells, defaults, named = value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}
    inside = tuple(_rebound_cell(cell, again) for cell in cells)
    given = tuple(again(part) for part in defaults)
    of_names = {name: again(part) for name, part in named.items()}
    pairs = zip((*inside, *given, *of_names.values()), (*cells, *defaults, *named.values()), strict=True)
    if all(a is b for a, b in pairs):
        return value
    function = types.FunctionType(value.__code__, value.__globals__, value.__name__, given or None, inside)
    function.__kwdefaults__ = of_names or None
    function.__dict__.update(value.__dict__)
    return function


def _rebound_cell(cell: types.CellType, again: Callable[[Any], Any]) -> types.CellType:
    r"""The cell itself where its contents stay: a hook may count in a variable of the user."""
    with contextlib.suppress(ValueError):
        inside = again(cell.cell_contents)
        return cell if inside is cell.cell_contents else types.CellType(inside)
    return cell
