r"""Solver statistics as deepinv metrics: the numbers of the solves themselves, whoever wraps the model."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch
from torch import nn

from deepinv_deq import (
    DEProx,
    DEQReconstructor,
    FixedPointResidual,
    IterationEquivariance,
    ModularIDHook,
    Solver,
    SolverEvaluations,
)
from tests.problems import imaging


def solved(**kwargs):
    model, physics, x, y = imaging(batch=3, tol=1e-6, **kwargs)
    x_net = model(y, physics)
    return model, physics, x, y, x_net


def test_they_are_the_numbers_of_the_last_forward_solve():
    model, physics, x, y, x_net = solved()
    residual = FixedPointResidual()(x=x, x_net=x_net, y=y, physics=physics, model=model)
    f = model.iteration.bind(y, physics)
    measured = ((f(x_net) - x_net).flatten(1).norm(dim=1) / f(x_net).flatten(1).norm(dim=1)).detach()
    torch.testing.assert_close(residual, measured, rtol=1e-6, atol=1e-15)
    assert not residual.requires_grad and bool((residual > 0).all())

    evaluations = SolverEvaluations()(x_net, x, physics=physics, model=model)
    assert torch.equal(evaluations, model.forward_stat["nstep"].float()) and evaluations.max() > 3
    alone = []
    for i in range(3):  # a sample's count is its own
        model(y[i : i + 1], physics)
        alone.append(model.forward_stat.evaluations)
    assert evaluations.tolist() == alone
    assert SolverEvaluations()(x_net[:1], model=model).tolist() == alone[-1:]  # the last solve, not an older one


def test_the_backward_solve_has_its_own_numbers():
    model, physics, x, y, x_net = solved()
    before = FixedPointResidual(which="backward")(x_net, x, model=model)
    assert before.shape == (3,) and before.isnan().all()
    x_net.square().sum().backward()
    for metric, values in (
        (FixedPointResidual, model.hook.stat.residual),
        (SolverEvaluations, model.hook.stat["nstep"]),
    ):
        backward = metric(which="backward")(x_net, x, model=model)
        assert torch.equal(backward.double(), values.double())
        assert not torch.equal(backward, metric()(x_net, x, model=model))


def test_without_an_adjoint_solve_there_is_no_number():
    model, _, _, _, x_net = solved(mode="jfb")
    x_net.sum().backward()
    assert SolverEvaluations(which="backward")(x_net, model=model).isnan().all()


def test_a_joint_solve_is_that_of_each_sample():
    model, physics, x, y = imaging(batch=3)
    model.solver = Solver("anderson", tol=1e-6, batched=False)
    value = SolverEvaluations()(model(y, physics), x, model=model)
    assert value.tolist() == [model.forward_stat.evaluations] * 3


def test_reduction_and_direction_are_deepinvs():
    model, _, x, _, x_net = solved()
    metric = SolverEvaluations(reduction="mean")
    assert metric.lower_better and FixedPointResidual().lower_better
    assert metric(x_net, x, model=model).item() == pytest.approx(model.forward_stat["nstep"].mean().item())
    assert copy.deepcopy(metric)(x_net, x, model=model).shape == ()


class Parallel(nn.Module):
    r"""As DistributedDataParallel and DataParallel keep a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def wrappers():
    mask = dinv.physics.generator.BernoulliSplittingMaskGenerator((1, 8, 8), split_ratio=0.7)
    splitting = dinv.loss.SplittingLoss(mask_generator=mask, eval_n_samples=2)
    flip = dinv.transform.Reflect(n_trans=1)
    yield "splitting", splitting.adapt_model
    yield "r2r", dinv.loss.R2RLoss(noise_model=dinv.physics.GaussianNoise(0.1), eval_n_samples=2).adapt_model
    yield "reduced resolution", dinv.loss.ReducedResolutionLoss().adapt_model
    yield "equivariant", lambda model: dinv.models.EquivariantReconstructor(model=model, transform=flip)
    yield "parallel", Parallel
    yield "two of them", lambda model: Parallel(splitting.adapt_model(model))


@pytest.mark.parametrize("name,wrap", list(wrappers()), ids=[name for name, _ in wrappers()])
def test_wrapped_models_are_unwrapped(name, wrap):
    torch.manual_seed(0)
    physics = dinv.physics.Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8))
    deq = DEQReconstructor(DEProx(nn.Tanh(), stepsize=0.5), solver=Solver("anderson", tol=1e-4))
    x = torch.rand(2, 1, 8, 8)
    model = wrap(deq).eval()
    x_net = model(physics(x), physics)
    for metric in (FixedPointResidual(), SolverEvaluations()):
        value = metric(x=x, x_net=x_net, physics=physics, model=model)
        torch.testing.assert_close(value, metric(x=x, x_net=x_net, physics=physics, model=deq), rtol=0, atol=0)
        assert value.isfinite().all()
    # the measure of Table 3 finds the iteration too
    measure = IterationEquivariance()
    expected = measure(x_net, x, physics=physics, model=deq)
    assert torch.equal(measure(x_net, x, physics=physics, model=model), expected) and expected.isfinite().all()


def test_a_model_that_solves_nothing_has_no_number():
    x = torch.rand(2, 1, 8, 8)
    for model in (nn.Identity(), lambda y, physics: y):
        assert FixedPointResidual()(x, x, model=model).isnan().tolist() == [True, True]


def test_bad_use():
    model, physics, x, y, x_net = solved()
    with pytest.raises(ValueError, match="SolverEvaluations needs model, as deepinv.Trainer passes it"):
        SolverEvaluations()(x_net, x)
    with pytest.raises(ValueError, match="which must be one of forward, backward, got 'adjoint'"):
        FixedPointResidual(which="adjoint")
    with pytest.raises(ValueError, match="never called: reconstruct first"):
        FixedPointResidual()(x_net, x, model=DEQReconstructor(DEProx(nn.Identity()), hook=ModularIDHook()))
    with pytest.raises(ValueError, match="ModuleList holds 2 DEQReconstructors"):
        FixedPointResidual()(x_net, x, model=nn.ModuleList([model, copy.deepcopy(model)]))
