r"""Bound maps: evaluation, steps, exceptions and nested models."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from deepinv.physics import Denoising, Inpainting
from torch import nn
from torch.nn.utils import parametrizations

from deepinv_deq import DEADMM, DEHQS, ConvergenceWarning, DEGrad, DEProx, DEQReconstructor, ModularIDHook, Solver
from deepinv_deq.maps import Map
from tests.problems import (
    F64,
    SmallDenoiser,
    assert_unrolled_gives_the_same,
    deq,
    imaging,
    random_mask,
    relative_error,
    rng,
)


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


@pytest.mark.parametrize("context", [False, True])
def test_lazy_layers_get_their_shape(context):
    class Lazy(nn.Sequential):
        def forward(self, x, context=None):
            return super().forward(x if context is None else torch.cat([x, context], 1))

    torch.manual_seed(0)
    lazy = Lazy(nn.LazyConv2d(1, 3, padding=1, dtype=F64), nn.Tanh())
    _, physics, _, y = imaging()
    model = deq(DEProx(lazy, stepsize=0.5, context=context))
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


def test_hooks_that_cost_digits_are_named():
    physics, y = Denoising(), torch.rand(1, 1, 8, 8)
    for template, named in ((DEGrad, True), (DEProx, False)):
        iteration = template(nn.Tanh(), stepsize=1e-8 if named else 0.5)
        assert iteration.bind(y, physics).diagnose() == ""
        iteration.register_forward_hook(lambda *_: None)
        assert ("put hooks on the denoiser" in iteration.bind(y, physics).diagnose()) == named
    with pytest.warns(ConvergenceWarning, match="put hooks on the denoiser"):
        iteration = DEGrad(nn.Tanh(), stepsize=1e-8)
        iteration.register_forward_hook(lambda *_: None)
        DEQReconstructor(iteration)(y, physics)


def test_a_lazy_layer_that_is_not_used_is_named():
    net = SmallDenoiser()
    net.head = nn.LazyConv2d(1, 3, dtype=F64)
    _, physics, _, y = imaging()
    with pytest.raises(ValueError, match=r"lazy parameter denoiser.head.weight of DEProx .* remove its layer"):
        DEProx(net.to(F64), stepsize=0.5).bind(y, physics)
