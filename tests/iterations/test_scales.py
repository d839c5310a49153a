r"""Images of any size: reconstructions, gradients and certificates are those of images of size one, scaled."""

from __future__ import annotations

import pytest
import torch
from deepinv.optim import ADMM, DRS, HQS, L2, PnP
from deepinv.physics import Denoising, LinearPhysics, stack
from torch import nn

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, DEQReconstructor, FromOptim, ModularIDHook, Solver
from deepinv_deq.iterations.prox import prox_l2
from deepinv_deq.physics import SparseLinearPhysics
from deepinv_deq.states import powers_of_two, times
from tests.problems import F64, assert_unrolled_gives_the_same, deq, imaging, relative_error


class Linear(nn.Module):
    r"""A linear contraction, so that the reconstruction is linear in the measurements."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.1, 0.12, 9).reshape(1, 1, 3, 3))

    def forward(self, x, *noise_level):
        return nn.functional.conv2d(x, self.weight, padding=1) + 0.5 * x


def of_deepinv(algorithm):
    r"""An algorithm of deepinv as a template."""
    settings = {"data_fidelity": L2(), "sigma_denoiser": 0.1}
    return lambda net, stepsize: FromOptim(algorithm(prior=PnP(net), stepsize=stepsize, **settings))


def weight_of(model):
    return next(p for p in model.parameters() if p.requires_grad)


def problem(template, dtype):
    _, physics, x, y = imaging(batch=2, dtype=dtype)
    single = dtype == torch.float32
    solver, adjoint = (Solver(m, tol=1e-5 if single else 1e-11, max_iter=200) for m in ("anderson", "gmres"))
    return (
        DEQReconstructor(template(Linear(), stepsize=0.5), solver=solver, hook=ModularIDHook(adjoint)).to(dtype),
        physics,
        x,
        y,
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "template",
    [DEProx, DEGrad, DEHQS, DEADMM, *(of_deepinv(algorithm) for algorithm in (HQS, ADMM, DRS))],
    ids=["DEProx", "DEGrad", "DEHQS", "DEADMM", "HQS", "ADMM", "DRS"],
)
def test_images_and_gradients_at_any_scale(template, dtype):
    model, physics, x, y = problem(template, dtype)
    weight, bound = weight_of(model), 1e-4 if dtype == torch.float32 else 1e-9
    expected = model(y, physics)
    (gradient,) = torch.autograd.grad((expected * x).sum(), weight)
    for scale in (1e-30, 1e-22, 1e-10, 1e-4, 1e4, 1e10, 1e22, 1e30):
        x_hat = model(scale * y, physics)
        assert bool(model.forward_stat.converged.all()) and relative_error(x_hat / scale, expected) <= bound
        for loss in ((x_hat / scale * x).sum(), scale * (model(y, physics) * x).sum()):
            (ours,) = torch.autograd.grad(loss, weight)
            size = (
                1.0
                if ours.abs().max() < 1e3 * gradient.abs().max() and ours.abs().max() > 1e-3 * gradient.abs().max()
                else scale
            )
            assert relative_error(ours.double() / size, gradient.double()) <= 10 * bound, scale
        mixed = torch.cat([scale * y[:1], y[1:]])  # and no sample sees the scale of another
        assert relative_error(model(mixed, physics)[1:], expected[1:]) <= bound


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_certificates_at_any_scale(template, scale):
    model, physics, x, y = problem(template, torch.float32)
    certificate = model.eval().certify(scale * y, physics, products=5, x_gt=scale * x)
    assert bool(certificate.unique.all()) and certificate.error.max() < 1e-3, certificate.outcome
    assert max(float(spread.max()) for spread in certificate.spread.values()) < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e-4, 1e4, 1e10, 1e30])
def test_the_proximal_map_at_any_scale(scale):
    _, first, x, y = imaging(batch=2, dtype=F64)
    second = imaging(batch=2, dtype=F64, seed=1)[1]
    matrix = torch.cat([first.matrix, second.matrix])
    z, both = x.flip(0), (y, second.A(x))
    exact = torch.linalg.solve(
        0.7 * matrix.T @ matrix + torch.eye(16, dtype=F64), (0.7 * torch.cat(both, 1) @ matrix + z.flatten(1)).T
    ).T.reshape(z.shape)
    first.max_iter = 100
    ours = prox_l2(stack(first, second), scale * z, tuple(scale * part for part in both), 0.7)
    assert relative_error(ours / scale, exact) <= 1e-4  # physics.tol


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e-3, 1e10, 1e30])
def test_least_squares_of_a_sparse_operator_at_any_scale(scale):
    _, physics, x, y = imaging(batch=2, dtype=F64)
    sparse = SparseLinearPhysics.from_physics(physics, (1, 4, 4))
    solved = sparse.A_dagger(scale * y) / scale
    assert relative_error(solved.flatten(1), y @ torch.linalg.pinv(physics.matrix).T) <= 1e-3
    image = sparse.prox_l2(scale * x, scale * y, 0.7) / scale
    assert relative_error(image, prox_l2(physics, x, (y,), 0.7)) <= 1e-4
    assert relative_error(sparse.A_dagger(scale * y * (1 + 1j)) / scale, (1 + 1j) * solved) <= 1e-4
    assert relative_error(sparse.prox_l2(0.0, scale * y, 0.7) / scale, prox_l2(physics, 0 * x, (y,), 0.7)) <= 1e-4


def test_units():
    x = torch.tensor([[3.0, -8.0], [0.0, 0.0], [1e-30, 0.0], [float("inf"), 1.0]])
    units = powers_of_two(x)
    assert units.tolist() == [2.0**-7, 1.0, pytest.approx(2.0**-110), 1.0]
    assert torch.equal(times(1 / units, x)[0], torch.tensor([384.0, -1024.0]))
    assert powers_of_two(torch.full((2, 3), 4, dtype=torch.long)).tolist() == [2.0**-8] * 2
    assert powers_of_two(torch.ones(2, 3, dtype=torch.float16)).tolist() == [1.0, 1.0]
    assert powers_of_two(torch.ones(2, 3, dtype=torch.cdouble)).tolist() == [2.0**-30] * 2
    assert powers_of_two(torch.tensor([[0.1], [1e-3], [1e3], [1e4]]), usual=True).tolist() == [
        1.0,
        2.0**-20,
        1.0,
        2.0**3,
    ]
    assert powers_of_two(torch.ones(2, 3), torch.full((1, 3), 4.0)).tolist() == [2.0**-8] * 2
    assert prox_l2(Denoising(), torch.zeros(0, 1, 2, 2), (torch.zeros(0, 1, 2, 2),), 1.0).shape == (0, 1, 2, 2)


class Signals(LinearPhysics):
    r"""Leaves out every third sample of signals of shape ``(B, C, L)``."""

    def A(self, x, **_):
        return x * (torch.arange(x.shape[-1]) % 3 > 0).to(x)

    def A_adjoint(self, y, **_):
        return self.A(y)


class Modulus(nn.Module):
    r"""A contraction of complex signals that is not holomorphic."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3 + 0.2j, 0.1 - 0.3j]))

    def forward(self, z):
        return self.weight[:, None] * z / (1 + z.abs())


