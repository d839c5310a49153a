r"""Restriction to some samples with physics, parameters and constants that a user wrote."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Inpainting, LinearPhysics
from torch import nn

from deepinv_deq import DEProx
from tests.iterations.common import solve
from tests.problems import F64, random_mask, relative_error, rng


class Own(LinearPhysics):
    r"""A multiple of the identity, as a user may write it."""

    def __init__(self, gain, how):
        super().__init__()
        self.how = how
        if how == "list":
            self.gains = gain.flatten().tolist()
        elif how == "tensors":
            self.gains = list(gain)
        elif how == "parameter":
            self.gain = nn.Parameter(gain)
        else:
            self.register_buffer("gain", gain)

    def A(self, x, **_):
        if self.how in ("list", "tensors"):
            gain = torch.stack([torch.as_tensor(g, dtype=x.dtype).reshape(1, 1, 1) for g in self.gains[: len(x)]])
        elif self.how == "first rows":
            gain = self.gain[: len(x)]
        else:
            gain = self.gain
        return gain * x

    def A_adjoint(self, y, **_):
        return self.A(y)


class Ours(Inpainting):
    r"""A subclass that uses the mask of deepinv in another way: one factor per row of the image."""

    def A(self, x, **_):
        return self.mask[:, 0, 0, 0].reshape(1, 1, -1, 1) * x

    A_adjoint = A

    def A_adjoint_A(self, x, **_):
        return self.A(self.A(x))


def closure(gain):
    return LinearPhysics(A=lambda x, **_: gain[: len(x)] * x, A_adjoint=lambda y, **_: gain[: len(y)] * y)


GAIN = torch.tensor([0.9, 0.4, 0.7], dtype=F64).reshape(3, 1, 1, 1)
UNCERTAIN = {
    **{
        how: (lambda how=how: Own(GAIN.clone(), how))
        for how in ("buffer", "parameter", "list", "tensors", "first rows")
    },
    "per channel": lambda: Own(GAIN[:, :, 0].clone(), "buffer"),  # as many channels as samples: shared by all
    "equal now": lambda: Own(torch.ones_like(GAIN), "first rows"),
    "stack of own": lambda: dinv.physics.StackedLinearPhysics([Own(GAIN.clone(), "buffer"), dinv.physics.Denoising()]),
    "closure": lambda: closure(GAIN),
    "subclass": lambda: Ours((3, 3, 3), mask=GAIN.expand(3, 3, 3, 3).clone()),
    "dinv.physics.stack": lambda: dinv.physics.stack(
        Inpainting((3, 3, 3), mask=random_mask(3, 3, 3, 3)), dinv.physics.Denoising()
    ),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_physics_of_a_user_give_what_each_sample_alone_gives(name):
    results = []
    for chunk_size in (1, 3):
        physics, model = UNCERTAIN[name](), solve(chunk_size)
        y = physics.A(torch.rand(3, 3, 3, 3, dtype=F64, generator=rng()))
        y = y.detach() if isinstance(y, torch.Tensor) else dinv.utils.TensorList([t.detach() for t in y])
        x = model(y, physics)
        assert model.forward_stat.converged.all()
        trained = [*model.parameters(), *physics.parameters()]
        results.append((x, torch.autograd.grad(x.square().sum(), trained)))
        f = model.iteration.bind(y, physics)
        torch.testing.assert_close(f(x), x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-10)
    assert relative_error(results[0][1], results[1][1]) <= 1e-8


@pytest.mark.parametrize("name", [n for n in UNCERTAIN if n not in ("per channel", "dinv.physics.stack", "subclass")])
def test_physics_of_a_user_with_something_of_each_sample_are_not_restricted(name):
    physics = UNCERTAIN[name]()
    x = torch.rand(3, 3, 3, 3, dtype=F64)
    assert solve(1).iteration.bind(physics.A(x), physics).select(slice(0, 1)) is None


class ChannelGain(DEProx):
    r"""A gain for each channel, trained, starting at one."""

    def __init__(self, denoiser, **settings):
        super().__init__(denoiser, **settings)
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x, physics, aty):
        return 0.5 * self.gain * super().forward(x, physics, aty)


def test_a_parameter_with_as_many_rows_as_samples_never_belongs_to_samples():
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    for gain in ([1.0, 1.0, 1.0], [0.6, 1.0, 1.3]):
        model = solve(1, ChannelGain)
        model.iteration.gain.data = torch.tensor(gain, dtype=F64).reshape(3, 1, 1)
        f = model.iteration.bind(y, physics)
        assert f.select(slice(0, 1)) is not None
        x = model(y, physics)
        one_by_one = torch.cat([model(t, physics) for t in y.split(1)])
        torch.testing.assert_close(x, one_by_one, rtol=1e-10, atol=1e-12)
        ours, exact = (torch.autograd.grad(t.square().sum(), model.iteration.gain)[0] for t in (x, one_by_one))
        assert relative_error(ours, exact) <= 1e-9


def test_a_shared_mask_followed_by_masks_of_the_samples():
    model = solve(1)
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    for mask in (
        random_mask(1, 3, 8, 8),
        random_mask(3, 3, 8, 8, seed=1),
        random_mask(3, 8, 8),
        random_mask(3, 1, 8, 8, seed=2),
    ):
        physics.update(mask=mask)
        y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
        x = model(y, physics)
        for i in range(3):
            own = Inpainting((3, 8, 8), mask=mask[i : i + 1] if mask.ndim == 4 and len(mask) == 3 else mask)
            torch.testing.assert_close(model(y[i : i + 1], own), x[i : i + 1], rtol=1e-9, atol=1e-11)


def test_noise_levels_of_samples_are_solved_together():
    class Wants(nn.Module):
        def forward(self, x, sigma):
            return 0.5 * x * sigma

    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=F64).reshape(3, 1, 1, 1)
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    x = solve(1, denoiser=Wants(), sigma=sigma)(y, physics)
    for i in range(3):
        one = solve(1, denoiser=Wants(), sigma=float(sigma[i]))(y[i : i + 1], physics)
        torch.testing.assert_close(one, x[i : i + 1])


def test_constants_of_a_user_are_not_taken_apart_unless_the_user_says_how():
    class Scales(DEProx):
        def constants(self, y, physics):
            return (*super().constants(y, physics), 0.5 * torch.ones(len(y), 1, 1, 1, dtype=y.dtype))

        def forward(self, x, physics, aty, scale):
            return scale * super().forward(x, physics, aty)

    class Says(Scales):
        def select_constants(self, constants, rows):
            return tuple(c[rows] for c in constants)

    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    assert solve(1, Scales).iteration.bind(y, physics).select(slice(0, 1)) is None
    f = solve(1, Says).iteration.bind(y, physics)
    torch.testing.assert_close(f.select(slice(1, 3))(y[1:]), f(y)[1:])
