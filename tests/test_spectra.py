r"""Norms and radii of Jacobians: exact gradients, exhausted Krylov spaces, complex images, autocast."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Denoising
from torch import nn

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.losses import ContractionLoss
from deepinv_deq.spectra import jacobian_norm, spectrum_of_part
from tests.problems import F64, MatrixPhysics, rng
from tests.test_certificate import Linear, part


class Scaled(nn.Module):
    def __init__(self, scale: float = 1.5):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=F64))

    def forward(self, x):
        return self.scale * x


def columns(side: int = 8) -> dinv.physics.Inpainting:
    mask = (torch.arange(side) % 2 == 0).double().expand(1, side, side)
    return dinv.physics.Inpainting((1, side, side), mask=mask)


@pytest.mark.parametrize("template", [DEGrad, DEProx])
@pytest.mark.parametrize("name", ["blur", "inpainting"])
def test_the_gradient_of_the_norm_is_exact(template, name):
    blur = dinv.physics.Blur(filter=dinv.physics.blur.gaussian_blur(sigma=1.0), padding="circular")
    physics = blur.to(F64) if name == "blur" else columns()
    denoiser, x = Scaled(), torch.rand(2, 1, 8, 8, dtype=F64, generator=rng())
    f = template(denoiser, stepsize=0.1).to(F64).bind(physics.A(x), physics)
    norm = jacobian_norm(f, x, iterations=4, rng=rng())  # proportional to the scale
    (gradient,) = torch.autograd.grad(norm.sum(), denoiser.scale)
    torch.testing.assert_close(gradient, norm.detach().sum() / 1.5, rtol=1e-10, atol=0)


class Rounded(torch.autograd.Function):
    r"""The product with a matrix, whose vector-Jacobian products are computed in bfloat16."""

    @staticmethod
    def forward(ctx, x, matrix):
        ctx.save_for_backward(matrix)
        return x @ matrix.T

    @staticmethod
    def backward(ctx, g):
        return (g.bfloat16() @ ctx.saved_tensors[0].bfloat16()).double(), None


class RoundedLinear(Linear):
    def forward(self, x):
        return Rounded.apply(x.flatten(1), self.matrix).reshape(x.shape)


@pytest.mark.parametrize("kind,accuracy", [(Linear, 1e-3), (RoundedLinear, 2e-2)])
@pytest.mark.parametrize("side,rank", [(4, 16), (16, 6)])
@pytest.mark.parametrize("seed", range(2))
def test_an_exhausted_krylov_space_gives_the_radius(kind, accuracy, side, rank, seed):
    n = side * side
    eigenvalues = torch.zeros(n, dtype=F64)
    eigenvalues[:rank] = torch.linspace(0.4, 0.9, rank, dtype=F64)
    matrix = torch.randn(n // 2, n, generator=rng(seed), dtype=F64)
    physics = MatrixPhysics(matrix / torch.linalg.matrix_norm(matrix, 2), side)  # P by conjugate gradients to 1e-4
    denoiser, x = kind(eigenvalues, side), torch.rand(1, 1, side, side, dtype=F64, generator=rng(seed))
    f = DEGrad(denoiser, stepsize=0.2, data_weight=20.0).to(F64).bind(physics.A(x), physics)
    radius, norm, _ = spectrum_of_part(f, x, 30)
    exact = torch.linalg.eigvals(part(DEGrad, denoiser, physics, 0.2, 20.0)).abs().max().expand(1)
    torch.testing.assert_close(radius, exact, rtol=accuracy, atol=0)
    torch.testing.assert_close(norm, exact, rtol=accuracy, atol=0)


@pytest.mark.parametrize("products", [16, 30])
def test_the_largest_real_part_is_no_modulus(products):
    eigenvalues = torch.linspace(-1.3, 0.8, 16, dtype=F64)
    physics = MatrixPhysics(torch.zeros(8, 16, dtype=F64), 4)
    denoiser, x = Linear(eigenvalues, 4), torch.rand(1, 1, 4, 4, dtype=F64, generator=rng())
    f = DEGrad(denoiser, stepsize=0.5).to(F64).bind(physics.A(x), physics)
    radius, norm, rightmost = spectrum_of_part(f, x, products)
    found = torch.cat([radius, norm, rightmost])
    torch.testing.assert_close(found, torch.tensor([1.3, 1.3, 0.8], dtype=F64), rtol=1e-6, atol=0)


def test_the_largest_real_part_may_be_negative_in_an_exhausted_space():
    denoiser, x = Linear(torch.full((16,), -0.5, dtype=F64), 4), torch.rand(1, 1, 4, 4, dtype=F64, generator=rng())
    physics = MatrixPhysics(torch.eye(16, dtype=F64), 4)
    f = DEGrad(denoiser, stepsize=0.5).to(F64).bind(physics.A(x), physics)
    radius, _, rightmost = spectrum_of_part(f, x, 30)
    torch.testing.assert_close(rightmost, -radius, rtol=1e-6, atol=0)


class Apart(nn.Module):
    r"""Keeps real and imaginary parts apart."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=F64))

    def forward(self, x):
        return torch.complex(0.3 * x.real, self.scale * torch.tanh(x.imag)) if x.is_complex() else x


@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_complex_images(template):
    y = torch.zeros(2, 1, 4, 4, dtype=torch.complex128)
    y += 1e-9 * torch.randn(y.shape, dtype=y.dtype, generator=rng())
    model = DEQReconstructor(template(Apart(), stepsize=1e-3), solver=Solver(tol=1e-8, max_iter=200)).eval()
    exact = torch.full((2,), 0.45 if template is DEGrad else 0.8991, dtype=F64)
    f = model.iteration.bind(y, Denoising())
    certificate = model.certify(y, Denoising(), x_gt=y)
    torch.testing.assert_close(certificate.spectral_radius, exact, rtol=1e-6, atol=0)
    if template is DEProx:
        torch.testing.assert_close(jacobian_norm(f, y, iterations=6, rng=rng()), exact, rtol=1e-6, atol=0)
    penalties = []
    for seed in range(8):
        loss = ContractionLoss(0.1, rng=rng(seed))
        penalties.append(loss(x_net=model(y, Denoising()), y=y, physics=Denoising(), model=model))
    assert bool(torch.stack(penalties).min() > 0) and not penalties[0].is_complex()


@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_only_the_map_is_cast_by_autocast(template):
    torch.manual_seed(0)
    physics = columns().float()
    x = torch.rand(2, 1, 8, 8)
    f = template(EquilibriumUNet(channels=(4, 8)), stepsize=0.5).eval().bind(physics.A(x), physics)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        radius, norm, _ = spectrum_of_part(f, x, 30)
        loss_norm = jacobian_norm(f, x, iterations=6, rng=rng())
    for value in (radius, norm, loss_norm):
        torch.testing.assert_close(value, torch.full((2,), 0.9), rtol=2e-2, atol=0)
