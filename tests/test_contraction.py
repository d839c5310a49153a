r"""Contraction: from the first step, in training, and of the weights that ship."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Denoising
from torch import nn

from deepinv_deq import (
    DEADMM,
    DEHQS,
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    FromOptim,
    ModularIDHook,
    Solver,
)
from deepinv_deq.losses import ContractionLoss
from deepinv_deq.spectra import jacobian_norm
from tests.problems import F64, SmallDenoiser, imaging, relative_error, rng
from tests.test_certificate import Linear, part, physics_of

SIDE = 16


def coil_mri():
    coils = torch.ones(1, 2, SIDE, SIDE, dtype=torch.complex64) / 2**0.5
    return dinv.physics.MultiCoilMRI(mask=lines(), coil_maps=coils, img_size=(2, SIDE, SIDE))


def lines():
    return (torch.arange(SIDE) % 3 != 0).float().expand(1, 2, SIDE, SIDE)


ZOO = {
    "inpainting": (1, lambda: dinv.physics.Inpainting((1, SIDE, SIDE), mask=lines()[0, :1])),
    "super-resolution": (1, lambda: dinv.physics.Downsampling(img_size=(1, SIDE, SIDE), factor=2, filter="gaussian")),
    "MRI": (2, lambda: dinv.physics.MRI(mask=lines(), img_size=(2, SIDE, SIDE))),
    "multi-coil MRI": (2, coil_mri),
    "CT": (1, lambda: dinv.physics.Tomography(6, SIDE, normalize=True, adjoint_via_backprop=True)),
    "deblurring": (
        1,
        lambda: dinv.physics.Blur(filter=dinv.physics.blur.gaussian_blur(sigma=(1.0, 1.0)), padding="circular"),
    ),
    "demosaicing": (3, lambda: dinv.physics.Demosaicing(img_size=(3, SIDE, SIDE))),
}


def smooth_images(count: int, channels: int) -> torch.Tensor:
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("template", [DEProx, DEGrad, DEHQS, DEADMM])
@pytest.mark.parametrize("name", ZOO)
def test_training_from_scratch_starts_with_a_sound_gradient_and_learns(name, template):
    torch.manual_seed(0)
    channels, make = ZOO[name]
    physics, x = make(), smooth_images(2, channels)
    y = physics.A(x)
    iteration = template(EquilibriumUNet(channels, channels=(4, 8)), stepsize=0.5)
    # without ContractionLoss, 30 steps may lead beyond what contracts: here only the start is tested
    hook = ModularIDHook(Solver("gmres", tol=3e-2, max_iter=25, on_failure="ignore"))
    model = DEQReconstructor(iteration, solver=Solver(tol=3e-3, max_iter=25, on_failure="ignore"), hook=hook)

    def gradient(mode: str) -> float:
        twin = DEQReconstructor(iteration, solver=model.solver, hook=ModularIDHook(model.hook.solver, mode=mode))
        loss = (twin(y, physics) - x).square().mean()
        parameters = [p for p in twin.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return float(torch.cat([g.flatten() for g in grads if g is not None]).norm())

    assert 0.2 <= gradient("implicit") / gradient("jfb") <= 50
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(30):
        loss = (model(y, physics) - x).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses[-3:]) <= 0.9 * losses[0], losses


@pytest.mark.parametrize("template", [DEGrad, DEProx, DEHQS])
def test_the_norm_is_that_of_the_dense_matrix(template):
    denoiser, physics = Linear(torch.linspace(-0.4, 0.9, 16, dtype=F64), 4), physics_of(16, 8, 4)
    iteration = template(denoiser, stepsize=0.3, data_weight=2.0).to(F64)
    f = iteration.bind(physics.A(torch.rand(2, 1, 4, 4, dtype=F64)), physics)
    norm = jacobian_norm(f, torch.rand(2, 1, 4, 4, dtype=F64), iterations=17, rng=torch.Generator().manual_seed(0))
    matrix = denoiser.matrix.detach() if template is DEGrad else part(template, denoiser, physics, 0.3, 2.0)
    exact = torch.linalg.matrix_norm(matrix, 2)  # the proximal map of DE-HQS is that of conjugate gradients
    torch.testing.assert_close(norm, exact.expand(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("outlier", [-1.3, 1.3])
def test_few_products_see_a_single_large_eigenvalue(outlier):
    eigenvalues = torch.linspace(-0.7, 0.75, 400, dtype=F64)
    eigenvalues[200] = outlier
    f = DEProx(Linear(eigenvalues, 20), stepsize=1.0).to(F64)
    f = f.bind(
        torch.zeros(8, 1, 20, 20, dtype=F64),
        dinv.physics.Inpainting((1, 20, 20), mask=torch.zeros(1, 20, 20, dtype=F64)),
    )
    norm = jacobian_norm(f, torch.rand(8, 1, 20, 20, dtype=F64), iterations=6, rng=torch.Generator().manual_seed(0))
    assert 1.1 < norm.median() and norm.max() <= 1.3 + 1e-9


def test_a_given_direction_finds_an_eigenvalue_that_noise_overlooks():
    eigenvalues = torch.linspace(-0.7, 0.75, 400, dtype=F64)
    eigenvalues[200] = 0.95
    denoiser = Linear(eigenvalues, 20)
    physics = dinv.physics.Inpainting((1, 20, 20), mask=torch.zeros(1, 20, 20, dtype=F64))
    f = DEProx(denoiser, stepsize=1.0).to(F64).bind(torch.zeros(8, 1, 20, 20, dtype=F64), physics)
    vectors = torch.linalg.eigh(denoiser.matrix.detach()).eigenvectors
    along = vectors[:, -1].view(1, 1, 20, 20).repeat(8, 1, 1, 1)
    along[0] = 0.0  # no direction for this sample: noise alone

    def norm(direction):
        rng = torch.Generator().manual_seed(0)
        return jacobian_norm(f, torch.rand(8, 1, 20, 20, dtype=F64), iterations=4, rng=rng, direction=direction)

    assert norm(None).max() < 0.9 and norm(along)[1:].min() > 0.94
    assert 0.1 < norm(along)[0] < 0.9


def test_the_gradient_of_the_penalty_lowers_the_norm():
    torch.manual_seed(0)
    denoiser = Linear(torch.linspace(0.1, 1.1, 16, dtype=F64), 4)
    model = DEQReconstructor(DEProx(denoiser, stepsize=0.1), solver=Solver(tol=1e-8, on_failure="ignore")).to(F64)
    physics, loss = physics_of(16, 8, 4), ContractionLoss(0.85, weight=1.0, iterations=10)
    y = physics.A(torch.rand(2, 1, 4, 4, dtype=F64))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        penalty = loss(x_net=torch.ones(2, 1, 4, 4, dtype=F64), y=y, physics=physics, model=model)
        optimizer.zero_grad()
        penalty.mean().backward()
        optimizer.step()
        values.append(float(penalty.mean()))
    assert values[0] > 1e-2 and values[-1] < 0.1 * values[0]


def test_the_penalty_has_the_unit_of_a_squared_error():
    model, physics, _, y = imaging(batch=2)
    large, small = (
        ContractionLoss(1e-6, iterations=30)(
            x_net=scale * torch.ones(2, 1, 4, 4, dtype=F64), y=scale * y, physics=physics, model=model
        )
        for scale in (1.0, 1e-3)
    )
    assert relative_error(small, 1e-6 * large) < 0.5  # the points, and so the norms, differ


def test_a_contraction_pays_nothing_and_other_models_are_refused():
    model, physics, _, y = imaging(batch=2)
    loss = ContractionLoss(0.99)
    assert loss(x_net=model(y, physics), y=y, physics=physics, model=model).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="needs a DEQReconstructor, and Identity holds none"):
        loss(x_net=y, y=y, physics=Denoising(), model=nn.Identity())
    for bound in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(ValueError, match=r"bound must be in \(0, 1\)"):
            ContractionLoss(bound)
    for weight in (0, float("inf")):
        with pytest.raises(ValueError, match=f"weight must be positive and finite, got {weight}"):
            ContractionLoss(weight=weight)
    for iterations in (0, 2.5):
        with pytest.raises(ValueError, match=f"iterations counts .* got {iterations}"):
            ContractionLoss(iterations=iterations)
    with pytest.raises(TypeError, match="rng must be a torch.Generator, got int"):
        ContractionLoss(rng=3)


def test_states_of_several_variables_are_penalised():
    physics = physics_of(16, 8, 4)
    model = DEQReconstructor(DEADMM(SmallDenoiser(2.0), stepsize=0.5), solver=Solver(tol=1e-4, on_failure="ignore")).to(
        F64
    )
    y = physics.A(torch.rand(2, 1, 4, 4, dtype=F64))
    loss = ContractionLoss(0.5)(x_net=torch.ones(2, 1, 4, 4, dtype=F64), y=y, physics=physics, model=model)
    assert loss.shape == (2,) and bool((loss > 0).all())


@pytest.mark.parametrize("name", ["PGD", "ADMM", "DRS", "PDCP"])
def test_algorithms_of_deepinv_are_penalised_whatever_their_state(name):
    prior = dinv.optim.PnP(EquilibriumUNet(channels=(4, 8), contraction=0.99))
    settings = {"stepsize_dual": 0.5} if name == "PDCP" else {}
    algorithm = getattr(dinv.optim, name)(
        prior=prior, data_fidelity=dinv.optim.L2(), stepsize=0.5, g_param=0.1, max_iter=5, **settings
    )
    solver = Solver("anderson", max_iter=300, tol=1e-3, on_failure="ignore")
    model = DEQReconstructor(FromOptim(algorithm), solver=solver)
    y = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    penalty = ContractionLoss(bound=0.1)(x_net=model(y, Denoising()), y=y, physics=Denoising(), model=model).sum()
    (gradient,) = torch.autograd.grad(
        penalty, [next(p for p in model.parameters() if p.ndim == 4 and p.abs().sum() > 0)]
    )
    assert penalty > 0 and gradient.isfinite().all()


@pytest.mark.parametrize("stepsize", [1 / 51, 1 / 510])
def test_the_stepsize_does_not_change_what_a_tolerance_means(stepsize):
    torch.manual_seed(0)
    physics = dinv.physics.BlurFFT(img_size=(1, 32, 32), filter=dinv.physics.blur.gaussian_blur(sigma=(1.5, 1.5)))
    y = physics.A(torch.nn.functional.interpolate(torch.rand(2, 1, 8, 8), size=32, mode="bicubic"))
    net = EquilibriumUNet(channels=(4, 8), contraction=0.8)
    model = DEQReconstructor(DEGrad(net, data_weight=50.0, stepsize=stepsize)).eval()
    exact = DEQReconstructor(
        DEGrad(net, data_weight=50.0, stepsize=1 / 51), solver=Solver(tol=1e-6, max_iter=300, on_failure="ignore")
    ).eval()
    with torch.no_grad():
        x = model(y, physics)
        assert relative_error(x, exact(y, physics)) <= 2e-3 and bool(model.forward_stat.converged.all())


def test_a_probability_makes_calls_free_and_keeps_the_mean():
    model, physics, x, y = imaging(batch=2, tol=1e-6)
    x_net, calls = model(y, physics).detach(), 400
    every = ContractionLoss(0.1, rng=rng(0))
    some = ContractionLoss(0.1, rng=rng(1), probability=0.25)
    means, free = [], 0
    for loss in (every, some):
        values = [loss(x_net=x_net, y=y, physics=physics, model=model).mean().item() for _ in range(calls)]
        means.append(sum(values) / calls)
        free += sum(value == 0 for value in values)
    assert 0.7 * calls < free < 0.8 * calls
    assert means[1] == pytest.approx(means[0], rel=0.25)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"probability must be in \(0, 1\]"):
            ContractionLoss(probability=wrong)
