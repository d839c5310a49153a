r"""Adjoints that deepinv builds by backpropagation through :math:`A`: a replica needs those of its own operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from deepinv.physics import LinearPhysics, Tomography
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.implicit.graphs import AUXILIARY, leaves

Operator = Callable[[Tensor], Tensor]


class _AnyShape:
    r"""Equal to every shape, so that deepinv does not build its own adjoint for another one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class OwnAdjoint:
    r"""The adjoint of an operator of a physics by backpropagation through it.

    deepinv keeps such a function on the module, or builds one in each call. It belongs to the original, and is a class inside a
    reference cycle, which keeps its graph until the garbage collector runs.

    :param deepinv.physics.LinearPhysics physics: replica.
    :param str operator: the method whose adjoint it is.
    """

    _shared_by_replicas = True  # every replica gets its own

    def __init__(self, physics: LinearPhysics, operator: str = "A"):
        self._physics, self._operator = weakref.ref(physics), operator

    def __deepcopy__(self, memo: Any) -> None:
        return None  # deepinv builds that of a copy

    def __call__(self, y: Tensor) -> Tensor:
        physics: Any = self._physics()
        dtype = torch.float64 if y.real.dtype == torch.float64 else torch.float32
        like = torch.ones(len(y), *physics.img_size, dtype=dtype, device=y.device)
        return transposed(getattr(physics, self._operator), y, like)


class _OfTomography(OwnAdjoint):
    r"""The same with one graph for all products, because the graph of a Radon transform is large."""

    _graph: tuple[Any, Tensor, Tensor] | None = None

    def __call__(self, y: Tensor) -> Tensor:
        physics: Any = self._physics()
        return _Transposed.apply(y, lambda y: self._product(y, physics), physics.A)

    def _product(self, y: Tensor, physics: Tomography) -> Tensor:
        shape = (*y.shape[:2], physics.img_width, physics.img_width)
        with torch.inference_mode(False), torch.enable_grad():
            if self._graph is None or self._graph[0] != (shape, y.device):
                x = torch.zeros(shape, device=y.device, dtype=physics.dtype, requires_grad=True)
                self._graph = (shape, y.device), x, physics.A(x)
            _, x, measured = self._graph
            return torch.autograd.grad(measured, x, _cotangent(y, measured), retain_graph=True)[0]


class _Images:
    r"""Shape and type of the images of the user's adjoint. deepinv does not store them, so the first call measures them.

    :param Callable original: the user's adjoint.
    """

    _shared_by_replicas = True

    def __init__(self, original: Operator):
        self._original = original
        self._known: tuple[torch.Size, torch.dtype] | None = None

    def like(self, y: Tensor) -> Tensor:
        r"""An image for measurements."""
        if self._known is None:
            with torch.no_grad():
                x = self._original(y.detach())
            self._known = x.shape[1:], x.dtype
        shape, dtype = self._known
        return torch.ones(len(y), *shape, dtype=dtype, device=y.device)


class PrivateAdjoint:
    r"""What :func:`deepinv.physics.adjoint_function` made, of a private operator.

    :param Callable operator: the operator of the replica.
    :param Callable original: the user's adjoint.
    """

    def __init__(self, operator: Operator, original: Operator):
        self._operator, self._images = operator, _Images(original)

    def __call__(self, y: Tensor) -> Tensor:
        return transposed(self._operator, y, self._images.like(y))


def transposed(operator: Operator, y: Tensor, like: Tensor) -> Tensor:
    r""":math:`A^\top y`, differentiable in ``y`` and in all tensors of the operator.

    :param Callable operator: the linear operator :math:`A`.
    :param torch.Tensor y: measurements.
    :param torch.Tensor like: any image, with as many samples.
    :return: image, shaped like ``like``.
    """
    if compat.transforms():
        measured, pull_back = cast(Any, torch.func).vjp(operator, like)
        return pull_back(y.to(measured.dtype))[0]
    with torch.inference_mode(False), torch.enable_grad():
        x = like.clone().requires_grad_()
        setattr(x, AUXILIARY, True)  # the operator is linear: its second derivative is zero
        measured = operator(x)
    if y.is_inference() and not torch.is_inference_mode_enabled():
        y = y.clone()
    if torch.is_grad_enabled() and any(True for _ in leaves((measured,))):
        return torch.autograd.grad(measured, x, y.to(measured.dtype), create_graph=True)[0]

    again = compat.forward_mode()  # the tangent needs the graph a second time

    def product(y: Tensor) -> Tensor:
        return torch.autograd.grad(measured, x, _cotangent(y, measured), retain_graph=again)[0]

    # not every operator of PyTorch has a second derivative, but the adjoint of the adjoint is the operator
    return _Transposed.apply(y, product, operator)


def _cotangent(y: Tensor, measured: Tensor) -> Tensor:
    return (y.clone() if y.is_inference() else y.detach()).to(measured.dtype)


class _Transposed(torch.autograd.Function):
    r"""The adjoint, whose own adjoint is the operator."""

    @staticmethod
    def forward(y: Tensor, product: Operator, operator: Operator) -> Tensor:
        return product(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.product, ctx.operator = inputs[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.operator(g), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return ctx.product(tangent)


def own_adjoint(physics: LinearPhysics) -> None:
    r"""Give a replica its own version of the adjoints that deepinv builds.

    :param deepinv.physics.LinearPhysics physics: the replica, changed in place.
    """
    inside = physics.__dict__
    if isinstance(physics, Tomography) and "_auto_grad_adjoint_fn" in inside:
        inside["_auto_grad_adjoint_fn"] = _OfTomography(physics)
        inside["_auto_grad_adjoint_input_shape"] = _AnyShape()
    for name, operator in compat.BUILT_ADJOINTS.items() if inside.get("img_size") is not None else ():
        if name in inside and (inside[name] is None or isinstance(inside[name], OwnAdjoint)):
            inside[name] = OwnAdjoint(physics, operator)


def private_adjoint(function: Any, replicate: Callable[[Any], Any]) -> Any:
    r"""The adjoint of a replica in the place of one that :func:`deepinv.physics.adjoint_function` made.

    :param Callable function: any function.
    :param Callable replicate: replicates the operator.
    :return: the adjoint; the function itself if its operator has nothing to replicate; ``None`` for any other function.
    """
    operator = compat.operator_of_adjoint(function)
    if operator is None:
        return None
    own = replicate(operator)
    return function if own is operator else PrivateAdjoint(own, function)
