r"""Gradients of gradients."""

from __future__ import annotations

import weakref

import pytest
import torch
from deepinv.physics import BlurFFT

from deepinv_deq import DEGrad, DEQReconstructor, ModularIDHook, Solver
from tests.implicit.common import ei_loss, tower
from tests.problems import (
    F64,
    TEMPLATES,
    Parametric,
    SmallDenoiser,
    imaging,
    relative_error,
    unrolled,
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_derivatives_of_any_order_equal_those_of_an_unrolled_solve(template):
    model, physics, _, y = imaging(template)
    inputs = [*model.parameters(), y.requires_grad_()]
    ours = tower(model(y, physics), inputs, 3)
    exact = tower(unrolled(model, y, physics, 120), inputs, 3)
    for order, (a, b) in enumerate(zip(ours, exact, strict=True), 1):
        assert relative_error(a, b) <= 1e-8, order


def test_derivatives_of_a_scalar_equation():
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    f = Parametric(lambda x, a: a * torch.cos(x), a)
    with torch.no_grad():
        x, _ = Solver("anderson", tol=1e-15)(f, torch.zeros(1, 1, dtype=F64))
    (first,) = torch.autograd.grad(ModularIDHook(Solver("gmres", tol=1e-14))(f, x).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    s, c = x.sin().item(), x.cos().item()
    assert first.item() == pytest.approx(c / (1 + 0.5 * s), rel=1e-13)
    # the derivative of x' = cos x / (1 + a sin x), with x' again
    d = c / (1 + 0.5 * s)
    assert second.item() == pytest.approx(
        (-s * d * (1 + 0.5 * s) - c * (s + 0.5 * c * d)) / (1 + 0.5 * s) ** 2, rel=1e-12
    )


def test_second_derivatives_agree_with_finite_differences():
    model, physics, _, y = imaging(side=2, batch=1)
    assert torch.autograd.gradgradcheck(lambda y: model(y, physics), y.requires_grad_(), atol=1e-6)


def test_second_derivatives_through_two_passes_of_the_model():
    model, physics, _, y = imaging()

    def curvature(reconstruct):
        grads = torch.autograd.grad(ei_loss(reconstruct, y, physics), list(model.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters()))

    exact = curvature(lambda y, physics: unrolled(model, y, physics, 120))
    assert relative_error(curvature(model), exact) <= 1e-8


def test_second_derivatives_of_several_tensors_and_a_linear_map():
    w = torch.tensor(0.4, dtype=F64, requires_grad=True)
    # (u, v) = (w v + 1, w u + u²/9): linear in one of them
    f = Parametric(lambda x, w: (w * x[1] + 1, w * x[0] + x[0].square() / 9), w)
    start = (torch.zeros(2, 1, dtype=F64), torch.zeros(2, 1, dtype=F64))
    with torch.no_grad():
        star, _ = Solver("anderson", tol=1e-15, max_iter=100)(f, start)
    ours = tower(torch.cat(ModularIDHook(Solver("gmres", tol=1e-14))(f, star)), [w], 3)
    state = start
    for _ in range(200):
        state = f(state)
    for a, b in zip(ours, tower(torch.cat(state), [w], 3), strict=True):
        assert relative_error(a, b) <= 1e-10


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_second_derivatives_where_the_solves_are_preconditioned_or_chunked(chunk_size):
    physics = BlurFFT((1, 8, 8), filter=torch.tensor([[[[0.2, 0.6, 0.2]]]])).to(F64)
    settings = {"max_iter": 300, "tol": 1e-13, "chunk_size": chunk_size}
    model = DEQReconstructor(
        DEGrad(SmallDenoiser(), stepsize=0.5).to(F64),
        solver=Solver("anderson", **settings),
        hook=ModularIDHook(Solver("gmres", **settings)),
    )
    y = physics(torch.rand(3, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    inputs = [*(p for p in model.parameters() if p.requires_grad), y]
    for a, b in zip(
        tower(model(y, physics), inputs, 2), tower(unrolled(model, y, physics, 120), inputs, 2), strict=True
    ):
        assert relative_error(a, b) <= 1e-8


def test_second_derivatives_of_a_complex_state():
    w = torch.tensor(0.7 + 0.3j, dtype=torch.complex128, requires_grad=True)
    f = Parametric(lambda x, w: 0.4 * w * torch.sin(x) + (1 + 0.5j), w)

    def derivatives(x_hat):
        loss = x_hat.abs().square().sum() + x_hat.real.sin().sum()
        (first,) = torch.autograd.grad(loss, w, create_graph=True)
        return first, *torch.autograd.grad(first.abs().square(), w)

    x = torch.zeros(2, 3, dtype=torch.complex128)
    with torch.no_grad():
        x_star, _ = Solver("anderson", tol=1e-15, max_iter=100)(f, x)
    for _ in range(100):
        x = f(x)
    for a, b in zip(derivatives(ModularIDHook(Solver("gmres", tol=1e-14))(f, x_star)), derivatives(x), strict=True):
        assert relative_error(a, b) <= 1e-12


@pytest.mark.parametrize("mode, bare", [("implicit", True), ("jfb", True), ("jfb", False)])
@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.pow(2).sum()])  # with a constant cotangent too
def test_second_derivatives_are_refused_where_they_would_be_wrong(mode, bare, loss):
    model, physics, _, y = imaging(mode=mode)
    y.requires_grad_()
    f = model.iteration.bind(y, physics)
    x_star, _ = model.solver(f, model.iteration.init(y, physics))
    x_hat = model.hook((lambda x: f(x)) if bare else f, x_star)
    (grad,) = torch.autograd.grad(loss(x_hat), y, create_graph=True)
    with pytest.raises(RuntimeError, match="Second-order"):
        grad.pow(2).sum().backward()


def test_second_order_graph_is_freed_at_once():
    model, physics, _, y = imaging()
    f = model.iteration.bind(y.requires_grad_(), physics)
    x_star, _ = model.solver(f, model.iteration.init(y, physics))
    (grad,) = torch.autograd.grad(model.hook(f, x_star).sin().sum(), y, create_graph=True)
    held = weakref.ref(f)
    del f
    assert held() is not None
    del grad
    assert held() is None  # a cycle would wait for the garbage collector
