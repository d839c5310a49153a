r"""The circulant preconditioner: exact for filters, measured once for each state of the physics."""

from __future__ import annotations

import functools
import gc
import operator
from array import array
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepinv.physics import MRI, BlurFFT, Inpainting, LinearPhysics, StackedLinearPhysics
from torch import nn

from deepinv_deq import DEGrad, DEProx, Solver
from deepinv_deq.iterations.circulant import spectrum
from tests.problems import F64, imaging


def blur(side=16):
    kernel = torch.tensor([[0.0, 1, 0], [1, 2, 1], [0, 1, 0]], dtype=F64)[None, None] / 6
    return BlurFFT((1, side, side), filter=kernel.float()).to(F64)


def test_the_spectrum_of_a_filter_is_exact():
    physics, x = blur(), torch.rand(3, 1, 16, 16, dtype=F64)
    model = spectrum(physics, x)
    again = torch.fft.irfftn(torch.fft.rfftn(x, dim=(2, 3)) * model, s=x.shape[2:], dim=(2, 3))
    torch.testing.assert_close(again, physics.A_adjoint_A(x), atol=1e-6, rtol=1e-5)


def test_the_preconditioner_inverts_a_linear_iteration():
    physics, x = blur(), torch.rand(3, 1, 16, 16, dtype=F64)

    class Nothing(nn.Module):
        def forward(self, x):
            return 0 * x

    template = DEGrad(Nothing(), stepsize=0.1, data_weight=5.0).to(F64)
    f = template.bind(physics.A(x), physics)
    inverse = f.preconditioner(x)
    z = torch.zeros_like(x)
    torch.testing.assert_close(inverse(x - (f(x) - f(z))), x, atol=1e-5, rtol=1e-5)
    for precondition, most in ((True, 4), (False, 50)):
        _, stat = Solver("anderson", tol=1e-6, precondition=precondition)(f, z)
        assert stat.converged.all() and stat.evaluations <= most
    assert stat.evaluations > 10


def test_physics_that_are_no_filters_get_no_preconditioner():
    x = torch.rand(2, 1, 16, 16)
    inpainting = Inpainting((1, 16, 16), mask=(torch.rand(1, 16, 16) > 0.5).float())
    assert spectrum(inpainting, x) is None
    assert DEGrad(nn.Identity()).bind(inpainting.A(x), inpainting).preconditioner(x) is None
    assert imaging(DEProx)[0].iteration.preconditioner(x, inpainting) is None
    assert spectrum(inpainting, x.cfloat()) is None


@pytest.fixture
def calls(monkeypatch):
    r"""Batch sizes of all evaluations of A^T A by MRI."""
    sizes, original = [], MRI.A_adjoint_A
    monkeypatch.setattr(MRI, "A_adjoint_A", lambda self, x: sizes.append(len(x)) or original(self, x))
    return sizes


def test_the_spectrum_is_kept_until_the_physics_changes_and_is_each_samples_own(calls):
    physics = MRI(mask=torch.ones(1, 1, 8, 8), img_size=(2, 8, 8))
    x = torch.rand(2, 2, 8, 8)
    state = torch.get_rng_state()
    first = spectrum(physics, x)
    assert spectrum(physics, x + 1) is first and set(calls) == {1}
    assert torch.equal(torch.get_rng_state(), state)
    mask = torch.ones(2, 1, 8, 8)
    mask[1, ..., ::2] = 0
    count = len(calls)
    physics.update(mask=mask)
    both = spectrum(physics, x)
    assert len(calls) == 2 * count and both.shape[0] == 2
    torch.testing.assert_close(both[:1], first)
    physics.update(mask=mask[1:])
    torch.testing.assert_close(spectrum(physics, x), both[1:])


