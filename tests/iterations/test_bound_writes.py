r"""Bound maps, in-place writes, and changes between the forward and the backward pass."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Denoising, Inpainting
from torch import nn

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, FixedPointIteration, FromOptim
from tests.problems import F64, SmallDenoiser, deq, imaging, random_mask, relative_error, rng


class Network(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.ReLU(inplace=inplace), nn.Conv2d(1, 1, 3, padding=1)).to(F64)

    def forward(self, x, sigma=None, **_):
        return 0.5 * self.net(x)


class Clamps(nn.Module):
    def __init__(self, data):
        super().__init__()
        self.data, self.net = data, SmallDenoiser()

    def forward(self, x, sigma=None):
        return self.net(x.data.clamp_(0, 0.3) if self.data else x.clamp(0, 0.3))


def iterations(inplace, network=Network):
    prior = dinv.optim.RED(network(inplace))
    gd = dinv.optim.GD(prior=prior, data_fidelity=dinv.optim.L2(), stepsize=0.4, lambda_reg=1.0)
    return [
        *(kind(network(inplace), stepsize=0.4).to(F64) for kind in (DEGrad, DEProx, DEHQS, DEADMM)),
        FromOptim(gd),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_network_that_writes_to_the_data_of_its_input_changes_nothing(index):
    physics = Inpainting((1, 6, 6), mask=random_mask(1, 6, 6))
    y, images = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng(1))), []
    for data in (False, True):
        with torch.no_grad():
            images.append(deq(iterations(data, Clamps)[index])(y, physics))
    assert torch.equal(*images)


@pytest.mark.parametrize("index", range(5))
def test_a_network_that_writes_to_its_input_changes_nothing(index):
    physics = Inpainting((1, 6, 6), mask=random_mask(1, 6, 6))
    y = physics.A(torch.randn(2, 1, 6, 6, dtype=F64, generator=rng(1)))
    results = []
    for inplace in (False, True):
        model = deq(iterations(inplace)[index])
        init = torch.randn(2, 1, 6, 6, dtype=F64, generator=rng(2))
        init = (init, init.clone()) if index == 3 else init
        kept = copy.deepcopy(init)
        x = model(y, physics, init=init)
        grads = torch.autograd.grad(x.square().sum(), list(model.parameters()), allow_unused=True)
        assert torch.equal(torch.stack(init), torch.stack(kept)) if index == 3 else torch.equal(init, kept)
        results.append((x, [g for g in grads if g is not None]))
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[1][1], results[0][1]) <= 1e-10


def test_an_iteration_that_writes_to_its_argument_is_refused():
    class Writes(DEProx):
        def forward(self, x, physics, aty):
            return super().forward(x.mul_(0.5), physics, aty)

    _, physics, x, y = imaging()
    kept = x.clone()
    f = Writes(SmallDenoiser().to(F64), stepsize=0.5).to(F64).bind(y, physics)
    with pytest.raises(RuntimeError, match="Writes.forward wrote to its argument x in place"):
        f(x)
    assert torch.equal(x, kept)


def test_the_input_is_copied_in_the_first_evaluation_only():
    seen = []
    model, physics, x, y = imaging()
    model.iteration.denoiser.register_forward_pre_hook(lambda m, args: seen.append(args[0].data_ptr()))

    class Direct(FixedPointIteration):
        def forward(self, x, physics, aty):
            return self.denoise(x)

    f = Direct(model.iteration.denoiser).bind(y, physics)
    for _ in range(3):
        f(x)
    assert seen[0] != x.data_ptr() and seen[1:] == [x.data_ptr()] * 2


# What is changed between forward and backward ----------------------------------------------------------------------


@pytest.mark.parametrize("template", [DEGrad, DEProx, DEHQS, DEADMM, FromOptim])
@pytest.mark.parametrize("through_numpy", [False, True])
def test_measurements_may_be_overwritten_before_backward(template, through_numpy):
    physics = Denoising()
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    if template is FromOptim:
        prior = dinv.optim.PnP(Network(False))
        iteration = FromOptim(dinv.optim.PGD(prior=prior, data_fidelity=dinv.optim.L2(), stepsize=0.5))
    else:
        iteration = template(SmallDenoiser(), stepsize=0.5)
    model = deq(iteration)
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = torch.autograd.grad(model(y, physics).square().sum(), parameters)
    loss = model(y, physics).square().sum()
    if through_numpy:
        y.numpy()[:] *= 3
    else:
        y.mul_(3)
    assert relative_error(torch.autograd.grad(loss, parameters), exact) <= 1e-10


@pytest.mark.parametrize(
    "what", ["parameter", "buffer", "list", "physics", "part of a stack", "closure", "hook", "adapter", "data", "type"]
)
def test_tensors_changed_in_place_are_an_error(what):
    denoiser = SmallDenoiser()
    denoiser.register_buffer("level", torch.tensor(0.5, dtype=F64))
    gain = torch.ones(1, dtype=F64)
    denoiser.tensors = [torch.ones(1, dtype=F64)]
    forward = type(denoiser).forward

    class Leveled(SmallDenoiser):
        def forward(self, x):
            return self.level * self.tensors[0] * forward(self, x)

    denoiser.__class__ = Leveled
    part = Inpainting((1, 6, 6), mask=random_mask(1, 6, 6))
    physics = {
        "part of a stack": lambda: dinv.physics.StackedLinearPhysics([part, Denoising()]),
        "closure": lambda: dinv.physics.LinearPhysics(A=lambda x, **_: gain * x, A_adjoint=lambda y, **_: gain * y),
    }.get(what, lambda: part)()
    if what == "hook":
        denoiser.register_forward_hook(lambda m, i, out: gain * out)
    if what == "adapter":  # a module that only a hook knows
        adapter = nn.Conv2d(1, 1, 1, dtype=F64).requires_grad_(False)
        denoiser.register_forward_hook(lambda m, i, out: adapter(out))
    model = deq(DEProx(denoiser, stepsize=0.3))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    model(y, physics).sum().backward()
    loss = model(y, physics).sum()
    with torch.no_grad():
        if what == "data":
            denoiser.level.data = torch.tensor(0.1, dtype=F64)
        elif what == "type":
            denoiser.conv.float()
        else:
            {
                "parameter": denoiser.conv.bias,
                "buffer": denoiser.level,
                "list": denoiser.tensors[0],
                "physics": part.mask,
                "part of a stack": part.mask,
                "closure": gain,
                "hook": gain,
                "adapter": adapter.weight if what == "adapter" else gain,
            }[what].mul_(0.5)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        loss.backward()


def test_modes_noise_levels_and_submodules_are_those_of_the_forward_pass():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = SmallDenoiser()

        def forward(self, x, sigma):
            return (0.5 + 0.3 * self.training) * sigma * self.net(x)

    physics = Inpainting((1, 6, 6), mask=random_mask(1, 6, 6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    model = deq(DEProx(Moody(), stepsize=0.5, sigma=1.0))
    weight = model.iteration.denoiser.net.conv.weight
    exact = torch.autograd.grad(model(y, physics).square().sum(), weight)[0]
    for change in (
        lambda: model.eval(),
        lambda: setattr(model.iteration, "sigma", 0.1),
        lambda: setattr(model.iteration.denoiser, "net", nn.Identity()),
        lambda: model.iteration.denoiser.register_forward_hook(lambda m, i, out: 0 * out),
        lambda: setattr(model.iteration, "denoiser", nn.Identity()),
    ):
        twin = model
        loss = twin(y, physics).square().sum()
        inside, denoiser = model.iteration.denoiser, model.iteration.denoiser.net
        change()
        assert relative_error(torch.autograd.grad(loss, weight)[0], exact) <= 1e-10
        model.iteration.denoiser = inside
        inside.net, model.iteration.sigma = denoiser, 1.0
        inside._forward_hooks.clear()
        model.train()


def test_weights_that_are_unfrozen_before_backward_are_constants():
    model, physics, _, y = imaging()
    bias = model.iteration.denoiser.conv.bias.requires_grad_(False)
    weight = model.iteration.denoiser.conv.weight
    exact = torch.autograd.grad(model(y, physics).sum(), weight)[0]
    loss = model(y, physics).sum()
    bias.requires_grad_(True)
    loss.backward()
    assert relative_error(weight.grad, exact) <= 1e-10 and bias.grad is None


def test_inference_tensors():
    model, physics, _, y = imaging(DEHQS)
    model.iteration.stepsize.requires_grad_(False)
    expected = torch.autograd.grad(model(y, physics).sum(), model.iteration.denoiser.conv.weight)[0]
    with torch.inference_mode():
        same, matrix = y.clone(), physics.matrix.clone()
        model(same, physics)
    physics.matrix = matrix
    loss = model(same, physics).sum()
    with torch.inference_mode():
        same.zero_()
        matrix.zero_()
    ours = torch.autograd.grad(loss, model.iteration.denoiser.conv.weight)[0]
    assert relative_error(ours, expected) <= 1e-8
