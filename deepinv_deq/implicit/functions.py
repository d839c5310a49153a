r"""The autograd functions that stand for a fixed point in a graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.autocast import autocast_settings
from deepinv_deq.implicit.adjoint import Adjoint, as_state
from deepinv_deq.implicit.context import as_in_forward, usable
from deepinv_deq.implicit.graphs import Gradients, Tensors
from deepinv_deq.implicit.mapped import VMAP, Mapped
from deepinv_deq.implicit.unchanged import IN_PLACE, refuse_other_image
from deepinv_deq.maps import Map
from deepinv_deq.states import as_tuple

TANGENT = (
    "The tangent of a fixed point has no further derivative. For second derivatives use torch.autograd.grad(..., "
    "create_graph=True), whose gradients have gradients of any order."
)
SECOND_ORDER = (
    "Second-order gradients (create_graph=True) need mode='implicit' and a map that names the tensors it depends on: use "
    "iteration.bind(y, physics), or a map with the methods of DifferentiableMap. A plain callable does not name them, and the "
    "result of mode='jfb' is not the gradient of any function."
)


def _kept(ctx: Any, adjoint: Adjoint, f: Any, n: int, *tensors: Tensor) -> Tensors:
    r"""``x_star``, the first ``n`` tensors, with all that the backward pass needs."""
    ctx.adjoint, ctx.f, ctx.n = adjoint, f, n
    ctx.autocast = autocast_settings(tensors[0].device.type)
    ctx.save_for_backward(*tensors)  # which also notices a tensor that is changed in place before backward
    return tuple(x.clone() for x in tensors[:n])


def _saved(ctx: Any) -> Tensors:
    r"""What :func:`_kept` saved.

    :raises RuntimeError: if one of the tensors was changed in place since.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):  # say, a graph that was freed
            raise
        raise RuntimeError(IN_PLACE.format(which="")) from error


class FixedPoint(torch.autograd.Function):
    r"""``x_star`` as a function of all inputs of a map that names them: builds the graph of the map once, in backward."""

    forward = staticmethod(_kept)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Any, ...]:
        saved = _saved(ctx)  # once: torch.utils.checkpoint refuses a second reading
        x_star, inputs = saved[: ctx.n], saved[ctx.n :]
        adjoint, f = ctx.adjoint, ctx.f
        create_graph = torch.is_grad_enabled()  # in a backward pass under create_graph=True only
        mapped = Mapped.of(g)
        refuse_tangents(g)
        with as_in_forward(ctx.autocast), compat.tangents(False):
            if mapped is not None:
                grads = _one_by_one(adjoint, f, x_star, inputs, g, mapped)
            elif create_graph and adjoint.exact:
                x_hat = FixedPoint.apply(adjoint, f, ctx.n, *saved)

                def fixed_point(of: Map, b: Tensors, given: Tensors) -> Tensors:
                    return FixedPoint.apply(adjoint.without_reached(), of, len(b), *b, *given)

                grads = adjoint.differentiable_gradient(f, x_hat, inputs, g, fixed_point)
            else:
                grads = adjoint.gradient(f, x_star, inputs, usable(g))
                grads = refuse_second_order(grads, (*g, *saved)) if create_graph else grads
        return (None,) * (3 + ctx.n) + grads


def _one_by_one(adjoint: Adjoint, f: Map, x_star: Tensors, inputs: Tensors, g: Tensors, mapped: Mapped) -> Gradients:
    r"""The gradients for cotangents over which ``vmap`` maps, each by a solve of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(VMAP)
    cotangents = zip(*mapped.gather(g), strict=True)
    each = [adjoint.gradient(f, x_star, inputs, usable(tuple(parts))) for parts in cotangents]
    grads: list[Tensor | None] = []
    for parts, t in zip(zip(*each, strict=True), inputs, strict=True):
        there = [torch.zeros_like(t) if p is None else p for p in parts]
        grads += [None] if all(p is None for p in parts) else [mapped.scatter((torch.stack(there),))[0]]
    return tuple(grads)


class BareAdjoint(torch.autograd.Function):
    r"""Replaces the cotangent :math:`g` of an evaluation :math:`F(x^*)` by the solution :math:`b` of eq. 10."""

    forward = staticmethod(_kept)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Any, ...]:
        saved, adjoint = _saved(ctx), ctx.adjoint
        create_graph, b = torch.is_grad_enabled(), g
        if Mapped.of(g) is not None:
            raise RuntimeError(VMAP)
        refuse_tangents(g)
        if adjoint.exact:
            with as_in_forward(ctx.autocast), compat.tangents(False):
                x = tuple(t.detach().requires_grad_() for t in saved[: ctx.n])
                with torch.enable_grad():
                    image = as_tuple(ctx.f(as_state(x, adjoint.single)))
                refuse_other_image(saved[ctx.n :], image, adjoint.solver.batched)
                b, _, stat = adjoint.pull_back(image, x, (), usable(g))
            if stat is not None:
                adjoint.report(stat)
        grads = refuse_second_order(b, (*g, *saved)) if create_graph else b
        return (None,) * (3 + ctx.n) + tuple(grads)


class Refused(torch.autograd.Function):
    r"""The first ``n`` tensors, whose derivatives with respect to all of them are an error instead of a wrong value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, n: int, *tensors: Tensor) -> Tensors:
        return tuple(t.clone() for t in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def refuse_second_order(grads: Gradients, outer: Tensors) -> Gradients:
    r"""Tie gradients to all they depend on (``outer``: cotangents and inputs) by an error."""
    there = [t for t in grads if t is not None]
    tied = iter(Refused.apply(SECOND_ORDER, len(there), *there, *outer) if there else ())
    return tuple(None if t is None else next(tied) for t in grads)


def refuse_tangents(g: Tensors) -> None:
    r"""Raise if a cotangent has a tangent, which asks for derivatives of the gradient in forward mode."""
    if compat.forward_mode() and any(forward_ad.unpack_dual(t).tangent is not None for t in g):
        raise RuntimeError(TANGENT)
