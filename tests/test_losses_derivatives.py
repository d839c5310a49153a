r"""Penalties on norms of Jacobians, and divergences by finite differences."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, ModularIDHook, Solver
from tests.problems import TEMPLATES, imaging, relative_error, unrolled
from tests.unrolling import Unrolled, inpainting, small_deq, trained


def norm_of_iteration(model, x_hat, y, physics, steps=40):
    r"""How much one step of the iteration can pull two points near the reconstruction apart."""
    f = model.iteration.bind(y, physics)
    return dinv.loss.JacobianSpectralNorm(max_iter=steps)(f(x_hat), x_hat)


def norm_of_denoiser(model, x_hat, y, physics):
    return dinv.loss.JacobianSpectralNorm(max_iter=40)(model.iteration.denoise(x_hat), x_hat)


def firm_norm_of_denoiser(model, x_hat, y, physics):
    return dinv.loss.FNEJacobianSpectralNorm(max_iter=40)(x_hat, None, model.iteration.denoise)


@pytest.mark.parametrize("penalty", [norm_of_iteration, norm_of_denoiser, firm_norm_of_denoiser])
@pytest.mark.parametrize("through", [True, False])
def test_the_norm_of_a_jacobian_at_the_fixed_point_is_a_penalty(penalty, through):
    model, physics, _, y = imaging()

    def gradient(reconstruct):
        torch.manual_seed(0)  # of the power iteration
        x_hat = reconstruct(y, physics)
        x_hat = x_hat if through else x_hat.detach().requires_grad_()
        return torch.autograd.grad(penalty(model, x_hat, y, physics), list(model.parameters()), materialize_grads=True)

    exact = gradient(lambda y, physics: unrolled(model, y, physics))
    assert sum(g.norm() for g in exact) > 1e-2
    assert relative_error(gradient(model), exact) <= 1e-8


def test_the_penalty_is_the_norm_of_the_dense_jacobian():
    model, physics, _, y = imaging(batch=1)
    x_hat = model(y, physics).detach().requires_grad_()
    dense = torch.autograd.functional.jacobian(model.iteration.bind(y, physics), x_hat).reshape(16, 16)
    torch.manual_seed(0)
    norm = norm_of_iteration(model, x_hat, y, physics, steps=300)
    assert norm.item() == pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_penalty_trains_with_deepinvs_trainer():
    class Penalty(dinv.loss.Loss):
        def forward(self, x_net, y, physics, model, **kwargs):
            return norm_of_iteration(model, x_net, y, physics)

    model = small_deq()
    ours = trained(copy.deepcopy(model), Penalty(), inpainting())
    exact = trained(Unrolled(model), Penalty(), inpainting())
    assert sum(change.norm() for change in exact) > 1e-4
    assert relative_error(ours, exact) <= 1e-8


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_norm_of_the_jacobian_of_the_whole_reconstruction_is_a_penalty(template):
    model, physics, _, y = imaging(template)

    def penalty(reconstruct):
        torch.manual_seed(0)  # of the power iteration
        measured = y.clone().requires_grad_()
        norm = dinv.loss.JacobianSpectralNorm(max_iter=3)(reconstruct(measured, physics), measured)
        return norm, torch.autograd.grad(norm, list(model.parameters()))

    norm, gradient = penalty(model)
    exact, exact_gradient = penalty(lambda y, physics: unrolled(model, y, physics, 120))
    assert relative_error(norm, exact) <= 1e-8
    assert relative_error(gradient, exact_gradient) <= 1e-8


# Divergences by finite differences ---------------------------------------------------------------------------------


def divergence(model, physics, y, tau, seed=0):
    r"""The part of SURE that divides a difference of two reconstructions by ``tau``."""
    torch.manual_seed(seed)
    y1 = physics.A(model(y, physics))
    return dinv.loss.sure.mc_div(y1, y, model, physics, tau).mean()


def error_of_divergence(template, tau, tol, warm):
    r"""Relative error of its gradient, for solves to ``tol``, from starts that have nothing in common if ``warm``."""
    model, physics, x, y = imaging(template, side=8)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(divergence(lambda y, p: unrolled(model, y, p), physics, y, tau), parameters)
    model = DEQReconstructor(
        model.iteration,
        solver=Solver("anderson", max_iter=200, tol=tol),
        hook=ModularIDHook(Solver("gmres", max_iter=200, tol=tol)),
        warm_starts=2 if warm else 0,
    )
    epochs = [(1.01, 2), (1.01, 1), (1.0, 0)] if warm else [(1.0, 0)]  # scale of the weights, and random numbers
    values = [p.detach().clone() for p in parameters]
    for scale, seed in epochs:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(scale * value)
        loss = divergence(model, physics, y, tau, seed)
    return relative_error(torch.autograd.grad(loss, parameters), exact)


@pytest.mark.parametrize("template", [DEProx, DEGrad])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("tau", [1e-1, 1e-2, 1e-3])
def test_a_divergence_is_as_accurate_as_the_tolerance_is_small_against_its_step(template, tau, warm):
    accuracy = 1e-4
    assert error_of_divergence(template, tau, tol=accuracy * tau, warm=warm) <= 2 * accuracy


def test_a_tolerance_that_is_not_small_against_the_step_of_a_divergence_is_not_enough():
    assert error_of_divergence(DEGrad, tau=1e-3, tol=1e-3, warm=True) > 0.1
