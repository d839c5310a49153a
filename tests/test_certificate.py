r"""The certificate: exact spectral radii, errors against float64 solves, and points that depend on the start."""

from __future__ import annotations

import copy

import pytest
import torch
from deepinv.physics import Denoising
from torch import nn

from deepinv_deq import DEHQS, ContractionFactor, DEGrad, DEProx, DEQReconstructor, FixedPointError, Solver
from tests.problems import F64, TEMPLATES, MatrixPhysics, SmallDenoiser, imaging


class Linear(nn.Module):
    r"""A denoiser with a known symmetric Jacobian."""

    def __init__(self, eigenvalues: torch.Tensor, side: int):
        super().__init__()
        n = side * side
        q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
        self.matrix, self.side = nn.Parameter(q @ torch.diag(eigenvalues) @ q.T), side

    def forward(self, x):
        return (x.flatten(1) @ self.matrix.T + 0.1).reshape(x.shape)


def physics_of(n: int, m: int, side: int) -> MatrixPhysics:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=F64)
    return MatrixPhysics(matrix / torch.linalg.matrix_norm(matrix, 2), side)


def part(template, denoiser: Linear, physics: MatrixPhysics, eta: float, weight: float) -> torch.Tensor:
    r"""The matrix that has to contract."""
    gram, d = physics.matrix.T @ physics.matrix, denoiser.matrix.detach()
    eye = torch.eye(len(gram), dtype=F64)
    if template is DEGrad:
        return torch.linalg.solve(weight * gram + eye, d)
    if template is DEProx:
        return d @ (eye - eta * weight * gram)
    return d @ torch.linalg.inv(eye + eta * weight * gram)


@pytest.mark.parametrize("template", [DEGrad, DEProx, DEHQS])
def test_the_spectral_radius_is_that_of_the_dense_matrix(template):
    side, n = 4, 16
    denoiser, physics = Linear(torch.linspace(-0.4, 0.9, n, dtype=F64), side), physics_of(16, 8, side)
    physics.tol = 1e-12 if template is DEHQS else 1e-4  # of the iteration itself, and not only of P
    model = DEQReconstructor(template(denoiser, stepsize=0.3, data_weight=2.0), solver=Solver(tol=1e-8, max_iter=400))
    model = model.to(F64).eval()
    x = torch.rand(2, 1, side, side, dtype=F64)
    certificate = model.certify(physics.A(x), physics, products=16)
    exact = torch.linalg.eigvals(part(template, denoiser, physics, 0.3, 2.0)).abs().max()
    torch.testing.assert_close(certificate.spectral_radius, exact.expand(2), rtol=1e-4, atol=0)  # of prox_l2
    assert bool((certificate.norm >= certificate.spectral_radius - 1e-9).all()) and bool(certificate.unique.all())
    assert certificate.outcome.startswith("All 2 samples reached one fixed point")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("method", ["anderson", "fixed_point_iter"])
def test_the_error_is_that_to_a_float64_solve_within_a_factor_of_three(template, tol, method):
    model, physics, x, y = imaging(template, batch=4)
    exact = model(y, physics).detach()
    single = copy.deepcopy(model).to(torch.float32).eval()
    single.solver = Solver(method, tol=tol, max_iter=500)
    low = MatrixPhysics(physics.matrix.float(), physics.side)
    certificate = single.certify(y.float(), low)
    true = (certificate.x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert bool((certificate.error <= 3 * true + 1e-6).all()) and bool((certificate.error >= true / 3 - 1e-6).all())


def test_a_map_with_two_fixed_points_is_not_certified():
    class Two(nn.Module):  # x -> 1.5 tanh(2 x): zero, and one positive and one negative fixed point per pixel
        def forward(self, x):
            return 1.5 * torch.tanh(2 * x)

    model = DEQReconstructor(
        DEProx(Two(), stepsize=1e-3), solver=Solver("fixed_point_iter", tol=1e-6, max_iter=200)
    ).eval()
    y = 0.5 * torch.ones(2, 1, 4, 4, dtype=F64)
    certificate = model.to(F64).certify(y, Denoising(), x_gt=-y)
    assert not certificate.unique.any() and certificate.spread["truth"].min() > 0.5
    assert "other starts lead elsewhere" in certificate.outcome and "ContractionLoss" in certificate.outcome


def test_an_expanding_map_is_named():
    denoiser = Linear(torch.linspace(0.5, 1.4, 16, dtype=F64), 4)
    model = DEQReconstructor(
        DEProx(denoiser, stepsize=0.1), solver=Solver(tol=1e-10, max_iter=400, on_failure="ignore")
    )
    physics = physics_of(16, 8, 4)
    certificate = model.to(F64).eval().certify(physics.A(torch.rand(1, 1, 4, 4, dtype=F64)), physics)
    assert not certificate.unique.any() and "the Jacobian expands" in certificate.outcome
    assert torch.isinf(certificate.error).all()


def test_psnrs_come_with_the_truth_and_start_from_it():
    model, physics, x, y = imaging(batch=3, tol=1e-8)
    certificate = model.eval().certify(y, physics, x_gt=x)
    assert set(certificate.psnr) == {"start", "tenth", "zeros", "noise", "truth"}
    assert set(certificate.spread) == {"zeros", "noise", "truth"} == set(certificate.points) - {"start", "tenth"}
    values = torch.stack(list(certificate.psnr.values()))
    assert values.shape == (5, 3) and float((values - values[:1]).abs().max()) < 1e-4


def test_layers_that_change_the_map_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x):
            return 0.5 * self.norm(x)

    model = DEQReconstructor(DEProx(Net()))
    with pytest.raises(ValueError, match="BatchNorm2d 'denoiser.norm' .*is in training mode.*model.eval"):
        model.certify(torch.rand(2, 1, 8, 8), Denoising())
    for products in (0, 2.5):
        with pytest.raises(ValueError, match=f"products must be an integer of at least 1, got {products}"):
            model.eval().certify(torch.rand(2, 1, 8, 8), Denoising(), products=products)
    with pytest.raises(ValueError, match="measurements have 1 NaN or Inf values"):
        model.certify(torch.full((1, 1, 1, 1), torch.nan), Denoising())
    harmless = DEQReconstructor(DEProx(nn.Sequential(nn.Dropout(p=0.0)), stepsize=0.5))
    assert harmless.train().certify(torch.rand(1, 1, 4, 4), Denoising()).unique.all()


def test_metrics_read_the_certificate():
    model, physics, x, y = imaging(batch=3, tol=1e-8)
    x_net = model.eval()(y, physics)
    certificate = model.certify(y, physics)
    arguments = {"x": x, "y": y, "physics": physics, "model": model}
    assert torch.equal(ContractionFactor()(x_net, **arguments), certificate.spectral_radius)
    assert torch.equal(FixedPointError()(x_net, **arguments), certificate.error)
    assert ContractionFactor()(x_net, **(arguments | {"model": nn.Identity()})).isnan().all()
    with pytest.raises(ValueError, match="needs y, as deepinv.Trainer"):
        ContractionFactor()(x_net, physics=physics, model=model)


def test_several_variables_are_certified():
    from deepinv_deq import DEADMM

    physics = physics_of(16, 8, 4)
    model = (
        DEQReconstructor(DEADMM(SmallDenoiser(), stepsize=0.5), solver=Solver(tol=1e-9, max_iter=400)).to(F64).eval()
    )
    certificate = model.certify(physics.A(torch.rand(2, 1, 4, 4, dtype=F64)), physics)
    assert bool(certificate.unique.all()), certificate.outcome
