r"""Group norm with a faster backward pass on CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepinv_deq import compat


class GroupNorm(nn.GroupNorm):
    r"""Group norm (:footcite:t:`wu2018group`) with a backward pass that reads the image a few times only, on CPU.

    PyTorch's own backward pass takes as long as a 3x3 convolution of 16 feature maps. The same formula, written in sums and
    multiply-adds, takes a quarter to a tenth of that. Values, parameters and keys are those of :class:`torch.nn.GroupNorm`.
    Derivatives of any order, forward mode and ``vmap`` work. On accelerators, under autocast, and in compiled, traced or exported
    graphs, PyTorch's own function is used.

    :param args: arguments of :class:`torch.nn.GroupNorm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        r"""Normalise the groups of channels of every sample.

        :param torch.Tensor input: tensor of shape ``(B, C, *spatial)``.
        :return: tensor of the same shape.
        """
        if self.affine and _is_for(input, self.weight, self.bias):
            return _GroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)[0]
        return super().forward(input)


def _is_for(x: Tensor, *parameters: Tensor) -> bool:
    r"""Whether the function below computes the same as PyTorch's, and faster: on CPU, where derivatives are wanted."""
    if torch.compiler.is_compiling():
        return False
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    if not (wanted or compat.forward_mode()):  # early, as solves evaluate without a graph many times
        return False
    return not (
        torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or any(p.dtype != x.dtype for p in parameters)
        or x.ndim < 3
        or not x.numel()
    )


class _GroupNorm(torch.autograd.Function):
    r"""``(y, mean, rstd)``, of which only ``y`` is differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, *spatial = x.shape
        return torch.native_group_norm(x, weight, bias, batch, channels, torch.Size(spatial).numel(), groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.groups, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.save_for_forward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        x, weight, mean, rstd = _saved(ctx)
        space, size = tuple(range(2, x.ndim)), _size(x, ctx.groups)
        of_g = g.sum(space)
        of_gx = ((g * x).sum(space) - mean * of_g) * rstd  # sum of g times the normalised x
        a = rstd * weight
        b = -rstd.square() * _shared(of_gx * weight, ctx.groups) / size
        c = -rstd * _shared(of_g * weight, ctx.groups) / size - mean * b
        a, b, c = (t.reshape(*t.shape, *[1] * len(space)) for t in (a, b, c))
        return torch.addcmul(torch.addcmul(c, x, b), g, a), of_gx.sum(0), of_g.sum(0), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *_: Any) -> tuple[Any, ...]:
        x, weight, mean, rstd = _saved(ctx)
        space, size = tuple(range(2, x.ndim)), _size(x, ctx.groups)

        def spread(t: Tensor) -> Tensor:
            return t.reshape(*t.shape, *[1] * len(space))

        normal, out = (x - spread(mean)) * spread(rstd), torch.zeros_like(x)
        if dx is not None:
            change = dx - spread(_shared(dx.sum(space), ctx.groups) / size)
            along = _shared((normal * change).sum(space), ctx.groups) / size
            out = out + spread(rstd * weight) * (change - normal * spread(along))
        out = out if dw is None else out + normal * spread(dw)
        return out if db is None else out + spread(db), None, None


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Input, weight, and the mean and inverse deviation of every channel, which are constants unless they are differentiated."""
    x, weight, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled() or compat.forward_mode():
        variance, mean = torch.var_mean(x.reshape(len(x), ctx.groups, -1), dim=2, correction=0)
        rstd = (variance + ctx.eps).rsqrt()
    width = x.shape[1] // ctx.groups
    return x, weight, mean.repeat_interleave(width, 1), rstd.repeat_interleave(width, 1)


def _shared(t: Tensor, groups: int) -> Tensor:
    r"""The sum over each group of channels, given to each of its channels."""
    batch, channels = t.shape
    return t.reshape(batch, groups, -1).sum(2).repeat_interleave(channels // groups, 1)


def _size(x: Tensor, groups: int) -> int:
    return x[0].numel() // groups
