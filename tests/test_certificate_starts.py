r"""The certificate over starts: what may differ, which starts there are, and that nothing is changed by measuring."""

from __future__ import annotations

import copy
import math

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Denoising
from torch import nn

from deepinv_deq import ContractionFactor, DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, FromOptim, Solver
from deepinv_deq.iterations.starts import state_of
from deepinv_deq.losses import ContractionLoss
from tests.problems import F64, SmallDenoiser, imaging, relative_error, rng
from tests.test_spectra import Scaled, columns


class Washboard(nn.Module):
    r"""Fixed points at all multiples of 0.2 where nothing is measured, with slope ``1 - a`` there."""

    def __init__(self, a: float):
        super().__init__()
        self.a = a

    def forward(self, x):
        return x - self.a * torch.sin(10 * math.pi * x) / (10 * math.pi)


@pytest.mark.parametrize("a,tol", [(4e-4, 1e-4), (4e-3, 1e-3)])
def test_a_slow_contraction_permits_no_large_spread(a, tol):
    solver = Solver(tol=tol, max_iter=100, on_failure="ignore")
    model = DEQReconstructor(DEProx(Washboard(a), stepsize=0.5), solver=solver).to(F64).eval()
    physics = columns()
    certificate = model.certify(physics.A(torch.ones(1, 1, 8, 8, dtype=F64)), physics)
    assert certificate.spread["noise"] > 0.5 and not certificate.unique.any()
    assert "other starts lead elsewhere" in certificate.outcome


def test_a_large_error_is_not_a_fixed_point_that_was_reached():
    solver = Solver("fixed_point_iter", tol=1e-2, max_iter=300)
    model = DEQReconstructor(DEProx(Scaled(0.99), stepsize=0.01), solver=solver).to(F64).eval()
    certificate = model.certify(torch.ones(1, 1, 4, 4, dtype=F64), Denoising())
    assert certificate.converged.all() and certificate.error > 0.5 and not certificate.unique.any()
    assert "tol is too large to tell" in certificate.outcome and "elsewhere" not in certificate.outcome


def test_solves_that_ran_out_of_evaluations_do_not_lead_elsewhere():
    solver = Solver("fixed_point_iter", tol=1e-5, max_iter=30, on_failure="ignore")
    model = DEQReconstructor(DEProx(Scaled(0.999), stepsize=0.5), solver=solver).to(F64).eval()
    physics, x = columns(), torch.ones(1, 1, 8, 8, dtype=F64)
    certificate = model.certify(physics.A(x), physics, x_gt=x)
    assert not certificate.unique.any() and not certificate.solved["truth"].any()
    assert "solves from other starts missed the tolerance" in certificate.outcome
    assert "lead elsewhere" not in certificate.outcome


class Two(nn.Module):
    def forward(self, x, sigma=None, **_):
        return 1.5 * torch.tanh(2 * x)


@pytest.mark.parametrize("name", ["PGD", "ADMM", "DRS", "PDCP"])
def test_every_variable_of_an_algorithm_of_deepinv_starts_elsewhere(name):
    settings = {"stepsize_dual": 0.5} if name == "PDCP" else {}
    prior = dinv.optim.PnP(Two())
    algorithm = getattr(dinv.optim, name)(
        prior=prior, data_fidelity=dinv.optim.L2(), stepsize=1e-3, g_param=0.1, max_iter=5, **settings
    )
    solver = Solver("fixed_point_iter", tol=1e-6, max_iter=300, on_failure="ignore")
    model, y = (
        DEQReconstructor(FromOptim(algorithm), solver=solver).to(F64).eval(),
        0.5 * torch.ones(1, 1, 4, 4, dtype=F64),
    )
    certificate = model.certify(y, Denoising(), x_gt=-y)
    assert not certificate.unique.any() and certificate.spread["truth"] > 1, certificate.outcome
    norms = set()
    for seed in range(8):  # the loss measures other points, too
        loss = ContractionLoss(1e-6, rng=rng(seed))(x_net=model(y, Denoising()), y=y, physics=Denoising(), model=model)
        norms.add(round(loss.item(), 9))
    assert len(norms) > 4


def test_states_from_images():
    image, other = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    assert state_of(image, other) is image
    state = state_of(image, (other, other, torch.zeros_like(other), torch.rand(2, 7)))
    assert (
        torch.equal(state[0], image)
        and torch.equal(state[1], image)
        and not state[2].any()
        and state[3].shape == (2, 7)
    )
    other[0] = 0.0  # each sample for itself
    assert torch.equal(state_of(image, (other, other))[1], torch.stack([other[0], image[1]]))


