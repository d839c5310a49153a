r"""What a training changes outside of its model: numbers and tensors of losses, metrics and physics."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepinv_deq import compat

_PARTS = ("losses", "metrics", "physics")
_PLAIN = (bool, int, float, str, type(None))


class Surroundings:
    r"""The state of the losses, metrics and physics of a run, as far as it has changed since the run was built.

    Such as the noise level that UNSURE estimates, the place in a schedule of losses, or a learned parameter of the physics. deepinv
    saves model, optimiser and scheduler only. Big constant tensors, such as the matrix of an operator, are not saved.

    :param deepinv.Trainer run: the run, before any training.
    """

    def __init__(self, run: Any):
        self._before = {path: _mark(value) for path, (_, _, value) in _slots(run)}

    def changed(self, run: Any) -> dict[str, Any]:
        r"""Everything that has changed, by its path.

        :param deepinv.Trainer run: the run.
        :return: tensors on their devices, and plain values.
        """
        found = ((path, value) for path, (_, _, value) in _slots(run))
        now = {path: value for path, value in found if not _same(self._before.get(path), value)}
        return {path: _copy(value) if isinstance(value, Tensor) else value for path, value in now.items()}

    def missing(self, run: Any) -> list[str]:
        r"""What an optimiser trains although it is neither in the model nor in losses, metrics and physics.

        :param deepinv.Trainer run: the run.
        :return: descriptions for a warning.
        """
        known = {id(t) for t in (*run.model.parameters(), *(value for _, (_, _, value) in _slots(run)))}
        groups = [] if run.optimizer is None else run.optimizer.param_groups
        lost = [tuple(t.shape) for group in groups for t in group["params"] if id(t) not in known]
        return [
            f"a tensor of shape {shape} that the optimiser trains, and that belongs to no part of the run"
            for shape in lost
        ]


def check(run: Any, saved: Mapping[str, Any]) -> None:
    r"""Verify that a run has a place for all that a checkpoint holds of its surroundings.

    :param deepinv.Trainer run: the run.
    :param Mapping saved: what :meth:`Surroundings.changed` returned.
    :raises ValueError: with the place that is lacking.
    """
    places = dict(_slots(run))
    for path, value in saved.items():
        ours = places.get(path, (None, "", None))[2]
        fits = path in places and (not isinstance(ours, nn.Parameter) or getattr(value, "shape", None) == ours.shape)
        if not fits:
            raise ValueError(
                f"it holds {path}, which this run lacks or has in another shape: build losses, metrics and physics as they were"
            )


def put(run: Any, saved: Mapping[str, Any]) -> None:
    r"""Put values into losses, metrics and physics.

    :param deepinv.Trainer run: the run, changed in place.
    :param Mapping saved: what :meth:`Surroundings.changed` returned, and :func:`check` has verified.
    """
    places = dict(_slots(run))
    for path, value in saved.items():
        module, name, ours = places[path]
        if isinstance(ours, Tensor) and isinstance(value, Tensor):
            value = value.to(ours.device)
        if isinstance(ours, nn.Parameter):
            with torch.no_grad():
                ours.copy_(value)  # the optimiser refers to it
        else:
            setattr(module, name, value)


def _slots(run: Any) -> Iterator[tuple[str, tuple[nn.Module, str, Any]]]:
    r"""Path, module, name and value of every tensor and every plain attribute around the model."""
    seen = {id(module) for module in run.model.modules()}
    for part in _PARTS:
        value = getattr(run, part, None)  # the Trainer makes lists of single ones later
        yield from _inside(value if isinstance(value, (list, tuple)) else [value], part, seen)


def _inside(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, tuple[nn.Module, str, Any]]]:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _inside(item, f"{path}[{i}]", seen)
    elif isinstance(value, nn.Module) and id(value) not in seen:
        seen.add(id(value))
        hidden = ("training", *compat.OF_MODULES)
        own = {name: item for name, item in vars(value).items() if name not in hidden and not name.startswith("_")}
        tensors = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
        for name, item in (*tensors, *own.items()):
            if isinstance(item, (Tensor, *_PLAIN)):
                yield f"{path}.{name}", (value, name, item)
        for name, item in (*value.named_children(), *own.items()):
            yield from _inside(item, f"{path}.{name}", seen)


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def _mark(value: Any) -> Any:
    r"""What tells later whether a value has changed, without a copy of a tensor."""
    return (weakref.ref(value), compat.version(value)) if isinstance(value, Tensor) else value


def _same(mark: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(mark, tuple) and mark[0]() is value and mark[1] == compat.version(value)
    return type(mark) is type(value) and (mark == value or (mark != mark and value != value))  # both NaN
