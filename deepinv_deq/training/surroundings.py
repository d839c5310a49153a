r"""What a training changes outside of its model: numbers and tensors of losses, metrics and physics."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deepinv_deq import compat

_PARTS = ("physics", "losses", "metrics")  # physics first: a loss may keep it as an attribute
_PLAIN = frozenset({bool, int, float, str, type(None)})


class Surroundings:
    r"""The state of the losses, metrics and physics of a run, as far as it has changed since the run was built.

    Such as the noise level that UNSURE estimates, the place in a schedule of losses, or a learned parameter of the physics. deepinv
    saves model, optimiser and scheduler only. Tensors that stay as they are, such as the matrix of an operator, are not saved. Neither
    are private attributes, containers and other objects.

    :param deepinv.Trainer run: the run, before any training.
    """

    def __init__(self, run: Any):
        self._before = {path: _mark(value) for path, value in _values(run)}

    def changed(self, run: Any) -> dict[str, dict[str, Any]]:
        r"""Everything that has changed, by its path: tensors that were changed in place, and all that is another object.

        :param deepinv.Trainer run: the run.
        :return: tensors on their devices, and plain values.
        """
        found: dict[str, dict[str, Any]] = {"in place": {}, "replaced": {}}
        for path, value in _values(run):
            mark = self._before.get(path)
            if not _same(mark, value):
                kept = isinstance(mark, tuple) and mark[0]() is value
                found["in place" if kept else "replaced"][path] = _copy(value)
        return found

    def missing(self, run: Any) -> list[str]:
        r"""What an optimiser trains although it is neither in the model nor in losses, metrics and physics.

        :param deepinv.Trainer run: the run.
        :return: descriptions for a warning.
        """
        known = {id(t) for t in (*run.model.parameters(), *(value for _, value in _values(run)))}
        lost = [tuple(t.shape) for t in _trained(run) if id(t) not in known and not is_lazy(t)]
        return [
            f"a tensor of shape {shape} that the optimiser trains, and that belongs to no part of the run"
            for shape in lost
        ]


def check(run: Any, saved: Mapping[str, Mapping[str, Any]]) -> None:
    r"""Verify that a run has a place for all that a checkpoint holds of its surroundings.

    :param deepinv.Trainer run: the run.
    :param Mapping saved: what :meth:`Surroundings.changed` returned.
    :raises ValueError: with the place that is lacking.
    """
    for path, module, ours, value, copied in _places(run, saved):
        same = is_lazy(ours) or getattr(ours, "shape", None) == getattr(value, "shape", None)
        if module is None or (copied and not same):
            raise ValueError(
                f"it holds {path}, which this run lacks or has in another shape: build losses, metrics and physics as they were"
            )


def put(run: Any, saved: Mapping[str, Mapping[str, Any]]) -> None:
    r"""Put values into losses, metrics and physics.

    A tensor that was changed in place is changed in place again, so that the optimiser and other parts still refer to it.

    :param deepinv.Trainer run: the run, changed in place.
    :param Mapping saved: what :meth:`Surroundings.changed` returned, and :func:`check` has verified.
    """
    for path, module, ours, value, copied in _places(run, saved):
        if is_lazy(ours):
            ours.materialize(value.shape)
        if copied:
            with torch.no_grad():
                ours.copy_(value)
        else:
            setattr(module, path.rpartition(".")[2], value.to(ours.device) if isinstance(ours, Tensor) else value)


def _trained(run: Any) -> Iterator[Tensor]:
    for group in getattr(run.optimizer, "param_groups", ()):
        yield from group["params"]


def _places(run: Any, saved: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, nn.Module | None, Any, Any, bool]]:
    r"""Path, module, present value (``None`` for an attribute of the first step), saved value, and whether it is copied in place."""
    modules, trained = dict(_modules(run)), {id(t) for t in _trained(run)}
    for kind, values in saved.items():
        for path, value in values.items():
            owner, _, name = path.rpartition(".")
            module = modules.get(owner)
            ours = getattr(module, name, None)
            yield path, module, ours, value, kind == "in place" or isinstance(ours, nn.Parameter) or id(ours) in trained


def _modules(run: Any) -> Iterator[tuple[str, nn.Module]]:
    r"""Every module around the model, by path, each once."""
    seen = {id(module) for module in run.model.modules()}
    for part in _PARTS:
        value = getattr(run, part, None)  # the Trainer makes lists of single ones later
        yield from _inside(value if isinstance(value, (list, tuple)) else [value], part, seen)


def _inside(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _inside(item, f"{path}[{i}]", seen)
    elif isinstance(value, nn.Module) and id(value) not in seen:
        seen.add(id(value))
        yield path, value
        for name, item in (*value.named_children(), *_own(value)):
            yield from _inside(item, f"{path}.{name}", seen)


def _own(module: nn.Module) -> list[tuple[str, Any]]:
    r"""The public attributes of a module that are neither its tensors nor its submodules."""
    return [item for item in vars(module).items() if item[0] not in compat.OF_MODULES and not item[0].startswith("_")]


def _values(run: Any) -> Iterator[tuple[str, Any]]:
    r"""Path and value of every tensor and every plain attribute around the model."""
    for path, module in _modules(run):
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in (*tensors, *_own(module)):
            plain = type(value) in _PLAIN or isinstance(value, np.generic)
            if plain or (isinstance(value, Tensor) and not is_lazy(value)):
                yield f"{path}.{name}", value


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value.item() if isinstance(value, np.generic) else value


def _mark(value: Any) -> Any:
    r"""What tells later whether a value has changed, without a copy of a tensor."""
    return (weakref.ref(value), compat.version(value)) if isinstance(value, Tensor) else value


def _same(mark: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(mark, tuple) and mark[0]() is value and mark[1] == compat.version(value)
    return type(mark) is type(value) and bool(mark == value or (mark != mark and value != value))  # both NaN
