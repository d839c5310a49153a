r"""Evaluations that write where the map does not read: an error, and not another fixed point."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from deepinv.physics import Inpainting
from torch import nn

from deepinv_deq import DEGrad, DEProx
from tests.problems import F64, deq, random_mask

BANK = {}


class Encoder(nn.Module):
    def forward(self, x):
        BANK["features"] = 0.5 * x


class GlobalDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.bank = Encoder(), BANK

    def forward(self, x, *_):
        self.encoder(x)
        return torch.tanh(self.bank["features"])


class ClassDictionary(nn.Module):
    kept = {}  # noqa: RUF012

    def forward(self, x, *_):
        type(self).kept["features"] = 0.5 * x
        return torch.tanh(self.kept["features"])


class ClassAttribute(nn.Module):
    last = torch.zeros(1, dtype=F64)

    def forward(self, x, *_):
        type(self).last = 0.5 * x
        return torch.tanh(self.last)


def closure_of_a_method():
    kept = [torch.zeros(1, dtype=F64)]

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = kept

        def forward(self, x, *_):
            kept[0] = 0.5 * x
            return torch.tanh(self.kept[0])

    return Closure()


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept, self.layer = {}, nn.Tanh()
        self.layer.register_forward_hook(lambda m, i, out: self.kept.__setitem__("features", out))

    def forward(self, x, *_):
        self.layer(0.5 * x)
        return self.kept["features"]


NORMS = []


class Recorder:
    def also(self, network):
        self.network = network
        return self.save

    def save(self, module, inputs, out):
        self.network.last = out


def hook_of_an_object():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.layer = torch.zeros(1, dtype=F64), nn.Tanh()
            self.layer.register_forward_hook(Recorder().also(self))

        def forward(self, x, *_):
            self.layer(0.5 * x)
            return self.last

    return Reads()


class Recording(nn.Module):
    r"""Counts, records and caches where it does not read, or what is the same in each evaluation."""

    calls, counts, norms, grid = 0, Counter(), [], None

    def __init__(self):
        super().__init__()
        self.history, self.kept, self.layer = NORMS, {}, nn.Tanh()
        self.layer.register_forward_hook(Recorder().also(self))

    def forward(self, x, *_):
        type(self).calls += 1
        type(self).counts["forward"] += 1
        type(self).norms.append(x.norm())
        NORMS.append(x.norm())
        if Recording.grid is None:
            Recording.grid = torch.linspace(0.4, 0.5, x.shape[-1], dtype=x.dtype)
        return self.layer(self.grid_of_class() * x)

    @classmethod
    def grid_of_class(cls):
        return cls.grid


def problem(network, template=DEProx):
    physics = Inpainting((1, 6, 6), mask=random_mask(1, 6, 6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64))
    return deq(template(network, stepsize=0.7)), y, physics


@pytest.mark.parametrize("template", [DEGrad, DEProx])
@pytest.mark.parametrize(
    "make", [GlobalDictionary, ClassDictionary, ClassAttribute, closure_of_a_method, hook_of_an_object]
)
def test_a_write_to_what_is_read_as_an_attribute_is_an_error(make, template):
    network = make()
    network(torch.zeros(2, 1, 6, 6, dtype=F64))  # else there may be nothing to read
    model, y, physics = problem(network, template)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match="keep the object in one place only"):
            model(y, physics)


def test_records_counters_and_caches_are_no_error():
    network = Recording()
    model, y, physics = problem(network)
    for _ in range(2):
        with torch.no_grad():
            model(y, physics)
    assert model.forward_stat.converged.all() and min(Recording.calls, Recording.counts["forward"], len(NORMS)) > 3
    assert network.last.shape == y.shape


def test_a_map_does_not_keep_the_users_objects():
    network = Recording()
    model, y, physics = problem(network)
    with torch.no_grad():
        model(y, physics)
    x = model(y, physics)
    of = weakref.ref(physics)
    del physics
    assert of() is None and x.requires_grad is False


def test_the_network_may_be_called_by_the_user_between_binding_and_solving():
    network = Hooked()
    model, y, physics = problem(network)
    with torch.no_grad():
        model(y, physics, init=lambda y, physics: network(physics.A_adjoint(y)))
    assert model.forward_stat.converged.all()