@pytest.mark.parametrize("stepsize", [0.5, 0.05])
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_gradient_descent_is_measured_as_degrad(stepsize, weight):
    class Denoiser(SmallDenoiser):
        def forward(self, x, sigma=None, **_):
            return super().forward(x)

    _, physics, x, y = imaging(batch=2)
    net = Denoiser(0.46)
    descent = dinv.optim.GD(
        prior=dinv.optim.RED(net), data_fidelity=dinv.optim.L2(), stepsize=stepsize, g_param=0.1, lambda_reg=weight
    )
    solver = Solver("fixed_point_iter", tol=1e-3, max_iter=2000)
    models = [
        DEQReconstructor(iteration, solver=solver).to(F64).eval()
        for iteration in (FromOptim(descent), DEGrad(net, stepsize=stepsize * weight, data_weight=1 / weight))
    ]
    ours, theirs = (model.certify(y, physics) for model in models)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.spectral_radius, theirs.spectral_radius, rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.residual, theirs.residual, rtol=1e-6, atol=0)
    assert ours.error.max() < 1e-2 and bool(ours.unique.all())
    loss = ContractionLoss(0.9)(x_net=models[0](y, physics), y=y, physics=physics, model=models[0])
    assert loss.tolist() == [0.0, 0.0]


def test_samples_do_not_see_each_other():
    model, physics, _, y = imaging(batch=2, tol=1e-6)
    x = model.eval()(y, physics).detach()
    broken = [x.clone(), x.clone()]
    broken[0][0], broken[1][0] = torch.nan, 1e6
    for seed in range(6):
        expected, *others = (
            ContractionLoss(0.1, rng=rng(seed))(x_net=z, y=y, physics=physics, model=model) for z in (x, *broken)
        )
        for other in others:
            torch.testing.assert_close(other[1], expected[1], rtol=1e-9, atol=0)
    huge = torch.cat([1e6 * y[:1], y[1:]])
    alone, together = model.certify(y, physics), model.certify(huge, physics)
    torch.testing.assert_close(together.spread["noise"][1], alone.spread["noise"][1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_under_inference_mode(template):
    model, physics, x, y = imaging(template, batch=2, tol=1e-6)
    expected = model.eval().certify(y, physics, x_gt=x)
    with torch.inference_mode():
        y, x = physics.A(x), x.clone()
        x_net = model(y, physics)
        certificate = model.certify(y, physics, x_gt=x)
        factor = ContractionFactor()(x_net, y=y, physics=physics, model=model)
        penalty = ContractionLoss(0.1)(x_net=x_net, y=y, physics=physics, model=model)
    torch.testing.assert_close(certificate.spectral_radius, expected.spectral_radius)
    torch.testing.assert_close(factor, expected.spectral_radius)
    assert bool((penalty > 0).all()) and not penalty.requires_grad and bool(certificate.unique.all())


class Counting(nn.Module):
    r"""A parametrisation that replaces its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, weight):
        self.count = self.count + 1
        return weight / (1 + self.count)


def test_measuring_leaves_a_model_in_training_mode_as_it_was():
    torch.manual_seed(0)
    old = nn.utils.spectral_norm(nn.Conv2d(1, 1, 3, padding=1))
    new = nn.Conv2d(1, 1, 3, padding=1)
    nn.utils.parametrize.register_parametrization(new, "weight", Counting())
    for network in (EquilibriumUNet(channels=(4, 8)), nn.Sequential(old, nn.Tanh()), new):
        model = DEQReconstructor(DEProx(network, stepsize=0.5), solver=Solver(tol=1e-2, on_failure="ignore")).train()
        physics = columns().float()
        y = physics.A(torch.rand(2, 1, 8, 8))
        before = copy.deepcopy(model.state_dict())
        x_net = model(y, physics).detach()
        model.load_state_dict(before)
        model.certify(y, physics)
        ContractionFactor()(x_net, y=y, physics=physics, model=model)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        assert all(module.training for module in model.modules())


def test_an_empty_batch_has_an_empty_certificate():
    model, physics, x, y = imaging(batch=2, tol=1e-6)
    certificate = model.eval().certify(y[:0], physics, x_gt=x[:0])
    assert certificate.unique.shape == certificate.error.shape == certificate.spectral_radius.shape == (0,)
    assert certificate.outcome == "There are no samples to certify."


def test_a_joint_solve_has_numbers_for_every_sample():
    class Swap(nn.Module):
        def forward(self, x):
            return 0.45 * x + 0.45 * x.flip(0)

    model = DEQReconstructor(DEProx(Swap(), stepsize=1e-3), solver=Solver(tol=1e-6, max_iter=200, batched=False)).eval()
    certificate = model.certify(torch.rand(2, 1, 4, 4, dtype=F64), Denoising())
    for name in ("spectral_radius", "norm", "residual", "converged", "error", "evaluations", "unique"):
        assert getattr(certificate, name).shape == (2,), name
    torch.testing.assert_close(certificate.spectral_radius, torch.full((2,), 0.8991, dtype=F64))
    assert relative_error(certificate.points["zeros"], certificate.x) < 1e-4
