r"""What is replaced after an iteration, or its class, was made: constants, the network, forward."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import Blur, Inpainting
from torch import nn

from deepinv_deq import DEGrad, DEProx, EquilibriumUNet
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq, imaging, random_mask, relative_error

SHAPE = (1, 8, 8)


class Doubled(DEGrad):
    def constants(self, y, physics):
        return (physics.A_adjoint(2 * y),)


class Weighted(DEGrad):
    def constants(self, y, physics):
        return super().constants(2 * y, physics)


def inpainting():
    return Inpainting(SHAPE, mask=random_mask(*SHAPE))


def blur():
    return Blur(filter=torch.full((1, 1, 3, 3), 1 / 9, dtype=F64), padding="circular")


@pytest.mark.parametrize("kind", [Doubled, Weighted])
@pytest.mark.parametrize("operator", [inpainting, blur])
def test_constants_of_a_subclass_mean_the_same_for_every_physics(kind, operator):
    physics, denoiser = operator(), SmallDenoiser(0.4).to(F64)
    y = physics.A(torch.rand(2, *SHAPE, dtype=F64))
    x = deq(kind(denoiser, stepsize=0.5))(y, physics)
    assert relative_error(x, deq(DEGrad(denoiser, stepsize=0.5))(2 * y, physics)) <= 1e-9


def test_constants_of_an_object_count_as_those_of_a_subclass():
    physics, iteration = blur(), DEGrad(SmallDenoiser(0.4), stepsize=0.5)
    y = physics.A(torch.rand(2, *SHAPE, dtype=F64))
    exact = deq(iteration)(2 * y, physics)
    iteration.constants = lambda y, physics: (physics.A_adjoint(2 * y),)
    assert relative_error(deq(iteration)(y, physics), exact) <= 1e-9


class Denoised(SmallDenoiser):
    def forward(self, x, sigma=None):
        return super().forward(x) * (1 if sigma is None else 1 - sigma)


@pytest.mark.parametrize("own, given", [(0.5, None), (None, 0.5)])
def test_a_new_network_gets_the_noise_level(own, given):
    physics, denoiser = inpainting(), Denoised().to(F64)
    y = physics.A(torch.rand(2, *SHAPE, dtype=F64))
    iteration = DEProx(SmallDenoiser(seed=1), stepsize=0.5, sigma=own)
    iteration.denoiser = denoiser
    exact = deq(DEProx(denoiser, stepsize=0.5, sigma=own))(y, physics, sigma=given)
    assert torch.equal(deq(iteration)(y, physics, sigma=given), exact)
    assert relative_error(exact, deq(DEProx(denoiser, stepsize=0.5))(y, physics)) > 0.1


def test_a_new_network_that_needs_a_noise_level_is_refused_and_the_old_one_stays():
    class Needs(SmallDenoiser):
        def forward(self, x, sigma):
            return super().forward(x) * (1 - sigma)

    iteration = DEProx(old := SmallDenoiser())
    with pytest.raises(ValueError, match="Needs needs a noise level: pass sigma="):
        iteration.denoiser = Needs()
    assert iteration.denoiser is old


def test_a_new_network_gets_its_context():
    physics = inpainting()
    y = physics.A(torch.rand(1, *SHAPE, dtype=F64))
    denoiser = EquilibriumUNet(channels=(4, 8), context_channels=1).to(F64)
    iteration = DEProx(EquilibriumUNet(channels=(4, 8)), stepsize=0.5)
    iteration.denoiser = denoiser
    assert torch.equal(deq(iteration)(y, physics), deq(DEProx(denoiser, stepsize=0.5))(y, physics))
    iteration.denoiser = SmallDenoiser().to(F64)
    assert not iteration.context and deq(iteration)(y, physics).shape == (1, *SHAPE)
    iteration.context = True
    with pytest.raises(TypeError, match="context"):
        deq(iteration)(y, physics)


@pytest.mark.parametrize("kind", [DEGrad, DEProx])
def test_a_forward_set_on_a_class_is_the_map_that_is_solved(kind, monkeypatch):
    def half(self, x, physics, *constants):
        return 0.5 * kind.forward(self, x, physics, *constants)

    class Later(kind):
        pass

    Later.forward = half
    model, physics, _, y = imaging(Later)
    assert_unrolled_gives_the_same(model, physics, y)
    model, physics, _, y = imaging(kind)
    monkeypatch.setattr(kind, "forward", lambda self, x, physics, *constants: 0.5 * x + 0.1)
    assert torch.allclose(model(y, physics), torch.tensor(0.2, dtype=F64))


def test_an_iteration_can_be_made_without_memory():
    with torch.device("meta"):
        iteration = DEProx(nn.Conv2d(1, 1, 3, padding=1), stepsize=0.5)
    whole = DEProx(nn.Conv2d(1, 1, 3, padding=1), stepsize=0.5)
    iteration.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(iteration.stepsize, whole.stepsize)