def test_a_sample_without_a_filter_does_not_cost_the_others_theirs():
    mask = torch.ones(2, 1, 16, 16)
    mask[1] = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    physics, x = Inpainting((1, 16, 16), mask=mask), torch.rand(2, 1, 16, 16)
    eigenvalues = spectrum(physics, x)
    torch.testing.assert_close(eigenvalues[0], torch.ones_like(eigenvalues[0]))
    assert eigenvalues[1].isnan().all()
    iteration = DEGrad(nn.Identity(), stepsize=0.25)
    for inverse, other in ((iteration.preconditioner(x, physics), 1.0), (iteration.natural(x, physics), 4.0)):
        torch.testing.assert_close(inverse(x), x * torch.tensor([2.0, other]).reshape(2, 1, 1, 1))


class Scaled(LinearPhysics):
    r"""A multiple of the identity, by a number, a 0-dim tensor and a tensor in a list."""

    def __init__(self):
        super().__init__()
        self.number, self.inside = 1.0, [torch.ones(1)]
        self.register_buffer("scalar", torch.tensor(1.0))

    def A(self, x, **_):
        return self.number * self.scalar * self.inside[0] * x

    def A_adjoint(self, y, **_):
        return self.A(y)


def test_the_spectrum_is_measured_anew_when_anything_changes():
    x, physics = torch.rand(2, 1, 8, 8), Scaled()
    stack = StackedLinearPhysics([physics, Scaled()])

    def eigenvalue(p):
        return float(spectrum(p, x).mean())

    assert eigenvalue(physics) == pytest.approx(1) and eigenvalue(stack) == pytest.approx(2)
    physics.number = 2.0
    assert eigenvalue(physics) == pytest.approx(4) and eigenvalue(stack) == pytest.approx(5)
    physics.scalar.fill_(0.5)
    assert eigenvalue(physics) == pytest.approx(1) and eigenvalue(stack) == pytest.approx(2)
    physics.inside[0] = torch.full((1,), 3.0)
    assert eigenvalue(physics) == pytest.approx(9) and eigenvalue(stack) == pytest.approx(10)


@dataclass
class Box:
    __slots__ = ("held",)
    held: float


# what a physics may keep its number in: how it is put there, and how it is read
KEPT = {
    "partial": (lambda k: functools.partial(operator.mul, k), lambda kept: kept(1.0)),
    "keywords": (lambda k: functools.partial(lambda a, by: a * by, by=k), None),
    "deque": (lambda k: deque([k, 0.0]), lambda kept: kept[0]),
    "fraction": (lambda k: Fraction(k), float),
    "decimal": (lambda k: Decimal(k), float),
    "frozenset": (lambda k: frozenset([k]), lambda kept: next(iter(kept))),
    "slice": (lambda k: slice(0, k), lambda kept: kept.stop),
    "numpy scalar": (np.float64, float),
    "numpy array": (lambda k: np.array([k]), lambda kept: float(kept[0])),
    "slots": (Box, lambda kept: kept.held),
    "namespace": (lambda k: SimpleNamespace(inside={"list": [k]}), lambda kept: kept.inside["list"][0]),
    "method": (lambda k: Box(k).__eq__, lambda kept: kept.__self__.held),
    "array": (lambda k: array("d", [k]), lambda kept: kept[0]),
}


class Keeps(LinearPhysics):
    read, kept = None, None

    def A(self, x, **_):
        return self.read(self.kept) * x

    def A_adjoint(self, y, **_):
        return self.A(y)


@pytest.mark.parametrize("name", KEPT)
def test_the_spectrum_is_measured_anew_whatever_the_number_is_kept_in(name):
    put, read = KEPT[name]
    physics, x = Keeps(), torch.rand(1, 1, 8, 8)
    Keeps.read = staticmethod(read or (lambda kept: kept(1.0)))
    for number in (1.0, 2.0, 3.0, 3.0):
        physics.kept = put(number)
        assert float(spectrum(physics, x).mean()) == pytest.approx(number**2, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1.0, 1e12, 1e18])
