r"""Replicas with the tools of PyTorch: copies, functional_call, torch.compile and TorchScript."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from deepinv.physics import Inpainting
from torch import nn

from deepinv_deq import DEProx
from tests.iterations.common import net
from tests.problems import F64, deq, imaging, relative_error, rng
from tests.problems import random_mask as mask


def test_copies_made_during_a_solve():
    model, physics, _, y = imaging()
    expected = model(y, physics)
    copies = []

    def hook(*_):
        if not copies:
            copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])

    # the hook is not in the copies: functions defined in a test cannot be pickled
    f = model.iteration.bind(y, physics)
    f(model.iteration.init(y, physics))
    copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert torch.equal(twin(y, physics), expected)


def test_functional_call_gives_the_gradient_of_the_given_weights():
    model, physics, _, y = imaging()
    given = {name: (1.1 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    x = torch.func.functional_call(model, given, (y, physics))
    grads = torch.autograd.grad(x.square().sum(), list(given.values()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(given[name])
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    assert relative_error(grads, exact) <= 1e-10


@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_a_compiled_denoiser_is_private_too(how):
    model, physics, _, y = imaging()
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    denoiser = model.iteration.denoiser
    if how == "method":
        denoiser.compile(backend=backend)
    else:
        model.iteration.denoiser = torch.compile(denoiser, backend=backend)
    x = model(y, physics)
    denoiser.scale, kept = 0.1, denoiser.scale
    grads = torch.autograd.grad(x.square().sum(), list(model.parameters()))
    assert compiled and relative_error(grads, exact) <= 1e-8
    denoiser.scale = kept
    count = len(compiled)
    model(y, physics).square().sum().backward()
    if torch.__version__ >= "2.5":  # before, code was compiled for one module only, and every replica compiles its own
        assert len(compiled) == count  # the compiled code is found again


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_modules_of_torchscript(how, inside):
    n = nn.Sequential(net(), nn.Tanh())
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    exact = torch.autograd.grad(deq(DEProx(n, stepsize=0.3))(y, physics).square().sum(), list(n.parameters()))
    compiled = torch.jit.script(n) if how == "script" else torch.jit.trace(n, y)
    model = deq(DEProx(nn.Sequential(compiled) if inside else compiled, stepsize=0.3))
    x = model(y, physics)
    ours = torch.autograd.grad(x.square().sum(), list(model.parameters()), retain_graph=True)
    assert relative_error(ours, exact) <= 1e-8
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        x.sum().backward()
    assert not torch.allclose(model(y, physics), x)
