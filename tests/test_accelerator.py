r"""Everything works on another device than the CPU: on a stand-in, and on a GPU where one is at hand."""

from __future__ import annotations

import contextlib

import deepinv as dinv
import pytest
import torch
from deepinv.physics.functional.blur import gaussian_blur

from deepinv_deq import (
    DEADMM,
    DEHQS,
    ContractionLoss,
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    ModularIDHook,
    Solver,
    TurnedOperatorLoss,
)
from deepinv_deq.losses import RampFilteredError
from deepinv_deq.physics import SparseLinearPhysics
from deepinv_deq.solvers import cuda_graphs
from tests.accelerator import ThereTensor, accelerator
from tests.problems import relative_error

SIDE = 8
WEIGHT = 1 / 40  # of the data of tomography, whose operator has a squared norm of 38
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.fixture(params=["stand-in", GPU])
def device(request, monkeypatch):
    with accelerator(monkeypatch) if request.param == "stand-in" else contextlib.nullcontext("cuda") as where:
        yield torch.device(where)


def tomography(turn=0.0):
    angles = torch.arange(5).double() * 36 + turn
    operator = dinv.physics.Tomography(angles, SIDE, normalize=False, dtype=torch.float64, adjoint_via_backprop=True)
    return SparseLinearPhysics.from_physics(operator, (1, SIDE, SIDE))


def mri():
    mask = (torch.arange(SIDE) % 3 > 0).double().expand(1, 2, SIDE, SIDE)
    return dinv.physics.MRI(mask=mask, img_size=(2, SIDE, SIDE))


def blur():
    return dinv.physics.BlurFFT((1, SIDE, SIDE), filter=gaussian_blur(sigma=(1.0, 1.0)).double())


def model_of(template, channels, weight=1.0):
    torch.manual_seed(0)
    iteration = template(EquilibriumUNet(channels, channels=(4, 8)).double(), stepsize=0.5, data_weight=weight)
    solver, adjoint = (Solver(name, tol=1e-8, max_iter=200) for name in ("anderson", "gmres"))
    return DEQReconstructor(iteration, solver=solver, hook=ModularIDHook(adjoint))


def gradients(model, physics, losses, device):
    physics, model = physics.to(device), model.to(device)
    x = torch.rand(
        2, model.iteration.denoiser.settings["in_channels"], SIDE, SIDE, generator=torch.Generator().manual_seed(1)
    )
    x = x.double().to(device)
    y = physics.A(x)
    x_hat = model(y, physics)
    loss = (x_hat - x).square().sum()
    for term in losses:
        loss = loss + term(x_net=x_hat, x=x, y=y, physics=physics, model=model).sum()
    return x_hat, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def on_the_cpu(t):
    return None if t is None else t.detach().cpu()


@pytest.mark.parametrize(
    "template, make, channels, weight",
    [
        *((template, mri, 2, 1.0) for template in (DEProx, DEGrad, DEHQS, DEADMM)),
        (DEHQS, blur, 1, 1.0),
        (DEGrad, tomography, 1, WEIGHT),
    ],
)
def test_images_and_gradients_are_those_of_the_cpu(device, template, make, channels, weight):
    expected, exact = gradients(model_of(template, channels, weight), make(), [], "cpu")
    x_hat, found = gradients(model_of(template, channels, weight), make(), [], device)
    assert x_hat.device.type == device.type
    assert relative_error(on_the_cpu(x_hat), expected) <= 1e-7
    used = [(on_the_cpu(a), b) for a, b in zip(found, exact, strict=True) if b is not None]
    assert relative_error([a for a, _ in used], [b for _, b in used]) <= 1e-6


@pytest.mark.parametrize(
    "template, make, channels",
    [
        *((template, mri, 2) for template in (DEProx, DEGrad, DEHQS, DEADMM)),
        (DEHQS, blur, 1),
        (DEGrad, tomography, 1),
    ],
)
def test_evaluations_do_not_synchronise_and_can_be_captured(device, template, make, channels):
    physics, iteration = make().to(device), model_of(template, channels).iteration.to(device).eval()
    y = physics.A(torch.ones(2, channels, SIDE, SIDE, dtype=torch.float64).to(device))
    with torch.no_grad():
        f, x = iteration.bind(y, physics), iteration.init(y, physics)
        cuda_graphs._refuse_synchronisation(lambda: f.step(x))


def test_losses_are_those_of_the_cpu(device):
    def losses(where):
        turned = [tomography(10.0).to(where)]
        error = RampFilteredError(tomography().to(where), (1, SIDE, SIDE), device=where).double()
        return [ContractionLoss(0.3), TurnedOperatorLoss(turned, consistency=error)]

    exact = gradients(model_of(DEGrad, 1, WEIGHT), tomography(), losses("cpu"), "cpu")[1]
    found = gradients(model_of(DEGrad, 1, WEIGHT), tomography(), losses(device), device)[1]
    used = [(on_the_cpu(a), b) for a, b in zip(found, exact, strict=True) if b is not None]
    assert relative_error([a for a, _ in used], [b for _, b in used]) <= 1e-6


@pytest.mark.parametrize("make, template, channels, weight", [(mri, DEProx, 2, 1.0), (tomography, DEGrad, 1, WEIGHT)])
def test_certificates_are_those_of_the_cpu(device, make, template, channels, weight):
    def certificate(where):
        model, physics = model_of(template, channels, weight).eval().to(where), make().to(where)
        x = torch.ones(2, channels, SIDE, SIDE, dtype=torch.float64).tril().to(where)
        return model.certify(physics.A(x), physics, x_gt=x)

    expected, found = certificate("cpu"), certificate(device)
    assert found.spectral_radius.device.type == device.type
    assert relative_error(on_the_cpu(found.spectral_radius), expected.spectral_radius) <= 1e-6
    assert on_the_cpu(found.unique).tolist() == expected.unique.tolist() == [True, True]


@pytest.mark.parametrize("method", ["broyden", "fixed_point_iter", "simple_fixed_point_iter", "gmres"])
def test_solvers(device, method):
    half = torch.full((3, 4), 0.5, device=device)
    x, stat = Solver(method, tol=1e-5, max_iter=60)(lambda x: 0.5 * x + half, torch.zeros(3, 4, device=device))
    assert x.device.type == device.type and bool(stat.converged.all())
    assert relative_error(on_the_cpu(x), torch.ones(3, 4)) <= 1e-4


def test_the_stand_in_refuses_tensors_of_two_devices(monkeypatch):
    with accelerator(monkeypatch) as where:
        x = torch.ones(2, 3, device=where)
        assert isinstance(x, ThereTensor) and isinstance(2 * x.view(3, 2), ThereTensor)
        with pytest.raises(RuntimeError, match="add was given a tensor of shape"):
            x + torch.ones(2, 3)
        assert x.cpu().tolist() == x.tolist() == [[1.0] * 3] * 2
        assert float(x.sum()) == 6.0 and torch.tensor([1.0], device=where).device.type == where.type
