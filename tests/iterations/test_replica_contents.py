r"""Replicas copy all containers, objects and functions in which a module keeps tensors."""

from __future__ import annotations

import copy
import enum
import functools

import pytest
import torch
from deepinv.physics import Inpainting, LinearPhysics
from torch import nn

from deepinv_deq import DEProx
from deepinv_deq.iterations.replica import Replica
from tests.iterations.contents import GAIN, Plain, gradients
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq, relative_error, rng
from tests.problems import random_mask as mask


@pytest.mark.parametrize("where", ["physics", "denoiser"])
@pytest.mark.parametrize("kind", GAIN)
def test_whatever_a_module_keeps_is_that_of_the_forward_pass(kind, where):
    exact = gradients(where, kind)
    assert sum(float(g.abs().sum()) for g in exact) > 0
    other = torch.tensor(0.1, dtype=F64)
    for ours, theirs in zip(gradients(where, kind, lambda m: m.put(m, other)), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


CONTENTS = {
    "deque": lambda m: m.gain.append(m.gain.popleft() * 0.1),
    "UserDict": lambda m: m.gain.update(a=0.1),
    "object with __new__": lambda m: setattr(m.gain, "inside", 0.1),
    "context manager": lambda m: setattr(m.gain, "inside", 0.1),
    "attribute of a tuple": lambda m: setattr(m.gain, "inside", 0.1),
    "weak reference": lambda m: setattr(m.child, "gain", 0.1),
    "closure": lambda m: m.gain.change(0.1),
    "attribute of a function": lambda m: setattr(m.gain, "inside", 0.1),
    "attribute of the class": lambda m: setattr(type(m), "gain", 0.1),
    "array of objects": lambda m: setattr(m.gain[0], "gain", 0.1),
    "list": lambda m: m.gain.__setitem__(0, 0.1),
    "dictionary": lambda m: m.gain.__setitem__("a", 0.1),
    "nested": lambda m: m.gain["a"][0].__setitem__("b", (0.1,)),
    "plain object": lambda m: setattr(m.gain.inside, "t", 0.1),
    "namespace": lambda m: setattr(m.gain, "t", 0.1),
    "slots": lambda m: setattr(m.gain, "inside", 0.1),
    "module in a list": lambda m: setattr(m.gain[0], "gain", 0.1),
    "number in a list": lambda m: m.gain.append(m.gain.pop() * 0.1),
    "array": lambda m: m.gain.__imul__(0.1),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_the_contents_of_containers_are_those_of_the_forward_pass(kind):
    exact = gradients("physics", kind)
    for ours, theirs in zip(gradients("physics", kind, CONTENTS[kind]), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


class Kind(enum.Enum):
    A = 1


class InSlots(SmallDenoiser):
    __slots__ = ("gain", "__hidden")

    def __init__(self):
        super().__init__()
        self.gain, self.__hidden = 0.5, 1.0

    def forward(self, x):
        return self.gain * self.__hidden * super().forward(x)


def test_slots_of_a_module_are_private():
    model = deq(DEProx(InSlots(), stepsize=0.6))
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    assert_unrolled_gives_the_same(model, physics, y)
    weight = model.iteration.denoiser.conv.weight
    exact = torch.autograd.grad(model(y, physics).square().sum(), weight)[0]
    loss = model(y, physics).square().sum()
    model.iteration.denoiser.gain = 0.1
    assert relative_error(torch.autograd.grad(loss, weight)[0], exact) <= 1e-10


def test_a_forward_that_calls_the_one_it_replaces():
    net = SmallDenoiser()
    before = net.forward
    net.forward = lambda x: 0.5 * before(x)
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    model = deq(DEProx(net, stepsize=0.6))
    assert_unrolled_gives_the_same(model, physics, y)
    exact = torch.autograd.grad(model(y, physics).square().sum(), net.conv.weight)[0]
    loss = model(y, physics).square().sum()
    net.scale = 0.1
    assert relative_error(torch.autograd.grad(loss, net.conv.weight)[0], exact) <= 1e-10


def test_functions_that_call_themselves_or_share_a_variable():
    count = 0

    def up():
        nonlocal count
        count += 1
        return up if count < 3 else get

    def get():
        return count

    twin = Replica([Plain(up=up, get=get)]).roots[0]
    assert twin.up is not up and twin.up()()() is twin.get and twin.get() == 3 and count == 0


def test_members_of_an_enumeration_are_themselves():
    assert Replica([Plain(kind=Kind.A, sentinel=object)]).roots[0].kind is Kind.A


class Optional:
    post = gain = None

    def adjoint(self, y):
        y = y if self.post is None else self.post(y)
        return y if self.gain is None else y * self.gain


class WithMethod(Optional):
    def post(self, x):
        return 0.5 * x

    @functools.cached_property
    def gain(self):
        return torch.tensor(3.0, dtype=F64)


class Operator(LinearPhysics, WithMethod):
    def A(self, x, **_):
        return self.adjoint(x)

    def A_adjoint(self, y, **_):
        return self.adjoint(y)


class Network(WithMethod, nn.Module):
    def forward(self, x):
        return self.adjoint(x)


def test_a_method_takes_the_place_of_data_of_a_base_class():
    x = torch.ones(1, 1, 2, 2, dtype=F64)
    for where in (Operator(), Network(), WithMethod()):
        assert torch.equal(Replica([where]).roots[0].adjoint(x), 1.5 * x)
    iteration = DEProx(Network(), stepsize=0.5).double()
    torch.testing.assert_close(iteration.bind(x, Operator())(x), 1.5 * (x - 0.5 * (1.5**2 * x - 1.5 * x)))


def test_a_cached_method_of_a_class_acts_on_the_object_that_calls_it():
    class Scaled(LinearPhysics):
        @functools.lru_cache(maxsize=4)  # noqa: B019
        def gain(self):
            return float(self.size)

        def A(self, x, **_):
            twin = copy.copy(self)
            twin.size = 2 * self.size
            return (twin.gain() + self.gain()) * x

    physics, x = Scaled(), torch.ones(1, 1, 2, 2)
    physics.size = 0.5
    assert torch.equal(Replica([physics]).roots[0].A(x), physics.A(x)) and torch.equal(physics.A(x), 1.5 * x)
