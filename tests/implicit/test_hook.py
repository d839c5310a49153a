r"""The implicit gradient against exact ones: contracts 1, 2 and 4."""

from __future__ import annotations

import pytest
import torch

from deepinv_deq import ConvergenceWarning, ModularIDHook, Solver
from deepinv_deq.implicit import DifferentiableMap
from tests.implicit.common import ei_loss, gradients, sup_loss
from tests.problems import (
    F64,
    TEMPLATES,
    MatrixPhysics,
    affine,
    dense_gradient,
    imaging,
    relative_error,
    unrolled,
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_gradient_of_one_pass_equals_the_dense_jacobian(template):
    model, physics, _, y = imaging(template)
    y.requires_grad_()
    x_hat = model(y, physics)
    g = torch.cos(x_hat.detach())
    inputs = [*model.parameters(), y]
    exact = dense_gradient(lambda x: model.iteration.bind(y, physics)(x), x_hat, g, inputs)
    ours = torch.autograd.grad(x_hat, inputs, g)
    # the parameters as one vector: the fixed point of DE-Grad does not depend on its stepsize
    assert relative_error(ours[:-1], exact[:-1]) <= 1e-8
    assert relative_error(ours[-1], exact[-1]) <= 1e-8


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("loss", [sup_loss, ei_loss])
def test_gradient_of_losses_equals_a_fully_unrolled_solve(template, loss):
    model, physics, _, y = imaging(template)
    y.requires_grad_()
    ours = gradients(loss(model, y, physics), model, [y])
    exact = gradients(loss(lambda y, p: unrolled(model, y, p), y, physics), model, [y])
    assert relative_error(ours[:-1], exact[:-1]) <= 1e-8
    assert relative_error(ours[-1], exact[-1]) <= 1e-8


@pytest.mark.parametrize("loss", [sup_loss, ei_loss])
def test_gradient_in_float32(loss):
    model, physics, _, y = imaging(dtype=torch.float32, tol=1e-6)
    exact_model, exact_physics, _, exact_y = imaging()
    ours = gradients(loss(model, y.requires_grad_(), physics), model, [y])
    exact = gradients(loss(exact_model, exact_y.requires_grad_(), exact_physics), exact_model, [exact_y])
    assert relative_error(ours, exact) <= 1e-4


@pytest.mark.parametrize("method", ["gmres", "anderson", "broyden", "fixed_point_iter"])
def test_gradient_is_the_same_with_every_backward_method(method):
    model, physics, _, y = imaging()
    exact = gradients(ei_loss(model, y, physics), model, [])
    model.hook = ModularIDHook(Solver(method, max_iter=400, tol=1e-13))
    assert relative_error(gradients(ei_loss(model, y, physics), model, []), exact) <= 1e-8


def test_callable_passes_gradcheck():
    theta = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    x0, hook = torch.zeros(2, 3, dtype=F64), ModularIDHook(Solver("gmres", tol=1e-13))

    def fixed_point(theta, c):
        f = lambda x: theta[0] * torch.sin(x) + theta[1] * x + c  # noqa: E731
        return hook(f, Solver("anderson", max_iter=200, tol=1e-13)(f, x0)[0])

    c = torch.randn(2, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed_point, (theta, c))


def test_state_of_several_tensors_and_a_complex_one():
    a = torch.tensor(0.4, dtype=F64, requires_grad=True)
    f = lambda s: (a * torch.tanh(s[1].real) + 1, (0.3 + 0.2j) * a * s[1] + s[0] * (1 - 1j))  # noqa: E731
    x0 = (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, dtype=torch.complex128))
    x, stat = Solver("anderson", max_iter=200, tol=1e-14)(f, x0)
    assert stat.converged.all() and x[1].is_complex()
    u, v = ModularIDHook(Solver("gmres", tol=1e-13))(f, x)
    (ours,) = torch.autograd.grad(u.sin().sum() + (v * v.conj()).real.sum(), a)
    s = x0
    for _ in range(200):
        s = f(s)
    (exact,) = torch.autograd.grad(s[0].sin().sum() + (s[1] * s[1].conj()).real.sum(), a)
    assert relative_error(ours, exact) <= 1e-8


def test_state_without_batch_is_one_sample():
    f, x_star, w = affine(batch=1)
    w.requires_grad_()
    c = x_star[0] - w.detach() @ x_star[0]
    f = lambda x: w @ x + c  # noqa: E731
    x_hat = ModularIDHook(Solver("gmres", tol=1e-13, history=40))(f, x_star[0])
    exact = dense_gradient(f, x_star[0], torch.ones_like(c), [w])
    assert relative_error(torch.autograd.grad(x_hat.sum(), w), exact) <= 1e-8