def test_an_operator_that_is_no_filter_is_none_at_any_scale(scale):
    mask = scale * (torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5)
    x = torch.rand(1, 1, 16, 16)
    assert spectrum(Inpainting((1, 16, 16), mask=mask.float()), x) is None
    eigenvalues = spectrum(Inpainting((1, 16, 16), mask=torch.full((1, 16, 16), scale)), x)
    torch.testing.assert_close(eigenvalues, torch.full_like(eigenvalues, scale**2), rtol=1e-4, atol=0)


def test_the_spectrum_is_not_that_of_another_physics_at_the_same_address():
    x = torch.rand(1, 1, 8, 8)
    for number in range(1, 20):
        physics = Scaled()
        physics.number = float(number)
        assert float(spectrum(physics, x).mean()) == pytest.approx(number**2, rel=1e-4)
        del physics
        gc.collect()


def test_the_spectrum_serves_all_maps_of_a_physics_and_their_parts(calls):
    mask = torch.ones(3, 1, 8, 8)
    mask[1, ..., ::2] = 0
    physics, x = MRI(mask=mask, img_size=(2, 8, 8)), torch.rand(3, 2, 8, 8)
    iteration = DEGrad(nn.Identity(), stepsize=0.25)
    f = iteration.bind(physics.A(x), physics)
    calls.clear()
    whole = f.preconditioner(x)(x)
    count = len(calls)
    assert count == 2  # the operator is circulant
    rows = torch.tensor([2, 1])
    torch.testing.assert_close(f.select(rows).preconditioner(x[rows])(x[rows]), whole[rows])
    torch.testing.assert_close(iteration.bind(physics.A(x), physics).preconditioner(x)(x), whole)
    # two evaluations of the whole batch by the check of select
    assert calls[:count] == [3] * count and len([c for c in calls[count:] if c == 3]) <= 2


@pytest.mark.parametrize("make", [blur, lambda: Inpainting((1, 16, 16), mask=(torch.rand(1, 16, 16) > 0.5).to(F64))])
def test_natural_steps_do_not_depend_on_the_stepsize(make):
    physics, x = make(), torch.rand(2, 1, 16, 16, dtype=F64)
    y = physics.A(x.flip(0))
    steps = []
    for eta in (0.1, 0.01, 1e-6):
        f = DEGrad(nn.Tanh(), stepsize=torch.tensor(eta, dtype=F64), data_weight=5.0).to(F64).bind(y, physics)
        steps.append(f.natural(x)(f.step(x)))
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], rtol=1e-12, atol=1e-13)


def test_natural_steps_of_a_sample_without_a_filter():
    mask = torch.ones(2, 1, 16, 16)
    mask[1] = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    physics, x = Inpainting((1, 16, 16), mask=mask), torch.rand(2, 1, 16, 16)
    f = DEGrad(nn.Identity(), stepsize=0.25).bind(physics.A(x), physics)
    torch.testing.assert_close(f.natural(x)(x), x * torch.tensor([2.0, 4.0]).reshape(2, 1, 1, 1))
    assert DEProx(nn.Identity()).bind(physics.A(x), physics).natural(x) is None


def test_a_stepsize_for_each_channel():
    physics, x = blur(), torch.rand(2, 3, 16, 16, dtype=F64)
    physics = BlurFFT((3, 16, 16), filter=physics.filter.float()).to(F64)
    eta = torch.tensor([0.1, 0.2, 0.4], dtype=F64).reshape(3, 1, 1)
    f = DEGrad(nn.Identity(), stepsize=eta).to(F64).bind(physics.A(x), physics)
    for c in range(3):
        one = DEGrad(nn.Identity(), stepsize=eta[c, 0, 0]).to(F64).bind(physics.A(x), physics)
        for name in ("preconditioner", "natural"):
            torch.testing.assert_close(getattr(f, name)(x)(x)[:, c], getattr(one, name)(x)(x)[:, c])
        torch.testing.assert_close(f(x)[:, c], one(x)[:, c])
