r"""The physics of deepinv, each with an image, and denoisers that suit them."""

from __future__ import annotations

import deepinv as dinv
import torch
from torch import nn

from deepinv_deq import DEProx
from tests.problems import F64, SmallDenoiser, rng
from tests.problems import random_mask as mask

C128 = torch.complex128
SCALE = 0.25  # of the denoisers: strong contractions, so that few unrolled steps are enough
EXACT = {"tol": 1e-13, "max_iter": 60}  # of the conjugate gradients inside a proximal map


def image(*shape, dtype=F64):
    return torch.rand(2, *shape, dtype=dtype, generator=rng())


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
