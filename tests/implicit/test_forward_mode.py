r"""Forward mode against reverse mode and against unrolled solves, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from deepinv.physics import Denoising
from torch import nn

from deepinv_deq import DEADMM, DEHQS, ModularIDHook, Solver
from tests.implicit.common import direction, dual_tangent, ei_loss
from tests.problems import F64, TEMPLATES, MatrixPhysics, Parametric, imaging, relative_error, unrolled


@pytest.mark.parametrize("template", TEMPLATES)
def test_tangent_of_the_measurements(template):
    model, physics, _, y = imaging(template)
    v = direction(y)
    exact = dual_tangent(lambda y: unrolled(model, y, physics, 150), (y, v))
    assert relative_error(dual_tangent(lambda y: model(y, physics), (y, v)), exact) <= 1e-8
    for p in model.parameters():
        p.requires_grad_(False)
    value, tangent = torch.func.jvp(lambda y: model(y, physics), (y,), (v,))
    assert relative_error(tangent, exact) <= 1e-8 and relative_error(value, unrolled(model, y, physics)) <= 1e-10


@pytest.mark.parametrize("template", [DEHQS, DEADMM])
def test_tangent_of_splittings(template):
    model, _, y, _ = imaging(template)  # ADMM has a state of two variables
    physics = Denoising()
    v = direction(y)
    exact = dual_tangent(lambda y: unrolled(model, y, physics, 150), (y, v))
    assert relative_error(dual_tangent(lambda y: model(y, physics), (y, v)), exact) <= 1e-8
    assert relative_error(torch.func.jvp(lambda y: model(y, physics), (y,), (v,))[1], exact) <= 1e-8


@pytest.mark.parametrize("warm", [False, True])
def test_tangent_does_not_depend_on_the_start(warm):
    model, physics, _, y = imaging()
    init = model(y, physics).detach() if warm else torch.zeros(2, 1, 4, 4, dtype=F64)
    v = direction(y)
    exact = dual_tangent(lambda y: unrolled(model, y, physics, 150), (y, v))
    found = dual_tangent(lambda y: model(y, physics, init=init), (y, v))
    assert relative_error(found, exact) <= 1e-8


@pytest.mark.parametrize("template", TEMPLATES)
def test_tangent_of_the_physics(template):
    model, physics, _, y = imaging(template)
    v = direction(physics.matrix)
    exact = dual_tangent(lambda m: unrolled(model, y, MatrixPhysics(m, 4)), (physics.matrix, v))
    assert relative_error(dual_tangent(lambda m: model(y, MatrixPhysics(m, 4)), (physics.matrix, v)), exact) <= 1e-8
    found = torch.func.jvp(lambda m: model(y, MatrixPhysics(m, 4)), (physics.matrix,), (v,))[1]
    assert relative_error(found, exact) <= 1e-8


@pytest.mark.parametrize("template", TEMPLATES)
def test_tangent_next_to_a_physics_with_computed_parameters(template):
    model, physics, _, y = imaging(template)
    trained, v = physics.matrix.clone().requires_grad_(), direction(y)
    computed = MatrixPhysics(physics.matrix, 4)
    computed.matrix = trained * 1.0  # no leaf: it may be left over from an earlier evaluation
    exact = dual_tangent(lambda y: unrolled(model, y, physics, 150), (y, v))
    found = torch.func.jvp(lambda y: model(y, computed), (y,), (v,))[1]
    assert relative_error(found, exact) <= 1e-8


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["dual", "func"])
def test_tangent_of_the_parameters(template, kind):
    model, physics, _, y = imaging(template)
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach() for p in model.parameters()]
    steps = [direction(p, seed) for seed, p in enumerate(values)]
    call = lambda *ps: torch.func.functional_call(model, dict(zip(names, ps, strict=True)), (y, physics))  # noqa: E731
    found = (
        dual_tangent(call, *zip(values, steps, strict=True))
        if kind == "dual"
        else torch.func.jvp(call, tuple(values), tuple(steps))[1]
    )
    x_hat = model(y, physics)  # g · v by reverse mode, for a direction g
    g = direction(x_hat, 9)
    reverse = torch.autograd.grad(x_hat, list(model.parameters()), g)
    exact = sum((r * s).sum() for r, s in zip(reverse, steps, strict=True))
    assert (g * found).sum().item() == pytest.approx(exact.item(), rel=1e-8)


def test_tangent_through_two_passes():
    model, physics, _, y = imaging()
    v = direction(y)
    exact = dual_tangent(lambda y: ei_loss(lambda y, p: unrolled(model, y, p, 150), y, physics), (y, v))
    assert dual_tangent(lambda y: ei_loss(model, y, physics), (y, v)).item() == pytest.approx(exact.item(), rel=1e-8)


@pytest.mark.parametrize("complex_", [False, True])
def test_tangent_of_a_callable(complex_):
    dtype = torch.complex128 if complex_ else F64
    c = direction(torch.zeros(2, 3, dtype=dtype))
    hook, solver = ModularIDHook(Solver("gmres", tol=1e-14)), Solver("anderson", tol=1e-14, max_iter=200)

    def fixed_point(c, steps=0):
        f = lambda x: 0.4 * torch.sin(x) + c  # noqa: E731
        x = torch.zeros_like(c)
        for _ in range(steps):
            x = f(x)
        return x if steps else hook(f, solver(f, x)[0])

    v = direction(c, 2)
    exact = dual_tangent(lambda c: fixed_point(c, 200), (c, v))
    assert relative_error(dual_tangent(fixed_point, (c, v)), exact) <= 1e-10
    if torch.__version__ < (2, 5):
        with pytest.raises(RuntimeError, match="torch.func transforms don't yet support saved tensor hooks"):
            torch.func.jvp(fixed_point, (c,), (v,))
    else:
        assert relative_error(torch.func.jvp(fixed_point, (c,), (v,))[1], exact) <= 1e-10


def test_tangent_and_gradient_in_one_pass():
    model, physics, _, y = imaging()
    v = direction(y)
    expected = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    exact = dual_tangent(lambda y: unrolled(model, y, physics, 150), (y, v))
    with forward_ad.dual_level():
        x_hat = model(forward_ad.make_dual(y, v), physics)
        assert relative_error(forward_ad.unpack_dual(x_hat).tangent, exact) <= 1e-8
        primal = forward_ad.unpack_dual(x_hat).primal
        grads = torch.autograd.grad(primal.square().sum(), list(model.parameters()))
        assert relative_error(grads, expected) <= 1e-10
        assert all(forward_ad.unpack_dual(g).tangent is None for g in grads)  # it would be part of one only


def test_tangent_of_jfb_is_that_of_one_evaluation():
    model, physics, _, y = imaging(mode="jfb")
    v, x_star = direction(y), model(y, physics).detach()
    exact = dual_tangent(lambda y: model.iteration.bind(y, physics)(x_star), (y, v))
    assert relative_error(dual_tangent(lambda y: model(y, physics), (y, v)), exact) <= 1e-12


def test_nothing_changes_where_nothing_has_a_tangent():
    model, physics, _, y = imaging()
    told = []
    model.on_solve(lambda which, stat: told.append(which))
    with forward_ad.dual_level():
        x_hat = model(y, physics)
        assert forward_ad.unpack_dual(x_hat).tangent is None
        x_hat.sum().backward()
    assert told == ["forward", "backward"]


def test_solves_of_tangents_are_reported():
    model, physics, _, y = imaging()
    told = []
    model.on_solve(lambda which, stat: told.append((which, bool(stat.converged.all()))))
    dual_tangent(lambda y: model(y, physics), (y, direction(y)))
    assert told == [("forward", True), ("tangent", True)]


class WithoutJVP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 0.5 * x

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g


@pytest.mark.parametrize("where", ["denoiser", "physics"])
def test_an_operator_without_a_jvp_says_so_itself(where):
    class Layer(nn.Module):
        def forward(self, x):
            return WithoutJVP.apply(x)

    class Physics(MatrixPhysics):
        def A_adjoint(self, y, **_):
            return WithoutJVP.apply(2 * super().A_adjoint(y))

    model, physics, _, y = imaging()
    if where == "denoiser":
        model.iteration.denoiser = Layer()
    else:
        physics = Physics(physics.matrix, 4)
    model(y, physics)
    # the physics is evaluated in bind, which says that the measurements do not fit, and why: the operator's own words
    with pytest.raises((RuntimeError, NotImplementedError, ValueError), match="must implement the jvp function"):
        dual_tangent(lambda y: model(y, physics), (y, direction(y)))


def test_tangent_of_a_map_that_names_its_inputs():
    w = torch.tensor(0.4, dtype=F64)

    def fixed_point(w, steps=0):
        f = Parametric(lambda x, w: (w * x[1] + 1, w * x[0] + x[0].square() / 9), w)
        x = (torch.zeros(2, 1, dtype=F64), torch.zeros(2, 1, dtype=F64))
        for _ in range(steps):
            x = f(x)
        if not steps:
            star, _ = Solver("anderson", tol=1e-15, max_iter=100)(f, x)
            x = ModularIDHook(Solver("gmres", tol=1e-14))(f, star)
        return torch.cat(x)

    one = torch.ones_like(w)
    exact = dual_tangent(lambda w: fixed_point(w, 200), (w, one))
    assert relative_error(dual_tangent(fixed_point, (w, one)), exact) <= 1e-10
    assert relative_error(torch.func.jvp(fixed_point, (w,), (one,))[1], exact) <= 1e-10
    assert relative_error(torch.func.jacfwd(fixed_point)(w), exact) <= 1e-10
