r"""Bound maps: rebind, steps, in-place writes, exceptions, threads."""

from __future__ import annotations

import copy
import sys
import threading
import weakref

import deepinv as dinv
import pytest
import torch
from deepinv.physics import MRI, Denoising, Inpainting
from torch import nn
from torch.nn.utils import parametrizations

from deepinv_deq import (
    DEADMM,
    DEHQS,
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    FixedPointIteration,
    FromOptim,
    ModularIDHook,
    Solver,
)
from deepinv_deq.maps import Map
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq, imaging, relative_error


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mask(*shape, seed=0):
    return (torch.rand(*shape, generator=rng(seed)) > 0.4).to(F64)


# Steps -------------------------------------------------------------------------------------------------------------


def test_a_bound_map_is_a_map_and_its_restrictions_are():
    model, physics, x, y = imaging(batch=4)
    f = model.iteration.bind(y, physics)
    assert isinstance(f, Map) and isinstance(f.rebind(f.inputs), Map) and isinstance(f.select(slice(0, 2)), Map)


@pytest.mark.parametrize("template", [DEGrad, DEProx, DEHQS, DEADMM])
def test_step_is_the_residual(template):
    physics = Inpainting((1, 4, 4), mask=random_mask(1, 4, 4))
    x = torch.rand(2, 1, 4, 4, dtype=F64, generator=rng(1))
    f = template(SmallDenoiser(), stepsize=0.5).to(F64).bind(physics.A(x), physics)
    state = (x, 0.1 * x) if template is DEADMM else x
    image, step = f(state), f.step(state)
    if template is DEADMM:
        assert all(torch.equal(s, a - b) for s, a, b in zip(step, image, state, strict=True))
    else:
        torch.testing.assert_close(step, image - x, rtol=1e-12, atol=1e-14)


def test_step_of_de_grad_does_not_cancel_digits():
    physics = Inpainting((1, 8, 8), mask=random_mask(1, 8, 8).float())
    x = torch.rand(1, 1, 8, 8, generator=rng(1))
    eta = 1e-6
    iteration = DEGrad(SmallDenoiser(), stepsize=eta)
    step = iteration.bind(physics.A(x.flip(-1)), physics).step(x)
    double = copy.deepcopy(iteration).double()
    exact = double.bind(physics.double().A(x.flip(-1).double()), physics).step(x.double())
    assert relative_error(step, exact) < 1e-5
    assert (
        relative_error(
            iteration.double()(x.double(), physics, physics.A_adjoint(physics.A(x.flip(-1).double()))).float() - x,
            exact,
        )
        > 1e-3
    )


def test_a_subclass_that_overrides_one_of_forward_and_step_gets_the_other():
    class Relaxed(DEGrad):
        def forward(self, x, physics, aty):
            return 1.5 * super().forward(x, physics, aty) - 0.5 * x

    class Stepping(DEGrad):
        def step(self, x, physics, aty):
            return 2 * super().step(x, physics, aty)

    class Mixin:
        def forward(self, x, physics, aty):
            return 0.5 * super().forward(x, physics, aty)

    class Mixed(Mixin, DEGrad):
        pass

    class Child(Mixed):
        def denoise(self, x):
            return 0.9 * super().denoise(x)

    class Both(Relaxed):
        def forward(self, x, physics, aty):
            return x + self.step(x, physics, aty)

        def step(self, x, physics, aty):
            return 0.1 * (physics.A_adjoint_A(x) - aty)

    physics = Inpainting((1, 4, 4), mask=random_mask(1, 4, 4))
    x = torch.rand(2, 1, 4, 4, dtype=F64, generator=rng(1))
    y = physics.A(x.flip(0))
    plain = DEGrad(SmallDenoiser(), stepsize=0.5).to(F64).bind(y, physics)
    for kind in (Relaxed, Stepping, Mixed, Child, Both):
        f = kind(SmallDenoiser(), stepsize=0.5).to(F64).bind(y, physics)
        torch.testing.assert_close(f.step(x), f(x) - x)
    torch.testing.assert_close(
        Relaxed(SmallDenoiser(), stepsize=0.5).to(F64).bind(y, physics).step(x), 1.5 * plain.step(x)
    )
    torch.testing.assert_close(
        Stepping(SmallDenoiser(), stepsize=0.5).to(F64).bind(y, physics)(x), x + 2 * plain.step(x)
    )


