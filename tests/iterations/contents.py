r"""The ways in which a module of a user can keep a tensor or a number."""

from __future__ import annotations

import functools
import types
import weakref
from collections import ChainMap, UserDict, deque, namedtuple

import numpy as np
import torch
from deepinv.physics import Inpainting, LinearPhysics
from deepinv.utils import TensorList
from torch import nn

from deepinv_deq import DEProx
from tests.problems import F64, SmallDenoiser, deq, rng
from tests.problems import random_mask as mask

Pair = namedtuple("Pair", "one two")


class Plain:
    def __init__(self, **inside):
        self.__dict__.update(inside)


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside):
        self.inside = inside


class Made:
    r"""Cannot be made without an argument, and drops everything when it is pickled or copied."""

    def __new__(cls, _):
        return super().__new__(cls)

    def __init__(self, inside):
        self.inside = inside

    def __getstate__(self):
        return {}


class Block:
    def __init__(self, inside):
        self.inside = inside

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Row(tuple):
    pass


class Table(dict):
    pass


def with_attribute(container, t):
    container.inside = t
    return container


def refers_to(m, t):
    m.child = Holder(t)
    m.gain = weakref.ref(m.child)


def closure(t):
    inside = [t]

    def change(value):
        nonlocal t
        t = inside[0] = value

    return Plain(get=lambda: t, first=lambda: inside[0], change=change)


def defaults(t):
    def get(gain=t, *, again=(t,)):
        return 0.5 * (gain + again[0])

    return get


def behind_a_cache(m, t):
    m.inside = t
    if "gain" in vars(m):
        m.gain.cache_clear()
    else:
        m.gain = functools.lru_cache(None)(lambda: m.inside)


def on_the_class(m, t):
    if "gain" in vars(type(m)):
        type(m).gain = t
    else:
        m.__class__ = type("WithGain", (type(m),), {"gain": t})


GAIN = {
    "deque": (lambda m, t: setattr(m, "gain", deque([t], maxlen=2)), lambda m: m.gain[0]),
    "set": (lambda m, t: setattr(m, "gain", {t}), lambda m: max(m.gain)),
    "frozen set": (lambda m, t: setattr(m, "gain", frozenset({t})), lambda m: max(m.gain)),
    "UserDict": (lambda m, t: setattr(m, "gain", UserDict(a=t)), lambda m: m.gain["a"]),
    "ChainMap": (lambda m, t: setattr(m, "gain", ChainMap({}, {"a": t})), lambda m: m.gain["a"]),
    "read-only dictionary": (
        lambda m, t: setattr(m, "gain", types.MappingProxyType({"a": t})),
        lambda m: m.gain["a"],
    ),
    "object with __new__": (lambda m, t: setattr(m, "gain", Made(t)), lambda m: m.gain.inside),
    "context manager": (lambda m, t: setattr(m, "gain", Block(t)), lambda m: m.gain.inside),
    "attribute of a tuple": (lambda m, t: setattr(m, "gain", with_attribute(Row(), t)), lambda m: m.gain.inside),
    "attribute of a dictionary": (lambda m, t: setattr(m, "gain", with_attribute(Table(), t)), lambda m: m.gain.inside),
    "weak reference": (refers_to, lambda m: m.gain().gain),
    "closure": (lambda m, t: setattr(m, "gain", closure(t)), lambda m: 0.5 * (m.gain.get() + m.gain.first())),
    "default values": (lambda m, t: setattr(m, "gain", defaults(t)), lambda m: m.gain()),
    "attribute of a function": (
        lambda m, t: setattr(m, "gain", with_attribute(lambda: None, t)),
        lambda m: m.gain.inside,
    ),
    "attribute of the class": (on_the_class, lambda m: m.gain),
    "array of objects": (lambda m, t: setattr(m, "gain", np.array([Holder(t)])), lambda m: m.gain[0].gain),
    "attribute": (lambda m, t: setattr(m, "gain", t), lambda m: m.gain),
    "list": (lambda m, t: setattr(m, "gain", [t]), lambda m: m.gain[0]),
    "tuple": (lambda m, t: setattr(m, "gain", (1, t)), lambda m: m.gain[1]),
    "named tuple": (lambda m, t: setattr(m, "gain", Pair(t, 1)), lambda m: m.gain.one),
    "dictionary": (lambda m, t: setattr(m, "gain", {"a": t}), lambda m: m.gain["a"]),
    "nested": (lambda m, t: setattr(m, "gain", {"a": [{"b": (t,)}]}), lambda m: m.gain["a"][0]["b"][0]),
    "TensorList": (lambda m, t: setattr(m, "gain", TensorList([t])), lambda m: m.gain[0]),
    "plain object": (lambda m, t: setattr(m, "gain", Plain(inside=Plain(t=t))), lambda m: m.gain.inside.t),
    "namespace": (lambda m, t: setattr(m, "gain", types.SimpleNamespace(t=t)), lambda m: m.gain.t),
    "slots": (lambda m, t: setattr(m, "gain", Slotted(t)), lambda m: m.gain.inside),
    "partial": (lambda m, t: setattr(m, "gain", functools.partial(torch.mul, t)), lambda m: m.gain(torch.ones(()))),
    "cached function": (behind_a_cache, lambda m: m.gain()),
    "parameter": (lambda m, t: setattr(m, "gain", nn.Parameter(t.detach())), lambda m: m.gain),
    "parameter list": (lambda m, t: setattr(m, "gain", nn.ParameterList([t.detach()])), lambda m: m.gain[0]),
    "parameter dictionary": (
        lambda m, t: setattr(m, "gain", nn.ParameterDict({"a": t.detach()})),
        lambda m: m.gain["a"],
    ),
    "module in a list": (lambda m, t: setattr(m, "gain", [Holder(t)]), lambda m: m.gain[0].gain),
    "module in an object": (lambda m, t: setattr(m, "gain", Plain(h=Holder(t))), lambda m: m.gain.h.gain),
    "number": (lambda m, t: setattr(m, "gain", float(t.detach())), lambda m: m.gain),
    "number in a list": (lambda m, t: setattr(m, "gain", [float(t.detach())]), lambda m: m.gain[0]),
    "array": (lambda m, t: setattr(m, "gain", t.detach().numpy().copy()), lambda m: float(m.gain)),
}


class Holder(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.gain = t


class Gain(LinearPhysics):
    r"""A multiple of the identity, which it keeps in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        self.put, self.get = GAIN[kind]

    def A(self, x, **_):
        return self.get(self) * x

    def A_adjoint(self, y, **_):
        return self.get(self) * y


class Scaled(SmallDenoiser):
    r"""A denoiser times a number that it keeps in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        self.put, self.get = GAIN[kind]

    def forward(self, x):
        return self.get(self) * super().forward(x)


def gradients(where, kind, between=None):
    r"""Gradients of all that is trained, after the gain was given another value between forward and backward."""
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)
    owner = Gain(kind) if where == "physics" else Scaled(kind)
    owner.put(owner, t)
    model = deq(DEProx(owner if where == "denoiser" else SmallDenoiser(), stepsize=0.6).to(F64))
    physics = owner if where == "physics" else Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    trained = [t, *model.parameters(), *physics.parameters()]

    if between is None:  # unrolled
        x = torch.zeros_like(y)
        for _ in range(150):
            x = model.iteration(x, physics, physics.A_adjoint(y))
    else:
        x = model(y, physics)
        between(owner)
    return torch.autograd.grad(x.square().sum(), trained, materialize_grads=True)
