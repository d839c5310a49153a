r"""The physics of deepinv with data terms other than least squares."""

from __future__ import annotations

import deepinv as dinv
import pytest
from torch import nn

from deepinv_deq import FromOptim
from tests.problems import assert_unrolled_gives_the_same, deq, rng
from tests.zoo import C128, Complex, denoiser, image, kernel


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