@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_a_stepsize_of_each_channel_of_signals(template):
    net = nn.Conv1d(2, 2, 3, padding=1)
    nn.init.constant_(net.weight, 0.05)
    model = deq(template(net, stepsize=torch.tensor([0.3, 0.6]).reshape(1, 2, 1), learn_stepsize=True))
    y = Signals().A(torch.rand(2, 2, 7, generator=torch.Generator().manual_seed(0), dtype=F64))
    assert_unrolled_gives_the_same(model, Signals(), y)
    assert model.iteration.stepsize.shape == (1, 2, 1)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_numbers_stay_real_where_a_network_becomes_complex(template, learn):
    iteration = template(Modulus(), stepsize=0.5, data_weight=0.8, sigma=torch.tensor(0.1), learn_stepsize=learn)
    solver, adjoint = (Solver(name, tol=1e-12, max_iter=300) for name in ("anderson", "gmres"))
    model = DEQReconstructor(iteration, solver=solver, hook=ModularIDHook(adjoint)).to(torch.complex128)
    numbers = iteration.stepsize, iteration.data_weight, iteration.sigma
    assert {t.dtype for t in numbers} == {F64} and iteration.denoiser.weight.dtype is torch.complex128
    assert isinstance(iteration.stepsize, nn.Parameter) == learn
    y = torch.rand(2, 2, 7, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert_unrolled_gives_the_same(model, Signals(), Signals().A(torch.view_as_complex(y)))
