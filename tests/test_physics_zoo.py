r"""The physics of deepinv, one by one: every template solves with them, and has the gradient of an unrolled solve."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from torch import nn

from deepinv_deq import DEADMM, DEHQS, ConvergenceWarning, DEGrad, DEProx, Solver
from tests.problems import (
    F64,
    MatrixPhysics,
    SmallDenoiser,
    assert_unrolled_gives_the_same,
    deq,
    relative_error,
    rng,
    unrolled,
)
from tests.zoo import (
    C128,
    EXACT,
    SCALE,
    ZOO,
    composed,
    denoiser,
    exactly,
    fan_beam,
    image,
    kernel,
    multicoil,
    safe,
    sensing,
    stacked,
    tomography,
)


@pytest.mark.filterwarnings("ignore::UserWarning:deepinv")
@pytest.mark.parametrize("name", ZOO)
def test_de_prox(name):
    make, x = ZOO[name]
    physics = make()
    assert_unrolled_gives_the_same(deq(safe(DEProx, physics, x)), physics, physics.A(x), steps=40)


@pytest.mark.filterwarnings("ignore::UserWarning:deepinv")
@pytest.mark.parametrize(
    "name",
    ["multi-coil MRI", "parallel tomography", "Fourier blur", "stacked", "complex compressed sensing", "virtual"],
)
def test_de_grad(name):
    make, x = ZOO[name]
    physics = make()
    assert_unrolled_gives_the_same(deq(safe(DEGrad, physics, x)), physics, physics.A(x), steps=90)


@pytest.mark.filterwarnings("ignore::UserWarning:deepinv")
@pytest.mark.parametrize("template", [DEHQS, DEADMM])
@pytest.mark.parametrize(
    "make, x",
    [
        ZOO["MRI"],
        ZOO["Fourier blur"],
        ZOO["downsampling"],
        ZOO["complex inpainting"],
        (lambda: multicoil(**EXACT), image(2, 8, 8)),
        (lambda: sensing(**EXACT), image(1, 8, 8)),
        (lambda: exactly(tomography()), image(1, 8, 8)),
        (lambda: exactly(fan_beam()), image(1, 8, 8)),
        (stacked, image(1, 8, 8)),
        (lambda: exactly(composed()), image(1, 8, 8)),
    ],
    ids=[
        "MRI",
        "Fourier blur",
        "downsampling",
        "complex inpainting",
        "multi-coil MRI",
        "compressed sensing",
        "parallel tomography",
        "fan-beam tomography",
        "stacked",
        "composed",
    ],
)
def test_templates_with_a_proximal_step(make, x, template):
    physics = make()
    sqnorm = float(physics.compute_sqnorm(x, tol=1e-6, verbose=False))
    iteration = template(denoiser(x), stepsize=0.5 / max(1.0, sqnorm), learn_stepsize=True)
    assert_unrolled_gives_the_same(deq(iteration), physics, physics.A(x), steps=40)


@pytest.mark.parametrize("template", [DEHQS, DEADMM])
def test_a_proximal_step_without_a_formula_is_that_of_the_physics_at_forward_time(template):
    # deepinv's own backward of such a step takes the physics as it finds it, and keeps the gradient of its tensors to itself
    matrix = (torch.randn(8, 16, dtype=F64, generator=rng()) / 5).requires_grad_()
    model = deq(template(SmallDenoiser(SCALE), stepsize=0.5, learn_stepsize=True))
    y = torch.rand(2, 8, dtype=F64, generator=rng(1))

    def gradients(reconstruct):
        physics = MatrixPhysics(matrix, 4)
        physics.tol, physics.max_iter = EXACT["tol"], EXACT["max_iter"]
        loss = reconstruct(y, physics).sin().sum()
        physics.update(matrix=torch.zeros(8, 16, dtype=F64))
        return torch.autograd.grad(loss, [matrix, *model.parameters()])

    exact = gradients(lambda y, physics: unrolled_with_recorded_solves(model, y, physics))
    for ours, theirs in zip(gradients(model), exact, strict=True):
        assert relative_error(ours, theirs) <= 1e-8


def unrolled_with_recorded_solves(model, y, physics):
    physics.implicit_backward_solver = False
    return unrolled(model, y, physics, 40)


def test_coil_maps_of_any_norm():
    physics = dinv.physics.MultiCoilMRI(coil_maps=torch.ones(1, 4, 8, 8, dtype=C128), img_size=(2, 8, 8))
    x = image(2, 8, 8)
    sqnorm = float(physics.compute_sqnorm(x, verbose=False))
    assert sqnorm == pytest.approx(4, rel=1e-3)
    y = physics.A(x)
    fails = deq(DEProx(nn.Identity(), stepsize=1.0))
    with pytest.warns(ConvergenceWarning, match="squared norm is 4 .*use stepsize=0.25"):
        fails.solver = Solver("fixed_point_iter", max_iter=30)
        fails(y, physics)
    x_hat = deq(DEProx(nn.Identity(), stepsize=fails.iteration.safe_stepsize(sqnorm)))(y, physics)
    torch.testing.assert_close(x_hat, x)  # fully sampled: the least-squares solution is the image


GENERATORS = {
    "masks": (
        lambda: dinv.physics.MRI(img_size=(2, 8, 8)),
        lambda: dinv.physics.generator.GaussianMaskGenerator((2, 8, 8), acceleration=2, rng=rng(), dtype=F64),
        image(2, 8, 8),
    ),
    "kernels": (
        lambda: dinv.physics.Blur(padding="circular"),
        lambda: dinv.physics.generator.MotionBlurGenerator((3, 3), rng=rng(), dtype=F64),
        image(1, 8, 8),
    ),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_physics_that_changes_for_every_batch(name):
    make, generator, x = GENERATORS[name]

    def gradients(reconstruct):
        physics, draw, total, operators = make(), generator(), 0.0, []
        for _ in range(3):
            physics.update(**draw.step(len(x)))  # while the batches before still wait for their gradient
            y = physics.A(x)
            total = total + (reconstruct(y, physics) - x).square().sum()
            operators.append(y)
        assert not torch.allclose(operators[0], operators[1])
        return torch.autograd.grad(total, list(model.parameters()))

    model = deq(DEProx(denoiser(x), stepsize=0.8, learn_stepsize=True))
    exact = gradients(lambda y, physics: unrolled(model, y, physics, 40))
    assert relative_error(gradients(model), exact) <= 1e-8


def test_the_kernel_of_a_blur_gets_its_gradient():
    x = image(1, 8, 8)
    model = deq(DEProx(denoiser(x), stepsize=0.8))
    filter = kernel().requires_grad_()

    def gradient(reconstruct):
        physics = dinv.physics.Blur(padding="circular")
        physics.filter = filter
        return torch.autograd.grad((reconstruct(physics.A(x), physics) - x).square().sum(), filter)

    exact = gradient(lambda y, physics: unrolled(model, y, physics, 40))
    assert relative_error(gradient(model), exact) <= 1e-8
