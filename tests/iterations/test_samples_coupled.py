r"""Maps that couple their samples are not restricted to some of them."""

from __future__ import annotations

import dataclasses
import functools
import unittest.mock

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Inpainting
from torch import nn

from deepinv_deq import Solver
from tests.iterations.common import solve
from tests.problems import F64, SmallDenoiser, random_mask, rng


class Mixes(nn.Module):
    r"""Couples the samples behind a layer that starts at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x):
        return 0.5 * x + self.weight * x.mean(0, keepdim=True)


def test_a_coupling_that_is_invisible_at_first():
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    model = solve(1, denoiser=Mixes())
    assert model.iteration.bind(y, physics).select(slice(0, 1)) is None
    same = y[:1].expand(3, -1, -1, -1)  # where all samples are equal, the mean is invisible, too
    assert model.iteration.bind(same, physics).select(slice(0, 1)) is None


def test_a_coupling_that_is_switched_on_later():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.on = False

        def forward(self, x):
            return 0.5 * (x.mean(0, keepdim=True).expand_as(x) if self.on else x)

    physics, model = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8)), solve(1, denoiser=Switch())
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    assert model.iteration.bind(y, physics).select(slice(0, 1)) is not None
    model.iteration.denoiser.on = True
    assert model.iteration.bind(y, physics).select(slice(0, 1)) is None


class Function(nn.Module):
    r"""A function of the samples behind a denoiser."""

    def __init__(self, function, channels=3, **inside):
        super().__init__()
        self.net, self.function, self.inside = SmallDenoiser(channels=channels), function, inside

    def forward(self, x):
        return self.function(self.net(x), **self.inside)


def by_row(x, *factors):
    return x * torch.tensor(factors, dtype=x.dtype)[: len(x)].reshape(-1, 1, 1, 1)


COUPLED = {
    "the last sample is treated in another way": lambda x: torch.cat([x[:-1], 0.5 * x[-1:]]) if len(x) > 1 else x,
    "the third of three": lambda x: torch.cat([x[:2], 0.5 * x[2:]]),
    "a table that hides it in the middle": lambda x: by_row(x, 0.9, 0.9, 0.3),
    "by less than rounding": lambda x: x + 1e-13 * x.mean(0, keepdim=True),
    "with a weight of zero": lambda x: x + 0.0 * x.flip(0),
    "only for large values": lambda x: x / x.abs().max() if x.abs().max() > 1e6 else x,
    "only for large values, by where": lambda x: torch.where(x.abs().max() > 1e6, x / x.abs().max(), x),
    "the next sample": lambda x: x + 0.1 * torch.cat([x[1:], torch.zeros_like(x[:1])]),
    "in another library": lambda x: torch.from_numpy(x.detach().numpy() - 1e-12 * x.detach().numpy().mean(0)),
    "by rounding to integers": lambda x: x + 0.1 * (x.mean() / 1e6).to(torch.int).to(x.dtype),
    "in lists": lambda x: x + 1e-13 * torch.tensor(sum(x.sum((1, 2, 3)).tolist()), dtype=x.dtype),
    "batches of two samples": lambda x: x.flip(0) if len(x) == 2 else x,
}


def bound(denoiser, model=None):
    y = torch.rand(3, 3, 8, 8, dtype=F64, generator=rng())
    f = (model or solve(1, denoiser=denoiser)).iteration.bind(y, dinv.physics.Denoising())
    f(y)
    return f


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_are_not_independent_are_not_restricted(name):
    f = bound(Function(COUPLED[name]))
    assert f.select(slice(1, 3)) is None and (f.select(slice(0, 1)) is None or "two" in name)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), torch.tensor([True, False, True])])
def test_independent_samples_are_restricted(rows):
    functions = (torch.tanh, nn.GroupNorm(1, 3).to(F64), nn.MaxPool2d(3, 1, 1), lambda x: nn.functional.pad(x, 4 * [0]))
    for function in functions:
        f, x = bound(Function(function)), torch.rand(3, 3, 8, 8, dtype=F64, generator=rng(2))
        torch.testing.assert_close(f.select(rows)(x[rows]), f(x)[rows])


@pytest.mark.parametrize("coupled", [False, True])
def test_compiled_denoisers_are_watched_without_compiled_code(coupled):
    torch.compiler.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    function = COUPLED["by less than rounding"] if coupled else torch.tanh
    f = bound(torch.compile(Function(function), backend=backend))
    count = len(compiled)
    assert (f.select(slice(0, 1)) is None) is coupled and len(compiled) == count > 0


def couple(x, on=True):
    return x - 0.3 * x.mean(0, keepdim=True) if on else x


ON = False


KINDS = "number function partial hook static global nested gate filled index buffer".split() + ["method of the class"]


@pytest.mark.parametrize("what", KINDS)
def test_a_verdict_does_not_outlive_what_it_was_made_of(what, monkeypatch):
    kind = type("Own", (Function,), {})
    denoiser = kind(lambda x, on: couple(x, on), on=False)
    if what == "partial":
        denoiser = kind(functools.partial(couple, on=False))
    if what in ("index", "buffer"):  # longer than the batch; equal at every place at first
        denoiser = kind(lambda x, table, i: x * table[i[: len(x)]].reshape(-1, 1, 1, 1))
        denoiser.inside = {"table": torch.ones(5, dtype=F64), "i": torch.zeros(5, dtype=torch.long)}
        if what == "buffer":
            denoiser.inside["i"] = torch.arange(5)
    if what == "static":
        kind.of = staticmethod(lambda x: x)
        kind.forward = lambda self, x: self.of(self.net(x))
    if what == "global":
        kind.forward = lambda self, x: couple(self.net(x), ON)
    if what == "nested":  # the global variable is named in an inner function only
        kind.forward = lambda self, x: (lambda t: couple(t, ON))(self.net(x))
    if what == "filled":
        denoiser = kind(lambda x, gate: x.masked_fill((gate > 0).expand(x.shape), x.mean()))
    if what == "gate":
        denoiser = kind(lambda x, gate: torch.where(gate > 0, couple(x), x))
    if what in ("gate", "filled"):
        denoiser.register_buffer("gate", torch.tensor(-1.0, dtype=F64))
        denoiser.forward = lambda x: denoiser.function(denoiser.net(x), denoiser.gate)
    model = solve(1, denoiser=denoiser)  # which keeps the verdicts
    restricted = bound(denoiser, model).select(slice(0, 1)) is not None
    assert restricted is (what not in ("buffer", "gate", "filled"))  # a gate may open later
    if what == "number":
        denoiser.inside["on"] = True
    elif what == "function":
        denoiser.function = lambda x, on: couple(x, not on)
    elif what == "partial":
        denoiser.function = functools.partial(couple, on=True)
    elif what == "hook":
        denoiser.register_forward_hook(lambda m, i, out: couple(out))
    elif what == "method of the class":
        kind.forward = lambda self, x: couple(x)
    elif what == "static":
        kind.of = staticmethod(couple)
    elif what in ("global", "nested"):
        monkeypatch.setitem(globals(), "ON", True)
    elif what == "index":
        denoiser.inside["i"] = torch.arange(5)
    assert bound(denoiser, model).select(slice(0, 1)) is None


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_see_the_images_of_the_solve_only(everywhere):
    model, seen = solve(1, denoiser=SmallDenoiser(channels=3)), []

    def record(module, args, out):
        seen.append((len(out), bool(torch.isfinite(out).all())))

    register = nn.modules.module.register_module_forward_hook if everywhere else None
    handle = (register or model.iteration.denoiser.register_forward_hook)(record)
    try:
        assert bound(model.iteration.denoiser, model).select(slice(0, 1)) is None
    finally:
        handle.remove()
    assert set(seen) == {(3, True)}
    assert bound(model.iteration.denoiser, model).select(slice(0, 1)) is not None


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter"])
def test_samples_that_are_coupled_have_not_converged_before_the_others(method):
    images = torch.rand(3, 4, dtype=F64, generator=rng()) * torch.tensor([[1.0], [10.0], [100.0]], dtype=F64)

    def f(x, weight):
        return 0.5 * torch.tanh(x) + weight * x.mean(0, keepdim=True) + images

    solver = Solver(method, tol=1e-3, max_iter=500, on_failure="ignore")
    x, stat = solver(lambda x: f(x, 0.45), images)
    residual = (f(x, 0.45) - x).norm(dim=1) / x.norm(dim=1)
    torch.testing.assert_close(stat.residual[stat["coupled"]], residual[stat["coupled"]])
    assert bool((residual[stat.converged] <= 2e-3).all())
    if bool(stat["coupled"].any()):
        assert "couples the samples of the batch" in stat.outcome and "batched=False" in stat.outcome
    alone, stat = solver(lambda x: f(x, 0.0), images)
    assert bool(stat.converged.all()) and not bool(stat["coupled"].any())
    joint, stat = dataclasses.replace(solver, batched=False)(lambda x: f(x, 0.45), images)
    assert bool(stat.converged.all()) and bool(((f(joint, 0.45) - joint).norm() <= 1e-3 * joint.norm()))


def test_attributes_of_a_class_that_answer_every_name_are_no_methods():
    kind = type("Logs", (Function,), {"log": unittest.mock.MagicMock()})
    assert bound(kind(torch.tanh)).select(slice(0, 1)) is not None
