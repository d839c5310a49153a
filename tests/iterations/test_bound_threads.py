r"""Bound maps in several threads at the same time."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from deepinv.physics import MRI, Denoising
from torch import nn

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, Solver
from tests.problems import random_mask, rng


@pytest.fixture
def eager_switching():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def unet():
    torch.manual_seed(0)
    net = EquilibriumUNet(1, channels=(4, 8))
    nn.init.normal_(net.Conv_1x1.weight, std=0.05)
    solver = Solver(tol=1e-3, max_iter=15, on_failure="ignore")
    return DEQReconstructor(DEProx(net, stepsize=0.5), solver=solver).eval()


def test_two_models_in_two_threads(eager_switching):
    physics, models = Denoising(), [unet(), unet()]
    y = torch.rand(1, 1, 16, 16, generator=rng())
    expected = models[0](y, physics).detach()
    results = {0: [], 1: []}

    def serve(i):
        with torch.no_grad():
            results[i].extend(models[i](y, physics) for _ in range(15))

    in_threads(lambda: serve(0), lambda: serve(1))
    assert all(torch.equal(x, expected) for x in results[0] + results[1])
    for model in models:
        model(y, physics).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
        assert not torch.allclose(model(y, physics), expected)


def test_several_threads_train_and_serve_one_model(eager_switching):
    physics, model = Denoising(), unet()
    y = torch.rand(4, 1, 1, 16, 16, generator=rng())
    parameters = list(model.parameters())
    exact = [torch.autograd.grad(model(v, physics).square().sum(), parameters) for v in y]
    images = [model(v, physics).detach() for v in y]
    grads, seen = {}, []

    def train(i):
        for _ in range(5):
            x = model(y[i], physics)
            assert torch.equal(x, images[i])
            grads[i] = torch.autograd.grad(x.square().sum(), parameters)
            assert all(torch.equal(a, b) for a, b in zip(grads[i], exact[i], strict=True))

    def serve(i):
        with torch.no_grad():
            for _ in range(8):
                seen.append(torch.equal(model(y[i], physics), images[i]))

    in_threads(lambda: train(0), lambda: train(1), lambda: serve(2), lambda: serve(3))
    assert len(grads) == 2 and all(seen)


def test_one_physics_with_masks_per_sample_in_threads(eager_switching):
    physics = MRI(mask=random_mask(6, 1, 16, 16).float(), img_size=(2, 16, 16))
    torch.manual_seed(0)
    net = nn.Conv2d(2, 2, 3, padding=1)
    solver = Solver(tol=1e-4, chunk_size=2, on_failure="ignore")
    models = [DEQReconstructor(DEProx(copy.deepcopy(net), stepsize=0.5), solver=solver) for _ in range(3)]
    with torch.no_grad():
        for model in models:
            model.iteration.denoiser.weight.mul_(0.3)
    y = physics.A(torch.rand(6, 2, 16, 16, generator=rng()))
    expected = models[0](y, physics).detach()
    grad = torch.autograd.grad(models[0](y, physics).sum(), models[0].iteration.denoiser.weight)[0]

    def train(model):
        for _ in range(5):
            x = model(y, physics)
            assert torch.equal(x, expected)
            assert torch.equal(torch.autograd.grad(x.sum(), model.iteration.denoiser.weight)[0], grad)

    in_threads(*(lambda m=m: train(m) for m in models))
    assert physics.mask.shape[0] == 6
