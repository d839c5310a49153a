r"""Measurements must fit the physics, and stay as they were; what is remembered of a physics is forgotten with it.

What ``init`` and ``constants`` store is no part of a map of some samples."""

from __future__ import annotations

import gc

import pytest
import torch
from deepinv.physics import Inpainting, LinearPhysics
from torch import nn

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, DEQReconstructor, Solver
from deepinv_deq.iterations.measurements import fits
from tests.problems import F64, SmallDenoiser, deq, random_mask, relative_error, rng


class Broadcasts(LinearPhysics):
    r"""Its adjoint takes measurements of any height, its measurements have the height of the gain."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("gain", torch.ones(rows, 1))

    def A(self, x, **_):
        return x[..., :1, :] * self.gain

    def A_adjoint(self, y, **_):
        return y.expand(-1, -1, 4, -1) if y.shape[-2] == 1 else y


def test_another_physics_at_the_same_address_is_checked_again():
    y = torch.zeros(1, 1, 1, 4)
    for _ in range(20):
        right = Broadcasts(1)
        DEProx(nn.Identity()).bind(y, right)
        del right
        gc.collect()
        wrong = Broadcasts(3)
        with pytest.raises(ValueError, match="to measurements of shape"):
            DEProx(nn.Identity()).bind(y, wrong)
        del wrong


def test_a_physics_whose_tensors_change_shape_is_checked_again():
    y, physics = torch.zeros(1, 1, 1, 4), Broadcasts(1)
    iteration = DEProx(nn.Identity())
    iteration.bind(y, physics)
    physics.gain = torch.ones(3, 1)
    with pytest.raises(ValueError, match="to measurements of shape"):
        iteration.bind(y, physics)


def test_the_check_costs_one_evaluation_for_each_shape(monkeypatch):
    calls, original = [], Inpainting.A
    monkeypatch.setattr(Inpainting, "A", lambda self, x, **k: calls.append(len(x)) or original(self, x, **k))
    physics, iteration = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4)), DEProx(nn.Identity())
    for batch in (2, 2, 3, 2):
        iteration.bind(torch.zeros(batch, 1, 4, 4), physics)
    assert calls == [2, 3]
    count = len(fits._known)
    del physics
    gc.collect()
    assert len(fits._known) < count


class InPlace(LinearPhysics):
    r"""An adjoint that writes to its argument."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", 0.5 + torch.rand(1, 4, 4, dtype=F64, generator=rng(0)))

    def A(self, x, **_):
        return x * self.weights

    def A_adjoint(self, y, **_):
        return y.mul_(self.weights)


@pytest.mark.parametrize("template", [DEGrad, DEProx, DEHQS, DEADMM])
def test_a_physics_that_writes_to_the_measurements_is_named(template):
    y = torch.rand(2, 1, 4, 4, dtype=F64, generator=rng(1))
    with pytest.raises(RuntimeError, match="InPlace, or constants or init of .* wrote to the measurements"):
        deq(template(SmallDenoiser(), stepsize=0.5))(y, InPlace())


class Scaled(DEProx):
    r"""Works in units of the measurements, which it keeps as a number."""

    scale = 1.0

    def init(self, y, physics):
        self.scale = 3 * y.abs().amax().item()
        return super().init(y, physics)

    def forward(self, x, physics, *constants):
        return self.scale * super().forward(x / self.scale, physics, *(c / self.scale for c in constants))


def test_a_batch_is_solved_whole_where_init_stores_a_number():
    iteration = Scaled(SmallDenoiser(), stepsize=0.5)
    physics = Inpainting((1, 4, 4), mask=random_mask(1, 4, 4))
    y = physics.A(torch.rand(6, 1, 4, 4, dtype=F64, generator=rng(1)))
    model = deq(iteration)
    with torch.no_grad():
        whole, parts = (
            DEQReconstructor(iteration, solver=Solver("anderson", tol=1e-12, max_iter=300, chunk_size=size))(y, physics)
            for size in (6, 1)
        )
    assert relative_error(parts, whole) < 1e-9
    with pytest.raises(RuntimeError, match="stored on the iteration"):
        model(y, physics).sum().backward()


@pytest.mark.parametrize("template", [DEProx, DEGrad, DEHQS, DEADMM])
def test_integers_are_refused_unless_the_adjoint_makes_numbers_of_them(template):
    y = torch.randint(0, 255, (2, 1, 4, 4), generator=rng(), dtype=torch.uint8)
    keeps = LinearPhysics(A=lambda x, **_: x.flip(-1), A_adjoint=lambda y, **_: y.flip(-1))
    model = DEQReconstructor(template(SmallDenoiser(), stepsize=0.5), solver=Solver("anderson", tol=1e-5, max_iter=200))
    with pytest.raises(TypeError, match=r"returned torch\.uint8, .*convert the measurements, for example y\.float\(\)"):
        model(y, keeps)
    converts = Inpainting((1, 4, 4), mask=random_mask(1, 4, 4).float())
    assert relative_error(model(y, converts), model(y.float(), converts)) <= 1e-6


class Identity(LinearPhysics):
    r"""The identity, with a parameter that is computed from a trained one and is no part of the operator."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def A(self, x, **_):
        return x

    def A_adjoint(self, y, **_):
        return y


class ScaledStep(DEGrad):
    def step(self, x, physics, *constants):
        return physics.scale * super().step(x, physics, *constants)


def test_measurements_stay_as_they_were_if_the_network_writes_and_parameters_are_computed():
    class Writes(nn.Module):
        def forward(self, x):
            return 0.3 * torch.tanh(x.mul_(0.5))

    trained = torch.ones((), dtype=F64, requires_grad=True)
    physics, y = Identity(trained.square()), torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    before = y.clone()
    x_hat = deq(ScaledStep(Writes(), stepsize=0.5))(y, physics)  # whose start is y itself
    assert torch.equal(y, before)
    x_hat.sum().backward()
    assert torch.equal(y, before) and abs(trained.grad) < 1e-8  # a scaled step has the same fixed point