def test_gradient_of_the_physics_parameters():
    model, physics, _, y = imaging()
    matrix = physics.matrix.clone().requires_grad_()
    ours = torch.autograd.grad(sup_loss(model, y, MatrixPhysics(matrix, 4)), matrix)
    fixed = torch.autograd.grad(unrolled(model, y, MatrixPhysics(matrix, 4)).sin().sum(), matrix)
    assert relative_error(ours, fixed) <= 1e-8


def test_jfb_is_one_step_of_autograd():
    model, physics, _, y = imaging(mode="jfb")
    y.requires_grad_()
    ours = gradients(sup_loss(model, y, physics), model, [y])
    x_star = model(y, physics).detach()
    image = model.iteration.bind(y, physics)(x_star)
    exact = torch.autograd.grad(image, [*model.parameters(), y], torch.cos(x_star))
    assert relative_error(ours, exact) <= 1e-12
    implicit, *_ = imaging()
    assert relative_error(ours, gradients(sup_loss(implicit, y, physics), implicit, [y])) > 1e-2


@pytest.mark.parametrize("method", ["gmres", "anderson", "broyden"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1e4, 1e8])
def test_gradient_is_linear_in_the_loss(method, dtype, scale):
    model, physics, _, y = imaging(dtype=dtype)
    model.solver = Solver("anderson", tol=1e-5, max_iter=200)
    model.hook = ModularIDHook(Solver(method, tol=1e-2, max_iter=100))
    loss = ei_loss(model, y, physics)
    one = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    many = torch.autograd.grad(loss, list(model.parameters()), torch.tensor(scale, dtype=dtype))
    assert relative_error([g.double() / scale for g in many], one) <= 1e-5


def test_cotangents_of_zero_and_nan():
    model, physics, _, y = imaging()
    x_hat = model(y, physics)
    zero = torch.autograd.grad(x_hat, list(model.parameters()), torch.zeros_like(x_hat), retain_graph=True)
    assert all((g == 0).all() for g in zero)
    with pytest.warns(ConvergenceWarning, match="the cotangent"):
        nan = torch.autograd.grad(x_hat, list(model.parameters()), torch.full_like(x_hat, torch.nan))
    assert any(g.isnan().any() for g in nan) and not model.hook.stat.converged.any()


def test_cotangent_of_nan_in_one_sample_leaves_the_others_exact():
    model, physics, _, y = imaging()
    y.requires_grad_()
    model.hook.solver = Solver("gmres", tol=1e-13, max_iter=200, on_failure="ignore")
    x_hat, g = model(y, physics), torch.ones(2, 1, 4, 4, dtype=F64)
    (expected,) = torch.autograd.grad(x_hat, y, g, retain_graph=True)
    g[1, 0, 0, 0] = torch.inf
    (got,) = torch.autograd.grad(x_hat, y, g)
    torch.testing.assert_close(got[0], expected[0])
    assert not got[1].isfinite().any()


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter"])
def test_sample_does_not_depend_on_the_others_of_its_batch(method):
    model, physics, x, _ = imaging(batch=4)
    x = x * torch.tensor([1.0, 1e-3, 1e3, 10.0], dtype=F64).reshape(-1, 1, 1, 1)
    y = physics.A(x)
    model.solver = Solver(method, max_iter=300, tol=1e-4)
    model.hook = ModularIDHook(Solver("gmres", tol=1e-4))

    def solve(y):
        y = y.clone().requires_grad_()
        x_hat = model(y, physics)
        (grad,) = torch.autograd.grad(x_hat.pow(2).sum(), y)
        return x_hat.detach(), grad, model.forward_stat["nstep"], model.hook.stat["nstep"]

    joint, alone = solve(y), [solve(y[i : i + 1]) for i in range(4)]
    assert len(set(joint[2].tolist())) > 1  # the samples do stop at different steps
    for together, apart in zip(joint, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-11, atol=1e-13)


def test_callable_gets_the_gradient_of_a_bound_iteration():
    model, physics, _, y = imaging()
    y.requires_grad_()
    f = model.iteration.bind(y, physics)
    x_star, _ = model.solver(f, model.iteration.init(y, physics))
    assert isinstance(f, DifferentiableMap)
    inputs = [*model.parameters(), y]
    bound = torch.autograd.grad(model.hook(f, x_star).sin().sum(), inputs, retain_graph=True)  # both share Aᵀy
    bare = torch.autograd.grad(model.hook(lambda x: f(x), x_star).sin().sum(), inputs)
    assert relative_error(bare, bound) <= 1e-12


def test_mode_must_be_known():
    with pytest.raises(ValueError, match="must be one of implicit, jfb"):
        ModularIDHook(mode="unrolled")
