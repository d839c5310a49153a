r"""Adjoints that deepinv builds by backpropagation: those of a bound map belong to its own operator, with all gradients."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.autograd.forward_ad as fwd
from deepinv.physics import LinearPhysics, adjoint_function
from torch import nn

from deepinv_deq import DEHQS, DEGrad, DEProx, DEQReconstructor, FixedPointIteration
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq

MADE = ("by hand", "adjoint_function", "keyword", "automatic", "super", "local function")


class Gain(LinearPhysics):
    r"""Multiplies and shifts by a column."""

    def __init__(self, made, w, twice_differentiable=True):
        super().__init__(img_size=(1, 4, 4))
        self.w, self.made, self.twice_differentiable = nn.Parameter(w.clone()), made, twice_differentiable
        if made == "keyword":
            self.A_adj = adjoint_function(self.A, (2, 1, 4, 4), dtype=F64)
        if made == "adjoint_function":
            self.own = adjoint_function(self.A, (2, 1, 4, 4), dtype=F64)
        if made == "local function":
            self.own = self.local().apply

    def local(self):
        class Adjoint(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y, w):
                ctx.save_for_backward(y)
                return (self.w * y).roll(-1, -1)

            @staticmethod
            def backward(ctx, g):
                return self.A(g), (ctx.saved_tensors[0] * g.roll(1, -1)).sum(0, keepdim=True)

        return Adjoint

    def A(self, x, **_):
        return self.w * (x.roll(1, -1) if self.twice_differentiable else Once.apply(x))

    def A_adjoint(self, y, **_):
        if self.made in ("keyword", "automatic", "super"):
            return super().A_adjoint(y)
        if self.made == "by hand":
            return (self.w * y).roll(-1, -1)
        return self.own(y, self.w) if self.made == "local function" else self.own(y)


class Once(torch.autograd.Function):
    r"""A shift that autograd differentiates once only."""

    @staticmethod
    def forward(ctx, x):
        return x.roll(1, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g.roll(-1, -1)


def gradients(made, kind, change=False):
    torch.manual_seed(0)
    w, y = 0.5 + 0.5 * torch.rand(1, 4, 4, dtype=F64), torch.rand(2, 1, 4, 4, dtype=F64, requires_grad=True)
    physics, model = Gain(made, w), deq(kind(SmallDenoiser().to(F64), stepsize=0.5))
    inside, x_hat = physics.w, model(y, physics)
    if change:  # as for the operator of the next batch
        physics.w = nn.Parameter(torch.rand(1, 4, 4, dtype=F64))
    return x_hat, torch.autograd.grad(x_hat.sin().sum(), [y, inside, *model.iteration.denoiser.parameters()])


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("kind", [DEProx, DEGrad, DEHQS])
@pytest.mark.parametrize("made", MADE[1:])
def test_gradients_are_those_of_an_adjoint_by_hand(made, kind: type[FixedPointIteration], change):
    (x, exact), (x_hat, found) = gradients("by hand", kind), gradients(made, kind, change)
    torch.testing.assert_close(x_hat, x, rtol=1e-9, atol=1e-10)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("made", [made for made in MADE if made != "local function"])
def test_tangents_go_through_the_adjoint(made):
    torch.manual_seed(0)
    w, y, tangent = 0.5 + 0.5 * torch.rand(1, 4, 4, dtype=F64), *torch.rand(2, 2, 1, 4, 4, dtype=F64)
    physics, model = Gain(made, w), deq(DEProx(SmallDenoiser().to(F64), stepsize=0.5))
    _, found = torch.func.jvp(lambda v: model(v, physics), (y,), (tangent,))
    with fwd.dual_level():
        other = fwd.unpack_dual(model(fwd.make_dual(y, tangent), physics)).tangent
    step = 1e-6 * tangent
    difference = (model(y + step, physics) - model(y - step, physics)) / 2e-6
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-10)


class Convolution(LinearPhysics):
    r"""Its second derivative by autograd has an edge to the image that the adjoint was built with."""

    def __init__(self, by_hand):
        super().__init__(img_size=(1, 6, 6))
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False).to(F64)
        self.by_hand = by_hand

    def A(self, x, **_):
        return self.conv(x)

    def A_adjoint(self, y, **_):
        if self.by_hand:
            return nn.functional.conv_transpose2d(y, self.conv.weight, padding=1)
        return super().A_adjoint(y)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [DEProx, DEGrad])
def test_a_convolution_of_the_physics_is_trained(kind, inference):
    found = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        physics = Convolution(by_hand)
        with torch.inference_mode(inference and not by_hand):
            y = torch.rand(2, 2, 6, 6, dtype=F64)
        x_hat = deq(kind(SmallDenoiser().to(F64), stepsize=0.3))(y, physics)
        found.append(torch.autograd.grad(x_hat.sin().sum(), physics.conv.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def twice(x):
    return 2 * x


def test_an_operator_without_anything_to_replicate_keeps_its_adjoint():
    physics = LinearPhysics(A=twice, A_adjoint=adjoint_function(twice, (2, 1, 4, 4)))
    f = DEProx(SmallDenoiser(), stepsize=0.1).bind(torch.rand(2, 1, 4, 4), physics)
    assert f._physics.A_adj is physics.A_adj and len(f.inputs) == 2


def test_private_names_of_a_local_function_are_kept():
    class Doubled(LinearPhysics):
        def __init__(self):
            super().__init__()
            gain = nn.Parameter(torch.tensor(2.0, dtype=F64))

            class Times(torch.autograd.Function):
                _sign = 1.0

                @staticmethod
                def _product(x):
                    return gain * x * Times._sign

                @staticmethod
                def forward(ctx, x):
                    return Times._product(x)

                @staticmethod
                def backward(ctx, g):
                    return Times._product(g)

            self.times = Times.apply

        def A(self, x, **_):
            return self.times(x)

        A_adjoint = A

    y = torch.rand(2, 1, 4, 4, dtype=F64, requires_grad=True)
    assert_unrolled_gives_the_same(deq(DEProx(SmallDenoiser().to(F64), stepsize=0.1)), Doubled(), y)


@pytest.mark.parametrize("copied", [copy.deepcopy, LinearPhysics.clone])
def test_a_copy_of_the_physics_inside_of_an_iteration_has_its_own_adjoint(copied):
    class Halved(DEProx):
        def forward(self, x, physics, *constants):
            other = copied(physics)
            other.w = nn.Parameter(physics.w.detach() / 2)
            assert torch.allclose(other.A_adjoint(x), (other.w * x).roll(-1, -1))
            return super().forward(x, physics, *constants)

    model = DEQReconstructor(Halved(SmallDenoiser(), stepsize=0.5))
    model(torch.rand(2, 1, 4, 4), Gain("automatic", torch.rand(1, 4, 4)))


def test_single_precision_and_other_batch_sizes():
    w = torch.rand(1, 4, 4)
    for made in ("automatic", "by hand"):
        physics, model = Gain(made, w), DEQReconstructor(DEProx(SmallDenoiser(), stepsize=0.5))
        assert [model(torch.ones(n, 1, 4, 4), physics).dtype for n in (1, 3)] == [torch.float32] * 2


def test_an_operator_that_is_differentiable_once_has_an_adjoint_with_a_gradient():
    w, y = torch.rand(1, 4, 4, dtype=F64), torch.rand(2, 1, 4, 4, dtype=F64, requires_grad=True)
    found = []
    for once in (True, False):
        physics = Gain("automatic", w, twice_differentiable=not once).requires_grad_(False)
        x_hat = deq(DEProx(SmallDenoiser().to(F64), stepsize=0.5))(y, physics)
        found.append(torch.autograd.grad(x_hat.sin().sum(), y)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("made", ["by hand", "automatic", "super"])
def test_passes_leave_nothing_to_the_garbage_collector(made):
    physics, model = Gain(made, torch.rand(1, 4, 4, dtype=F64)), deq(DEProx(SmallDenoiser().to(F64)))
    y = torch.rand(2, 1, 4, 4, dtype=F64)
    model(y, physics).sum().backward()
    gc.collect()
    gc.disable()
    try:
        model(y, physics).sum().backward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [kept for kept in gc.garbage if isinstance(kept, (torch.Tensor, nn.Module))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
