r"""Replicas of layers whose weights are computed: normalised, parametrised or pruned weights."""

from __future__ import annotations

import copy

import pytest
import torch
from deepinv.physics import Inpainting
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from deepinv_deq import DEProx, DEQReconstructor, Solver
from tests.iterations.common import net
from tests.problems import F64, assert_unrolled_gives_the_same, deq, imaging, relative_error, rng
from tests.problems import random_mask as mask


def test_normalised_weights_are_computed_once_per_pass_and_get_their_gradient():
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1)
    # normalised to 1 as a matrix, a 3x3 convolution has norm up to 3: damp it to a contraction
    damp = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    nn.init.constant_(damp.weight, 0.3)
    denoiser = nn.Sequential(parametrizations.spectral_norm(conv), nn.Tanh(), damp).to(F64)
    _, physics, _, y = imaging()
    model = DEQReconstructor(DEProx(denoiser, stepsize=0.5), solver=Solver("anderson", max_iter=300, tol=1e-12)).to(F64)
    model.hook.solver = Solver("gmres", max_iter=100, tol=1e-12)
    model.train()
    calls = []
    conv.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    loss = model(y, physics).sin().sum() + model(0.5 * y, physics).cos().sum()  # two passes: u and v move in between
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 2 and model.forward_stat.converged.all()
    ours = conv.parametrizations.weight.original.grad.clone()

    model.eval()  # no more power iterations: now autograd through the normalisation is a fair reference
    model.zero_grad()
    (model(y, physics).sin().sum() + model(0.5 * y, physics).cos().sum()).backward()
    at_rest = conv.parametrizations.weight.original.grad.clone()
    model.zero_grad()
    f, g = (model.iteration.bind(v, physics) for v in (y, 0.5 * y))
    a, b = physics.A_adjoint(y), physics.A_adjoint(0.5 * y)
    for _ in range(200):
        a, b = f(a), g(b)
    (a.sin().sum() + b.cos().sum()).backward()
    assert relative_error(at_rest, conv.parametrizations.weight.original.grad) <= 1e-8
    assert relative_error(ours, at_rest) < 0.5  # a few power iterations apart: near, though not the same weights


def test_the_cache_of_weights_leaves_no_trace():
    from torch.nn.utils import parametrize

    conv = parametrizations.weight_norm(nn.Conv2d(1, 1, 3, padding=1))
    physics = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    x = torch.rand(1, 1, 4, 4)
    f = DEProx(conv).bind(physics.A(x), physics)
    before = f(x)
    with parametrize.cached():  # a user's own cache survives ours
        inner = conv.weight
        f(x)
        assert conv.weight is inner
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(f(x), before)  # bound before the change
    assert not torch.allclose(DEProx(conv).bind(physics.A(x), physics)(x), before)


class LowRank(nn.Module):
    r"""LoRA: a frozen weight plus a trained product."""

    def __init__(self, shape, rank=2):
        super().__init__()
        n, m = shape[0], shape[1:].numel()
        self.a = nn.Parameter(torch.randn(n, rank, generator=rng(1), dtype=F64) / 20)
        self.b = nn.Parameter(torch.randn(rank, m, generator=rng(2), dtype=F64) / 20)

    def forward(self, weight):
        return weight + (self.a @ self.b).reshape(weight.shape)


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def lora(n):
    for conv in (n[0], n[2]):
        conv.weight.requires_grad_(False)
        parametrize.register_parametrization(conv, "weight", LowRank(conv.weight.shape))


def chained(n):
    parametrize.register_parametrization(n[0], "weight", LowRank(n[0].weight.shape))
    parametrize.register_parametrization(n[0], "weight", Half())
    parametrize.register_parametrization(n[0], "bias", Half())


def nested(n):
    low = LowRank(n[0].weight.shape)
    parametrize.register_parametrization(low, "a", Half())
    parametrize.register_parametrization(n[0], "weight", low)


def pruned(n):
    prune.l1_unstructured(n[0], "weight", 0.4)
    prune.random_unstructured(n[2], "bias", 1)


WEIGHTS = {
    "weight_norm": lambda n: parametrizations.weight_norm(n[0]),
    "spectral_norm": lambda n: parametrizations.spectral_norm(n[0]),
    "LoRA": lora,
    "several, in a chain": chained,
    "a parametrised parametrisation": nested,
    "old weight_norm": lambda n: nn.utils.weight_norm(n[0]),
    "old spectral_norm": lambda n: nn.utils.spectral_norm(n[0]),
    "prune": pruned,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed_get_the_gradient_of_an_unrolled_solve(name, used_before):
    n = net()
    WEIGHTS[name](n)
    with torch.no_grad():
        for _ in range(20 if "spectral" in name else 0):
            n(torch.rand(1, 1, 6, 6, dtype=F64))  # power iterations: from random vectors, the norm is far off
    if used_before:  # what an earlier use leaves on a module has a graph that is freed
        n(torch.rand(1, 1, 6, 6, dtype=F64)).sum().backward()
        n.zero_grad()
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    model = deq(DEProx(nn.Sequential(n, nn.Tanh(), Half()), stepsize=0.6)).eval()
    assert_unrolled_gives_the_same(model, physics, physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())))
    for _ in range(2):
        model(physics.A(torch.rand(2, 1, 6, 6, dtype=F64)), physics).sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["spectral_norm", "old spectral_norm"])
def test_power_iterations_are_kept_as_in_one_forward_pass(name):
    n, twin = net(), net()
    WEIGHTS[name](n)
    twin = copy.deepcopy(n)
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = physics.A(torch.rand(1, 1, 6, 6, dtype=F64))
    model = DEQReconstructor(DEProx(nn.Sequential(n, Half()), stepsize=0.5), solver=Solver(on_failure="ignore")).train()
    loss = model(y, physics).sum() + model(y, physics).sum()
    twin.train()
    for _ in range(2):
        twin(y)
    assert all(torch.equal(a, b) for a, b in zip(n.buffers(), twin.buffers(), strict=True))
    loss.backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_running_statistics_are_those_of_the_layer():
    layer = nn.BatchNorm2d(1, dtype=F64)
    _, physics, _, y = imaging()
    model = DEQReconstructor(DEProx(nn.Sequential(layer, Half())), solver=Solver(on_failure="ignore")).train()
    loss = sum(model(y, physics).sum() for _ in range(2))
    assert layer.num_batches_tracked > 2 and layer.running_mean.abs() > 0
    loss.backward()


@pytest.mark.parametrize("used", [False, True])
def test_functional_call_with_parametrised_weights(used):
    n = net()
    parametrizations.weight_norm(n[0])
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    model = deq(DEProx(nn.Sequential(n, nn.Tanh(), Half()), stepsize=0.6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    grads = torch.autograd.grad(
        torch.func.functional_call(model, given, (y, physics)).square().sum(), list(given.values())
    )
    assert relative_error(grads, exact) <= 1e-10
