r"""The physics of deepinv, one by one: every template solves with them, and has the gradient of an unrolled solve."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from torch import nn

from deepinv_deq import DEADMM, DEHQS, ConvergenceWarning, DEGrad, DEProx, FromOptim, Solver
from tests.problems import (
    F64,
    MatrixPhysics,
    SmallDenoiser,
    assert_unrolled_gives_the_same,
    deq,
    relative_error,
    unrolled,
)

C128 = torch.complex128
SCALE = 0.25  # of the denoisers: strong contractions, so that few unrolled steps are enough
EXACT = {"tol": 1e-13, "max_iter": 60}  # of the conjugate gradients inside a proximal map


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def image(*shape, dtype=F64):
    return torch.rand(2, *shape, dtype=dtype, generator=rng())


def mask(*shape, seed=0):
    return (torch.rand(*shape, generator=rng(seed)) > 0.4).to(F64)


def kernel(side=3):
    k = torch.rand(1, 1, side, side, dtype=F64, generator=rng(3))
    return k / k.sum()


class Complex(nn.Module):
    r"""A denoiser of real and imaginary parts, for images that are complex tensors."""

    def __init__(self):
        super().__init__()
        self.net = SmallDenoiser(SCALE, channels=2)

    def forward(self, x):
        parts = torch.view_as_real(x)[:, 0].movedim(-1, 1)
        return torch.view_as_complex(self.net(parts).movedim(1, -1).contiguous())[:, None]


class Frames(nn.Module):
    r"""A denoiser of every frame of a video by itself."""

    def __init__(self):
        super().__init__()
        self.net = SmallDenoiser(SCALE, channels=2)

    def forward(self, x):
        return self.net(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def coils(n=3):
    maps = torch.randn(1, n, 8, 8, dtype=C128, generator=rng(1))
    return 2 * maps / maps.abs().square().sum(1, keepdim=True).sqrt().amax()  # of squared norm 4


def multicoil(**kwargs):
    return dinv.physics.MultiCoilMRI(mask=mask(1, 2, 8, 8), coil_maps=coils(), img_size=(2, 8, 8), **kwargs)


def tomography(**kwargs):
    return dinv.physics.Tomography(angles=5, img_width=8, normalize=False, dtype=F64, **kwargs)


def fan_beam():
    # a detector wide enough for the image, which the default one, made for large images, is not at this size
    return tomography(fan_beam=True, fan_parameters={"n_detector_pixels": 12, "detector_spacing": 0.2})


def exactly(physics):
    r"""Conjugate gradients to the last digit, for a physics whose constructor does not take their settings."""
    physics.tol, physics.max_iter = EXACT["tol"], EXACT["max_iter"]
    return physics


def sensing(**kwargs):
    return dinv.physics.CompressedSensing(m=30, img_size=(1, 8, 8), rng=rng(), **{"dtype": F64} | kwargs)


def inpainting(seed=0):
    return dinv.physics.Inpainting((1, 8, 8), mask=mask(1, 8, 8, seed=seed))


def stacked():
    parts = [inpainting(1), dinv.physics.Blur(kernel(), padding="valid"), inpainting(2)]
    return dinv.physics.StackedLinearPhysics(parts, **EXACT)


def composed():
    return inpainting() * dinv.physics.Blur(kernel(), padding="circular")


def virtual():
    turn = dinv.transform.Rotate(multiples=90, positive=True) * dinv.transform.Reflect(dim=[-1])
    torch.manual_seed(3)
    return dinv.physics.VirtualLinearPhysics(
        physics=composed(), transform=turn, g_params=turn.get_params(image(1, 8, 8))
    )


def functions():
    r"""A physics made of two functions."""
    return dinv.physics.LinearPhysics(
        A=lambda x, **_: x.cumsum(-1) / 8, A_adjoint=lambda y, **_: y.flip(-1).cumsum(-1).flip(-1) / 8
    )


# what is measured, and the image that it is of; a name for every test
ZOO = {
    "MRI": (lambda: dinv.physics.MRI(mask=mask(1, 2, 8, 8), img_size=(2, 8, 8)), image(2, 8, 8)),
    "MRI, one mask per sample": (lambda: dinv.physics.MRI(mask=mask(2, 2, 8, 8), img_size=(2, 8, 8)), image(2, 8, 8)),
    "MRI in 3D": (
        lambda: dinv.physics.MRI(mask=mask(1, 2, 4, 8, 8), img_size=(2, 4, 8, 8), three_d=True),
        image(2, 4, 8, 8),
    ),
    "dynamic MRI": (
        lambda: dinv.physics.DynamicMRI(mask=mask(1, 2, 3, 8, 8), img_size=(2, 3, 8, 8)),
        image(2, 3, 8, 8),
    ),
    "multi-coil MRI": (multicoil, image(2, 8, 8)),
    "parallel tomography": (tomography, image(1, 8, 8)),
    "fan-beam tomography": (fan_beam, image(1, 8, 8)),
    "inpainting": (inpainting, image(1, 8, 8)),
    "denoising": (dinv.physics.Denoising, image(1, 8, 8)),
    "blur": (lambda: dinv.physics.Blur(kernel(), padding="valid"), image(1, 8, 8)),
    "reflecting blur": (lambda: dinv.physics.Blur(kernel(), padding="reflect"), image(1, 8, 8)),
    "Fourier blur": (lambda: dinv.physics.BlurFFT((1, 8, 8), filter=kernel()), image(1, 8, 8)),
    "downsampling": (lambda: dinv.physics.Downsampling((1, 8, 8), filter=kernel(), factor=2), image(1, 8, 8)),
    "compressed sensing": (sensing, image(1, 8, 8)),
    "stacked": (stacked, image(1, 8, 8)),
    "composed": (composed, image(1, 8, 8)),
    "virtual": (virtual, image(1, 8, 8)),
    "functions": (functions, image(1, 8, 8)),
    "complex compressed sensing": (lambda: sensing(dtype=C128), image(1, 8, 8, dtype=C128)),
    "complex inpainting": (inpainting, image(1, 8, 8, dtype=C128)),
    "single pixel": (lambda: dinv.physics.SinglePixelCamera(m=20, img_size=(1, 8, 8), dtype=F64), image(1, 8, 8)),
    "colours": (lambda: dinv.physics.Decolorize().to(F64), image(3, 8, 8)),
    "mosaic": (lambda: dinv.physics.Demosaicing((3, 8, 8)).to(F64), image(3, 8, 8)),
}


def denoiser(x):
    if x.is_complex():
        return Complex()
    if x.ndim == 5:
        return SmallDenoiser(SCALE, channels=x.shape[1], dims=3) if x.shape[2] == 4 else Frames()
    return SmallDenoiser(SCALE, channels=x.shape[1])


def safe(template, physics, x):
    r"""The template with a stepsize from the norm of the operator."""
    sqnorm = float(physics.compute_sqnorm(x, tol=1e-6, verbose=False))
    weight = 1.0 if template is DEProx else 1 / sqnorm  # which DE-Grad needs to converge in few steps, if it is large
    settings = {"data_weight": weight, "learn_stepsize": True}
    stepsize = template(denoiser(x), **settings).safe_stepsize(sqnorm)
    return template(denoiser(x), stepsize=stepsize, **settings)


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


# Data terms other than least squares -------------------------------------------------------------------------------


class Plug(nn.Module):
    r"""Takes the noise level that deepinv hands to every denoiser."""

    def __init__(self, net, offset=0.0):
        super().__init__()
        self.net, self.offset = net, offset

    def forward(self, x, sigma=None, **kwargs):
        return self.offset + self.net(x)


def pnp(algorithm, fidelity, net, start, **settings):
    prior = dinv.optim.PnP(net)
    optim = algorithm(data_fidelity=fidelity, prior=prior, custom_init=lambda y, physics: start, **settings)
    return deq(FromOptim(optim, trainable=("stepsize",)))


@pytest.mark.parametrize("fidelity", [dinv.optim.L2(), dinv.optim.data_fidelity.AmplitudeLoss()])
def test_phase_retrieval(fidelity):
    x = image(1, 8, 8, dtype=C128) + 0.5
    physics = dinv.physics.RandomPhaseRetrieval(m=150, img_size=(1, 8, 8), dtype=C128, rng=rng())
    net = Plug(Complex(), offset=0.5)
    model = pnp(dinv.optim.PGD, fidelity, net, (x,), stepsize=0.02)
    assert_unrolled_gives_the_same(model, physics, physics.A(x), steps=60)


def test_counts_of_a_blurred_image():
    x = 0.5 + image(1, 8, 8)
    physics = dinv.physics.Blur(kernel(), padding="circular")
    fidelity = dinv.optim.data_fidelity.PoissonLikelihood(gain=0.1, bkg=0.05)
    model = pnp(dinv.optim.PGD, fidelity, Plug(denoiser(x), offset=0.6), (x,), stepsize=0.02)
    assert_unrolled_gives_the_same(model, physics, physics.A(x), steps=60)


def absolute(x, y, *args, **kwargs):
    r"""Absolute values, rounded at zero: the proximal map of deepinv's own L1 is an inner loop with random numbers."""
    return ((x - y).square() + 0.01).sqrt().flatten(1).sum(1)


def test_absolute_values():
    x = image(1, 8, 8)
    physics = dinv.physics.Blur(kernel(), padding="circular")
    y = physics.A(x)
    y[:, :, ::3, ::3] = 2.0  # outliers, which this term is for
    fidelity = dinv.optim.DataFidelity(d=absolute)
    model = pnp(dinv.optim.PGD, fidelity, Plug(denoiser(x)), (x,), stepsize=0.1)
    assert_unrolled_gives_the_same(model, physics, y, steps=60)