def test_hooks_on_the_iteration_count_for_steps():
    model, physics, x, y = imaging(DEGrad)
    model.iteration.register_forward_hook(lambda m, i, out: 2 * out)
    f = model.iteration.bind(y, physics)
    torch.testing.assert_close(f.step(x), f(x) - x)


# In-place writes ---------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.ReLU(inplace=inplace), nn.Conv2d(1, 1, 3, padding=1)).to(F64)

    def forward(self, x, sigma=None, **_):
        return 0.5 * self.net(x)


def iterations(inplace):
    prior = dinv.optim.RED(Network(inplace))
    gd = dinv.optim.GD(prior=prior, data_fidelity=dinv.optim.L2(), stepsize=0.4, lambda_reg=1.0)
    return [
        *(kind(Network(inplace), stepsize=0.4).to(F64) for kind in (DEGrad, DEProx, DEHQS, DEADMM)),
        FromOptim(gd),
    ]


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
def test_measurements_overwritten_in_place_are_exact_or_an_error(template):
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
    y.mul_(3)
    if template in (DEGrad, DEProx):  # which keep a copy, the adjoint of y
        assert relative_error(torch.autograd.grad(loss, parameters), exact) <= 1e-10
    else:
        with pytest.raises(RuntimeError, match="clone measurements whose memory is used again"):
            loss.backward()


@pytest.mark.parametrize(
    "what", ["parameter", "buffer", "list", "physics", "part of a stack", "closure", "hook", "data", "type"]
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
            }[what].mul_(0.5)
    message = (
        "modified by an inplace operation" if what == "parameter" else "changed in place between forward and backward"
    )
    with pytest.raises(RuntimeError, match=message):
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


def test_lazy_layers_get_their_shape():
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyConv2d(1, 3, padding=1, dtype=F64), nn.Tanh())
    _, physics, _, y = imaging()
    model = deq(DEProx(lazy, stepsize=0.5))
    model(y, physics).sum().backward()
    assert type(lazy[0]) is nn.Conv2d and lazy[0].weight.grad is not None


@pytest.mark.parametrize("when", [0, 1, 5, "backward"])
def test_exceptions_leave_every_module_as_it_was(when):
    class Fails(SmallDenoiser):
        def __init__(self):
            super().__init__()
            parametrizations.weight_norm(self.conv)

    calls, physics = [], Inpainting((1, 6, 6), mask=random_mask(1, 6, 6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    model = deq(DEProx(Fails(), stepsize=0.5))
    expected = model(y, physics)

    def state():
        return [
            (id(m), type(m), {k: id(v) for k, v in m.__dict__.items()}) for m in (*model.modules(), *physics.modules())
        ]

    def fail(*_):
        calls.append(1)
        if torch.is_grad_enabled() if when == "backward" else len(calls) > when:
            raise KeyboardInterrupt

    handle = model.iteration.denoiser.register_forward_hook(fail)
    before = state()
    with pytest.raises(KeyboardInterrupt):
        model(y, physics).sum().backward()
    model.forward_stat = None
    after = state()
    skip = {"forward_stat"}
    for (a, ka, da), (b, kb, db) in zip(before, after, strict=True):
        assert (
            a == b
            and ka is kb
            and {k: v for k, v in da.items() if k not in skip} == {k: v for k, v in db.items() if k not in skip}
        )
    handle.remove()
    assert torch.equal(model(y, physics), expected)


def test_a_deq_inside_a_deq():
    inner_physics = Denoising()
    inner = DEQReconstructor(
        DEProx(SmallDenoiser(), stepsize=0.5).to(F64),
        solver=Solver(tol=1e-13, max_iter=200),
        hook=ModularIDHook(Solver("gmres", tol=1e-13, max_iter=200)),
    )

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = inner

        def forward(self, x):
            return 0.5 * self.model(x, inner_physics)

    physics = Inpainting((1, 4, 4), mask=random_mask(1, 4, 4))
    y = physics.A(torch.rand(2, 1, 4, 4, dtype=F64, generator=rng()))
    assert_unrolled_gives_the_same(deq(DEProx(Inner(), stepsize=0.5)), physics, y, steps=60)


def test_a_bound_map_does_not_keep_what_it_does_not_need():
    model, physics, _, y = imaging()
    f = model.iteration.bind(y, physics)
    gone = weakref.ref(y)
    del y
    assert gone() is None and f.diagnose() == ""


# Threads -----------------------------------------------------------------------------------------------------------


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
