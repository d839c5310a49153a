r"""Forward mode: the tangent of a fixed point, by one linear solve with Jacobian-vector products.

The tangent :math:`v` of :math:`\hat x = F(\hat x)` solves :math:`v = \frac{\partial F}{\partial x} v + t`, where :math:`t` is the
tangent of :math:`F(\hat x)` with :math:`\hat x` held fixed. Both come from evaluations of :math:`F` with dual tensors, so every
tensor that has a tangent is included: measurements, physics, parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.implicit.adjoint import LinearSolves, as_state
from deepinv_deq.implicit.functions import TANGENT, Refused
from deepinv_deq.implicit.graphs import Tensors
from deepinv_deq.implicit.mapped import VMAP, Mapped
from deepinv_deq.maps import AffineMap, Map
from deepinv_deq.states import State, as_tuple

_OF_TORCH_FUNC = (
    "torch.func.grad, vjp and jacrev, and derivatives of a torch.func.jvp, have no implicit gradient. Use torch.autograd.grad, "
    "loss.backward() or torch.autograd.functional.jacobian for reverse mode."
)


class Tangent(LinearSolves):
    r"""The solve for a tangent; where it is not exact, :math:`v = t`, the counterpart of Jacobian-free backpropagation."""

    def of(self, f: Map, x: Tensors) -> Tensors | None:
        r"""The tangent of the fixed point ``x`` of ``f``.

        :param Map f: the map.
        :param tuple[torch.Tensor, ...] x: its fixed point, without tangents.
        :return: the tangent; ``None`` where nothing that the map depends on has one.
        :raises RuntimeError: inside of several transforms of :mod:`torch.func`, but for ``jacfwd``.
        """
        if "Grad" in compat.transforms():
            raise RuntimeError(_OF_TORCH_FUNC)
        if compat.transforms().count("Jvp") > 1:
            raise RuntimeError(TANGENT)
        x = tuple(t.detach() for t in x)
        with torch.no_grad(), compat.tangents(True):
            parts = _tangents(f(as_state(x, self.single)))
            if all(t is None for t in parts):
                return None
            t = tuple(torch.zeros_like(a) if p is None else p.to(a.dtype) for a, p in zip(x, parts, strict=True))
            return self._solve(f, x, t) if self.exact else t

    def _solve(self, f: Map, x: Tensors, t: Tensors) -> Tensors:
        many = Mapped.of(t)

        def linear(v: State) -> State:
            direction = as_tuple(v) if many is None else many.apart(as_tuple(v))
            with torch.no_grad(), compat.tangents(True):
                duals = [forward_ad.make_dual(a, d.to(a.dtype)) for a, d in zip(x, direction, strict=True)]
                parts = _tangents(f(as_state(duals, self.single)))
            out = tuple(torch.zeros_like(b) if p is None else p.to(b.dtype) - b for b, p in zip(t, parts, strict=True))
            return as_state(out if many is None else many.states(out), self.single)

        offset = as_state(t if many is None else many.states(t), self.single)
        with compat.tangents(False):
            inverse = f.preconditioner(as_state(x, self.single)) if self.solver.precondition else None
            if inverse is not None and many is not None:
                inverse = many.on_states(inverse, self.single)
            equation = AffineMap(linear, offset, inverse)
            v, stat = self.solve(equation, equation)
            self.report(stat)
            return v if many is None else many.apart(v)


@contextmanager
def refusing_vmap() -> Iterator[None]:
    r"""Replace the error of ``vmap``, which fails where a solve reads a value, by one that names the alternative.

    :raises RuntimeError: in the place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        mapped = "Vmap" in compat.transforms() and "vmap" in str(error) or "Batching rule not implemented" in str(error)
        if mapped and VMAP not in str(error):
            raise RuntimeError(VMAP) from error
        raise


def without_tangents(x: Tensors) -> Tensors:
    r"""The same tensors, with their autograd graphs, without their tangents."""
    return tuple(forward_ad.unpack_dual(t).primal for t in x)


def attach(x_hat: Tensors, tangent: Tensors, graph: bool) -> Tensors:
    r"""Fixed point and tangent as dual tensors.

    :param tuple[torch.Tensor, ...] x_hat: the fixed point, without tangents.
    :param tuple[torch.Tensor, ...] tangent: its tangent.
    :param bool graph: whether the fixed point is in an autograd graph, where derivatives of the tangent are an error.
    :return: the same values, with tangents.
    """
    if graph:
        with compat.tangents(False):
            tangent = Refused.apply(TANGENT, len(tangent), *tangent, *x_hat)
    return tuple(forward_ad.make_dual(x, d) for x, d in zip(x_hat, tangent, strict=True))


def refuse_reverse(x_star: Tensors, inputs: Tensors, transforms: Sequence[str]) -> Tensors:
    r"""The fixed point inside of a transform of :mod:`torch.func`: its reverse derivatives are an error.

    :param tuple[torch.Tensor, ...] x_star: the fixed point.
    :param tuple[torch.Tensor, ...] inputs: what it depends on.
    :param Sequence[str] transforms: those in force.
    :return: the same values.
    :raises RuntimeError: at once, if reverse derivatives are what the transform takes.
    """
    if "Grad" in transforms:
        raise RuntimeError(_OF_TORCH_FUNC)
    with compat.tangents(False):
        return Refused.apply(_OF_TORCH_FUNC, len(x_star), *x_star, *inputs)


def _tangents(image: Any) -> list[Tensor | None]:
    return [forward_ad.unpack_dual(t).tangent for t in as_tuple(image)]
