r"""Losses and derivatives shared by the tests of implicit differentiation."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad


def rotate(x):
    return torch.rot90(x, 1, (-2, -1))


def ei_loss(model, y, physics):
    r"""Measurement consistency plus the EI composition f(A T_g f(y)) of eq. 9."""
    x1 = model(y, physics)
    x2 = rotate(x1)
    x3 = model(physics.A(x2), physics)
    return (physics.A(x1) - y).pow(2).mean() + 3 * (x3 - x2).pow(2).mean()


def sup_loss(model, y, physics):
    return model(y, physics).sin().sum()


def gradients(loss, model, inputs):
    return torch.autograd.grad(loss, [*model.parameters(), *inputs])


def tower(x_hat, inputs, orders):
    r"""Derivatives of a loss along fixed directions, each taken of the one before: gradients of order 1 to ``orders``."""
    rng = torch.Generator().manual_seed(1)
    out, value = [], x_hat.sin().sum()
    for order in range(1, orders + 1):
        grads = torch.autograd.grad(value, inputs, create_graph=order < orders, materialize_grads=True)
        out.append(grads)
        value = sum((g * torch.randn(g.shape, generator=rng, dtype=g.dtype)).sum() for g in grads)
    return out


def direction(t, seed=1):
    return torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(seed))


def dual_tangent(function, *pairs):
    r"""The tangent of a function of dual tensors."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*(forward_ad.make_dual(p, t) for p, t in pairs))).tangent
