r"""Hooks that keep feature maps for the module that reads them, and hooks that record for the user."""

from __future__ import annotations

import functools

import pytest
import torch
from deepinv.physics import Inpainting
from torch import nn

from deepinv_deq import DEProx
from tests.problems import F64, deq, random_mask, relative_error, rng


class Skip(nn.Module):
    r"""Decodes what its encoder gave."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = (nn.Conv2d(*sizes, 3, padding=1, dtype=F64) for sizes in ((1, 2), (2, 1)))
        for p in self.parameters():
            p.data.mul_(0.5)
        self.watch()

    def watch(self):
        pass

    def features(self, x):
        return self.encoder(x)

    def forward(self, x, *_):
        return self.decoder(torch.tanh(self.features(x)))


class Hooked(Skip):
    def features(self, x):
        self.encoder(x)
        return self.kept["features"]


class Closure(Hooked):
    def watch(self):
        self.kept = {}
        self.encoder.register_forward_hook(lambda m, i, out: self.kept.__setitem__("features", out))


class LocalDictionary(Hooked):
    def watch(self):
        kept = self.kept = {}

        def keep(module, inputs, out, name="features"):
            kept[name] = out

        self.encoder.register_forward_hook(keep)


class Partial(Hooked):
    def watch(self):
        self.kept = {}
        self.encoder.register_forward_hook(functools.partial(Partial.keep, self.kept))

    @staticmethod
    def keep(kept, module, inputs, out):
        kept["features"] = out


class BoundPartial(Hooked):
    def watch(self):
        self.kept = {}
        self.encoder.register_forward_hook(functools.partial(self.keep, "features"))

    def keep(self, name, module, inputs, out):
        self.kept[name] = out


class Keeper:
    def __init__(self):
        self.kept = {}

    def __call__(self, module, inputs, out):
        self.kept["features"] = out


class Recorder:
    r"""Looks at the activations of a network to which it refers."""

    def __init__(self, network):
        self.network, self.calls = network, 0

    def __call__(self, module, inputs, out):
        self.calls += 1

    def save(self, module, inputs, out):
        self.last = out


class OwnObject(Hooked):
    def watch(self):
        self.keeper = Keeper()
        self.encoder.register_forward_hook(self.keeper)

    @property
    def kept(self):
        return self.keeper.kept


class BeforeTheEncoder(Skip):
    def watch(self):
        self.kept = [None]
        self.register_forward_pre_hook(lambda m, inputs: self.kept.__setitem__(0, inputs[0]))

    def features(self, x):
        return self.encoder(self.kept[0])


class Scaled(Skip):
    r"""A hook that multiplies by a parameter of the module, and a plain module that does the same."""

    def watch(self):
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def features(self, x):
        return self.gain * self.encoder(x)


class ScaledByHook(Scaled):
    def watch(self):
        super().watch()
        self.encoder.register_forward_hook(lambda m, i, out: self.gain * out)

    def features(self, x):
        return self.encoder(x)


def solve(network, called):
    physics = Inpainting((1, 6, 6), mask=random_mask(1, 6, 6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng(1)))
    if called:  # with a graph of its own
        network(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng(2))).sum().backward()
        network.zero_grad(set_to_none=True)
    model, results = deq(DEProx(network, stepsize=0.7)), []
    for _ in range(2):
        x = model(y, physics)
        results.append([x.detach(), *torch.autograd.grad(x.square().sum(), list(network.parameters()))])
    return results


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "kind",
    [Closure, LocalDictionary, Partial, BoundPartial, OwnObject, BeforeTheEncoder, ScaledByHook],
)
def test_what_a_hook_keeps_is_read_by_the_module_of_the_same_map(kind, called):
    plain = Scaled if kind is ScaledByHook else Skip
    expected = solve(plain(), False)[0]
    for found in solve(kind(), called):
        assert max(map(relative_error, found, expected)) < 1e-9


def test_what_a_hook_records_for_the_user_reaches_the_user():
    network, seen, count = Closure(), [], 0

    def record(module, inputs, out):
        nonlocal count
        count += 1
        seen.append((module, network.training))  # refers to the network, too

    network.encoder.register_forward_hook(record)
    recorder = Recorder(network)
    network.encoder.register_forward_hook(recorder)
    network.encoder.register_forward_hook(recorder.save)
    store = {"network": network, "kept": network.kept, "weight": network.encoder.weight}
    network.encoder.register_forward_hook(lambda m, i, out: store.update(last=out))
    solve(network, False)
    assert count == len(seen) == recorder.calls > 10 and recorder.last.shape == (2, 2, 6, 6)
    assert recorder.network is network and not network.kept and store["last"].shape == (2, 2, 6, 6)
