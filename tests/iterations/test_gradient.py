r"""DE-Grad: what it keeps of the measurements, and what rounding does to it."""

import copy

import deepinv as dinv
import pytest
import torch
from torch import nn

from deepinv_deq import DEGrad, DEQReconstructor, ModularIDHook, Solver
from deepinv_deq.spectra import spectrum_of_part
from tests.problems import F64, MatrixPhysics, SmallDenoiser, relative_error

SIDE = 24


def few_measurements(dtype: torch.dtype = torch.float32) -> MatrixPhysics:
    matrix = torch.randn(SIDE**2 // 4, SIDE**2, generator=torch.Generator().manual_seed(1), dtype=F64)
    return MatrixPhysics((matrix / torch.linalg.matrix_norm(matrix, 2)).to(dtype), SIDE)


class Half(nn.Module):
    def forward(self, x):
        return 0.5 * x


def test_rounding_is_that_of_the_measurements():
    iteration, x = DEGrad(Half(), stepsize=1 / 51, data_weight=50.0), torch.rand(1, 1, SIDE, SIDE)
    y = few_measurements().A(x + 0.01 * torch.rand_like(x))  # nearly what the state explains, as near a fixed point
    physics = few_measurements()
    f = iteration.bind(y, physics)
    exact = copy.deepcopy(iteration).double().bind(y.double(), few_measurements(F64))
    with torch.no_grad():
        step = exact.step(x.double())
        images = physics.A_adjoint_A(x) - physics.A_adjoint(y)  # how it would be with A^T y
        of_images = -1 / 51 * (50 * images + 0.5 * x)
        # what no measurement sees is where a step is not divided by the data weight
        seen = torch.linalg.svd(physics.matrix.double(), full_matrices=False).Vh

        def unseen(error):
            error = error.flatten(1).double()
            return 51 * (error - error @ seen.T @ seen).norm() / x.norm()

        error, of_images = unseen(f.step(x) - step), unseen(of_images - step)
    assert error < 0.3 * of_images and error < 1e-6, (error, of_images)


class Old(DEGrad):
    r"""As users of 0.1 wrote it."""

    def forward(self, x, physics, aty):
        return x - self.stepsize * (self.data_gradient(x, physics, aty) + x - self.denoise(x))


class Weighted(DEGrad):
    def data_gradient(self, x, physics, aty):
        return 2.0 * super().data_gradient(x, physics, aty)


def test_subclasses_are_given_what_they_were_written_for():
    torch.manual_seed(0)
    denoiser, physics, x = SmallDenoiser().double(), few_measurements(F64), torch.rand(2, 1, SIDE, SIDE, dtype=F64)
    y, point = physics.A(x), torch.rand(2, 1, SIDE, SIDE, dtype=F64)
    settings = {"stepsize": 0.1, "data_weight": 2.0}
    image = DEGrad(denoiser, **settings).bind(y, physics)(point)
    assert relative_error(Old(denoiser, **settings).bind(y, physics)(point), image) < 1e-12
    doubled = DEGrad(denoiser, stepsize=0.1, data_weight=4.0).bind(y, physics)(point)
    assert relative_error(Weighted(denoiser, **settings).bind(y, physics)(point), doubled) < 1e-12


@pytest.mark.parametrize("stacked", [False, True])
def test_measurements_may_be_overwritten_after_the_forward_pass(stacked):
    torch.manual_seed(0)
    mask = torch.rand(1, 8, 8, dtype=F64).round()
    physics = dinv.physics.Inpainting((1, 8, 8), mask=mask)
    physics = dinv.physics.stack(physics, dinv.physics.Inpainting((1, 8, 8), mask=1 - mask)) if stacked else physics
    denoiser, y = SmallDenoiser().double(), physics.A(torch.rand(2, 1, 8, 8, dtype=F64))

    def gradient(overwrite):
        model = DEQReconstructor(DEGrad(denoiser, stepsize=0.3), solver=Solver(tol=1e-10, max_iter=200))
        parts = [part.clone() for part in y] if stacked else y.clone()
        loss = model(dinv.utils.TensorList(parts) if stacked else parts, physics).square().sum()
        for part in parts if overwrite else ():
            part.zero_()
        return torch.autograd.grad(loss, list(denoiser.parameters()))

    assert relative_error(gradient(True), gradient(False)) < 1e-12


class Constant(nn.Module):
    r"""Keeps nearly all of an image, so that what no measurement sees is hardly determined, and has a parameter."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(0, 1, SIDE**2).reshape(1, 1, SIDE, SIDE))

    def forward(self, x):
        return 0.98 * x + 0.02 * self.shift


class ByDifference(DEGrad):
    r"""The same iteration, whose residual is a difference."""

    has_own_step = False


@pytest.mark.parametrize("template", [ByDifference, DEGrad])
def test_adjoint_solves_are_as_exact_as_the_step(template):
    cotangent = torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=F64)

    def solved(dtype, template):
        iteration = template(Constant(), stepsize=1 / 51, data_weight=50.0).to(dtype)
        hook = ModularIDHook(Solver("gmres", tol=1e-4, max_iter=200, history=200, on_failure="ignore"))
        model = DEQReconstructor(iteration, solver=Solver(tol=1e-3, max_iter=300, on_failure="ignore"), hook=hook)
        kernel = dinv.physics.blur.gaussian_blur(sigma=(2.0, 2.0))
        physics = dinv.physics.BlurFFT((1, SIDE, SIDE), filter=kernel).to(dtype)
        x_hat = model(physics.A(torch.ones(1, 1, SIDE, SIDE, dtype=dtype)), physics)
        return torch.autograd.grad(x_hat, iteration.denoiser.shift, cotangent.to(dtype)), hook.stat.residual

    exact, _ = solved(F64, DEGrad)
    gradient, residual = solved(torch.float32, template)
    error = relative_error(gradient, exact)
    assert (error < 1e-4) == (template is DEGrad), (error, residual)


class Extra(DEGrad):
    def forward(self, x, physics, *constants):
        return super().forward(x, physics, *constants) + 0.9 * torch.sin(3 * x)


class Scaled(DEGrad):
    def step(self, x, physics, *constants):
        return 3 * super().step(x, physics, *constants)


class Sharp(DEGrad):
    def denoise(self, x, *context):
        return 0.5 * super().denoise(x, *context)


@pytest.mark.parametrize("template", [Extra, Scaled, Weighted, Sharp, DEGrad])
def test_the_contractive_part_is_that_of_the_subclass(template):
    torch.manual_seed(0)
    physics, x = MatrixPhysics(torch.eye(36, dtype=F64)[:20] * 1.2, 6), torch.rand(1, 1, 6, 6, dtype=F64)
    f = template(SmallDenoiser().double(), stepsize=0.3).bind(physics.A(x), physics)
    radius, *_ = spectrum_of_part(f, x, products=40)
    part = (lambda x: f._iteration.denoise(x)) if template in (Sharp, DEGrad) else f
    j = torch.autograd.functional.jacobian(part, x).reshape(36, 36)
    if template in (Sharp, DEGrad):
        a = physics.matrix
        j = torch.linalg.solve(a.T @ a + torch.eye(36, dtype=F64), j)
    assert float(radius) == pytest.approx(float(torch.linalg.eigvals(j).abs().max()), rel=1e-3)


class Own(DEGrad):
    r"""The same iteration with a ``forward`` of its own, so its residual is a difference."""

    def forward(self, x, physics, *constants):
        return super().forward(x, physics, *constants)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("eta", [1e-8, 1e-6, 1e-3])
def test_a_difference_that_is_all_rounding_is_no_convergence(eta, hooked):
    torch.manual_seed(0)
    denoiser, physics, y = SmallDenoiser(), dinv.physics.Denoising(), 0.3 + 0.2 * torch.rand(2, 1, 16, 16)
    exact = DEQReconstructor(DEGrad(denoiser, stepsize=0.5), solver=Solver(tol=1e-6, max_iter=300))(y, physics)
    iteration = (DEGrad if hooked else Own)(denoiser, stepsize=eta)
    if hooked:
        iteration.register_forward_hook(lambda *_: None)
    for compute_metrics in (False, True):
        for method in ("anderson", "broyden", "gmres"):
            solver = Solver(method, tol=1e-3, max_iter=60, on_failure="ignore")
            model = DEQReconstructor(iteration, solver=solver)
            out = model(y, physics, init=torch.ones_like(y), compute_metrics=compute_metrics)
            x = out[0] if compute_metrics else out
            error, stat = relative_error(x, exact), model.forward_stat
            assert error <= 1e-2 or not stat.converged.any(), (method, error, stat.outcome)
            assert error <= 10 * float(stat.residual.max()) + 1e-2, (method, error, stat.outcome)
