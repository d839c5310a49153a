r"""Tensors over which ``vmap`` maps, as ordinary tensors: solvers look at values, which ``vmap`` forbids of mapped tensors.

:func:`torch.func.jacfwd` maps over tangents, ``torch.autograd.functional.jacobian(..., vectorize=True)`` over tangents or
cotangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.implicit.adjoint import as_state
from deepinv_deq.implicit.graphs import Tensors
from deepinv_deq.states import as_tuple

VMAP = (
    "torch.vmap cannot run through the solve of a fixed point, which stops by the values it finds. Put the samples into the "
    "batch dimension, where each is solved by itself; for a Jacobian use torch.func.jacfwd or "
    "torch.autograd.functional.jacobian (for second derivatives without vectorize=True)."
)


class _Gather(torch.autograd.Function):
    r"""All tensors over which ``vmap`` maps, stacked along a new first dimension, as one tensor that is not mapped."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x[None].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, None]:
        (dim,) = in_dims
        return (x[None] if dim is None else x.movedim(dim, 0)).clone(), None


class _Scatter(torch.autograd.Function):
    r"""The inverse of :class:`_Gather`: ``like`` is a tensor that was gathered."""

    @staticmethod
    def forward(x: Tensor, like: Tensor) -> Tensor:
        return x[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, like: Tensor) -> tuple[Tensor, int | None]:
        return (x.clone(), 0) if in_dims[1] is not None else (x[0].clone(), None)


class Mapped:
    r"""Converts between vmapped tensors and ordinary tensors with one extra dimension. Use :meth:`of`.

    :param tuple[torch.Tensor, ...] like: mapped tensors, of the shapes that ``vmap`` shows.
    :param bool functional: whether :func:`torch.vmap` maps, else the older one inside of :mod:`torch.autograd`.
    """

    def __init__(self, like: Tensors, functional: bool):
        self._like, self._functional = like, functional

    @staticmethod
    def of(tensors: Tensors) -> Mapped | None:
        r"""The kind of mapping in force.

        :param tuple[torch.Tensor, ...] tensors: tangents or cotangents.
        :return: ``None`` where nothing is mapped.
        """
        if "Vmap" in compat.transforms():
            return Mapped(_all_mapped(tensors), True)
        return Mapped(tensors, False) if any(compat.is_mapped(t) for t in tensors) else None

    def gather(self, tensors: Tensors) -> Tensors:
        r"""All tensors at once.

        :param tuple[torch.Tensor, ...] tensors: mapped tensors.
        :return: ordinary tensors with one more dimension, the first.
        """
        if self._functional:
            return tuple(_Gather.apply(t) for t in _all_mapped(tensors))
        together = [compat.gather(t) if compat.is_mapped(t) else None for t in tensors]
        count = next(len(t) for t in together if t is not None)
        pairs = zip(together, tensors, strict=True)
        return tuple(t.expand(count, *t.shape) if all_ is None else all_ for all_, t in pairs)

    def scatter(self, tensors: Tensors) -> Tensors:
        r"""The inverse of :meth:`gather`.

        :param tuple[torch.Tensor, ...] tensors: ordinary tensors.
        :return: mapped tensors.
        """
        if self._functional:
            return tuple(_Scatter.apply(t, self._like[0]) for t in tensors)
        return tuple(compat.scatter(t) for t in tensors)

    def states(self, tensors: Tensors) -> Tensors:
        r"""Mapped states as one ordinary state, whose samples are all samples of all of them."""
        pairs = zip(self.gather(tensors), self._like, strict=True)
        return tuple(t if s.ndim < 2 else t.flatten(0, 1) for t, s in pairs)

    def apart(self, tensors: Tensors) -> Tensors:
        r"""The inverse of :meth:`states`."""
        return self.scatter(tuple(t.reshape(-1, *s.shape) for t, s in zip(tensors, self._like, strict=True)))

    def on_states(self, function: Callable[[Any], Any], single: bool) -> Callable[[Any], Any]:
        r"""A function of mapped states as one of the ordinary state.

        :param Callable function: function of a state.
        :param bool single: whether a state is one tensor.
        :return: function of a state.
        """
        return lambda r: as_state(self.states(as_tuple(function(as_state(self.apart(as_tuple(r)), single)))), single)


def _all_mapped(tensors: Tensors) -> Tensors:
    r"""The same values, all of them mapped if one is: a variable may be constant where another is not."""
    if len(tensors) == 1:
        return tensors
    zero = torch.stack([torch.zeros_like(t).abs().sum() for t in tensors]).sum()
    return tuple(t + zero.to(t.real.dtype) for t in tensors)
