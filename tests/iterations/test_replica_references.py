r"""What user objects refer to in unusual ways is private, too: keys, bound methods, weak proxies, factories, finalisers."""

from __future__ import annotations

import argparse
import gc
import weakref
from collections import OrderedDict, defaultdict

import pytest
import torch
from deepinv.physics import Denoising, LinearPhysics
from torch import nn

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, Solver
from deepinv_deq.iterations.replica import Replica
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq, relative_error, rng


class Gain(LinearPhysics):
    r"""Multiplies by what ``read`` finds in the object that ``make`` returns."""

    def __init__(self, make, read):
        super().__init__()
        self.read, self.gain = read, 0.6
        self.kept = make(self)

    def A(self, x, **_):
        return self.read(self) * x

    A_adjoint = A


class Frozen(list):
    def __setitem__(self, *_):
        raise TypeError("this list is frozen")


KINDS = {
    "argparse.Namespace": (
        lambda m: argparse.Namespace(gain=0.6),
        lambda m: m.kept.gain,
        lambda m: setattr(m.kept, "gain", 0.9),
    ),
    "method of a dictionary": (
        lambda m: {"gain": 0.6}.get,
        lambda m: m.kept("gain"),
        lambda m: m.kept.__self__.update(gain=0.9),
    ),
    "proxy": (weakref.proxy, lambda m: m.kept.gain, lambda m: setattr(m, "gain", 0.9)),
    "WeakMethod": (lambda m: weakref.WeakMethod(m.number), lambda m: m.kept()(), lambda m: setattr(m, "gain", 0.9)),
    "factory": (
        lambda m: defaultdict(lambda: m.gain),
        lambda m: m.kept[object()],
        lambda m: setattr(m, "gain", 0.9),
    ),
    "list that refuses": (lambda m: Frozen([[0.6]]), lambda m: m.kept[0][0], lambda m: m.kept[0].__setitem__(0, 0.9)),
    "distribution": (
        lambda m: torch.distributions.Normal(torch.tensor(0.6, dtype=F64), 1.0),
        lambda m: m.kept.mean,
        lambda m: setattr(m.kept, "loc", torch.tensor(0.9, dtype=F64)),
    ),
}
Gain.number = lambda self: self.gain


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_before_backward_does_not_change_the_gradient(kind):
    make, read, change = KINDS[kind]
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    model = deq(DEProx(SmallDenoiser(), stepsize=0.7))
    weights = list(model.parameters())
    exact = torch.autograd.grad(model(y, Gain(make, read)).square().sum(), weights)
    physics = Gain(make, read)
    loss = model(y, physics).square().sum()
    change(physics)
    assert relative_error(torch.autograd.grad(loss, weights), exact) <= 1e-10
    assert relative_error(torch.autograd.grad(model(y, physics).square().sum(), weights), exact) > 1e-3


class KeyedByLayers(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b = SmallDenoiser(0.5), SmallDenoiser(0.4, seed=1)
        self.gains = kind([(self.a, 0.9), (self.b, 0.8)])

    def forward(self, x):
        for layer in list(self.gains):
            x = layer(x) * self.gains.get(layer, 0.0)
        return x


@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda pairs: defaultdict(float, pairs)])
def test_dictionaries_keyed_by_layers(kind):
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    assert_unrolled_gives_the_same(deq(DEProx(KeyedByLayers(kind), stepsize=0.6)), Denoising(), y)


def test_dropping_a_replica_runs_no_finaliser():
    class Plan(Denoising):
        freed = 0

        def __del__(self):
            Plan.freed += 1

    plan = Plan()
    twin = Replica([plan]).roots[0]
    assert isinstance(twin, Plan) and type(twin).__name__ == "Plan" and type(Replica([plan]).roots[0]) is type(twin)
    del twin
    model = deq(DEProx(SmallDenoiser(), stepsize=0.6))
    model(torch.rand(1, 1, 6, 6, dtype=F64), plan).sum().backward()
    gc.collect()
    assert Plan.freed == 0
    del plan
    gc.collect()
    assert Plan.freed == 1


@pytest.mark.parametrize("where", ["namespace", "closure"])
def test_a_coupling_of_samples_that_is_switched_on_later_is_noticed(where):
    coupled = False

    class Net(SmallDenoiser):
        def __init__(self):
            super().__init__()
            self.options = argparse.Namespace(couple=False)

        def forward(self, x):
            couple = self.options.couple if where == "namespace" else coupled
            return super().forward(x) + (0.1 * torch.tanh(x.mean(0, keepdim=True)) if couple else 0)

    y = torch.rand(3, 1, 6, 6, dtype=F64, generator=rng())
    model = DEQReconstructor(DEProx(Net(), stepsize=0.6).to(F64), solver=Solver(tol=1e-12, chunk_size=1, max_iter=300))
    with torch.no_grad():
        model(y, Denoising())
        model.iteration.denoiser.options.couple = coupled = True
        x_hat, x = model(y, Denoising()), y
        for _ in range(200):
            x = model.iteration(x, Denoising(), y)
    assert relative_error(x_hat, x) <= 1e-9


def test_a_physics_to_which_its_parts_refer_is_freed():
    class Handle:
        def __init__(self, owner):
            self.owner = owner

        def __del__(self):
            pass

    model = deq(DEGrad(SmallDenoiser(), stepsize=0.5))
    alive = []
    for _ in range(3):
        physics = Gain(Handle, lambda m: m.gain)
        alive.append(weakref.ref(physics))
        model(torch.rand(1, 1, 6, 6, dtype=F64), physics)
        del physics
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_measurements_whose_memory_is_used_again():
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    model = deq(DEProx(SmallDenoiser(), stepsize=0.6))
    weights = list(model.parameters())
    exact = torch.autograd.grad(model(y, Denoising()).square().sum(), weights)
    loss = model(y, Denoising()).square().sum()
    y.numpy()[:] = 0  # which no version counter tells
    assert relative_error(torch.autograd.grad(loss, weights), exact) <= 1e-12


def test_a_number_on_which_the_shape_of_measurements_depends():
    class Views(LinearPhysics):
        views = 1

        def A(self, x, **_):
            return x.repeat(1, self.views, 1, 1)

        def A_adjoint(self, y, **_):
            return y.reshape(len(y), -1, 1, *y.shape[2:]).sum(1)

    physics, y = Views(), torch.rand(1, 1, 6, 6, dtype=F64)
    model = deq(DEProx(SmallDenoiser(), stepsize=0.2))
    model(y, physics)
    physics.views = 3
    with pytest.raises(ValueError, match="do not fit Views"):
        model(y, physics)
