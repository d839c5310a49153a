r"""Jacobians and transforms: those that work are exact, and those that do not say what to use."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from deepinv.physics import BlurFFT

from deepinv_deq import DEGrad, DEQReconstructor, ModularIDHook, Solver
from tests.implicit.common import direction
from tests.problems import F64, Parametric, SmallDenoiser, imaging, relative_error, unrolled

jacobian = torch.autograd.functional.jacobian


@pytest.mark.parametrize("batch", [1, 2])
def test_jacobians_of_every_kind_agree(batch):
    model, physics, _, y = imaging(batch=batch)
    f = lambda y: model(y, physics)  # noqa: E731
    exact = jacobian(lambda y: unrolled(model, y, physics, 120), y)
    assert relative_error(jacobian(f, y), exact) <= 1e-8
    assert relative_error(jacobian(f, y, vectorize=True), exact) <= 1e-8
    assert relative_error(jacobian(f, y, vectorize=True, strategy="forward-mode"), exact) <= 1e-8
    assert relative_error(torch.func.jacfwd(f)(y), exact) <= 1e-8


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_jacobian_as_the_first_solve_of_a_physics(chunk_size):
    physics = BlurFFT((1, 3, 3), filter=torch.tensor([[[[0.2, 0.6, 0.2]]]])).to(F64)
    solver = Solver("anderson", max_iter=300, tol=1e-13, chunk_size=chunk_size)
    model = DEQReconstructor(DEGrad(SmallDenoiser(), stepsize=0.3).to(F64), solver=solver, hook=ModularIDHook(solver))
    y = torch.rand(2, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = torch.func.jacfwd(lambda y: model(y, physics))(y)
    assert relative_error(found, jacobian(lambda y: unrolled(model, y, physics, 120), y)) <= 1e-8


def test_jacobian_with_a_preconditioner():
    physics = BlurFFT((1, 3, 3), filter=torch.tensor([[[[0.2, 0.6, 0.2]]]])).to(F64)
    solver = Solver("anderson", max_iter=300, tol=1e-13)
    model = DEQReconstructor(
        DEGrad(SmallDenoiser(), stepsize=0.3, data_weight=2.0).to(F64),
        solver=solver,
        hook=ModularIDHook(Solver("gmres", max_iter=300, tol=1e-13)),
    )
    y = physics(torch.rand(2, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)))
    assert model.iteration.bind(y, physics).preconditioner(y) is not None
    exact = jacobian(lambda y: unrolled(model, y, physics, 120), y)
    for strategy in ("forward-mode", "reverse-mode"):
        found = jacobian(lambda y: model(y, physics), y, vectorize=True, strategy=strategy)
        assert relative_error(found, exact) <= 1e-8
    assert relative_error(torch.func.jacfwd(lambda y: model(y, physics))(y), exact) <= 1e-8


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, y: torch.func.jacrev(f)(y),
        lambda f, y: torch.func.grad(lambda y: f(y).sum())(y),
        lambda f, y: torch.func.vjp(f, y),
        lambda f, y: torch.func.hessian(lambda y: f(y).sum())(y),
        lambda f, y: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (y,))[1], (y,), (y,)),
    ],
)
def test_transforms_that_do_not_work_say_what_to_use(transform):
    model, physics, _, y = imaging()
    with pytest.raises(RuntimeError, match=r"Use torch.autograd.grad|use torch.autograd.grad"):
        transform(lambda y: model(y, physics), y)


def test_reverse_of_a_transform_is_no_silent_zero():
    model, physics, _, y = imaging()
    value, tangent = torch.func.jvp(lambda y: model(y, physics), (y,), (direction(y),))
    for out in (value, tangent):
        with pytest.raises(RuntimeError, match="no implicit gradient|no further derivative"):
            out.sum().backward()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(y, direction(y)), physics)).tangent
        with pytest.raises(RuntimeError, match="no further derivative"):
            tangent.sum().backward()


def test_forward_over_reverse_is_refused():
    model, physics, _, y = imaging()
    y.requires_grad_()
    with forward_ad.dual_level():
        x_hat = model(forward_ad.make_dual(y, direction(y)), physics)
        with pytest.raises(RuntimeError, match="no further derivative"):
            torch.autograd.grad(x_hat.square().sum(), y)


@pytest.mark.parametrize("what", ["measurements", "parameters"])
def test_vmap_says_what_to_use(what):
    model, physics, _, y = imaging()
    with pytest.raises(RuntimeError, match="batch dimension, where each is solved by itself"):
        if what == "measurements":
            torch.vmap(lambda y: model(y, physics))(torch.stack([y, y]))
        else:
            params = {k: torch.stack([p.detach(), p.detach()]) for k, p in model.named_parameters()}
            torch.vmap(lambda p: torch.func.functional_call(model, p, (y, physics)))(params)


def test_second_derivatives_by_vmap():
    model, physics, _, y = imaging(side=2, batch=1)
    exact = torch.autograd.functional.hessian(lambda y: unrolled(model, y, physics, 150).square().sum(), y)
    loss = lambda y: model(y, physics).square().sum()  # noqa: E731
    assert relative_error(torch.autograd.functional.hessian(loss, y), exact) <= 1e-8
    assert relative_error(torch.autograd.functional.hessian(loss, y, vectorize=True), exact) <= 1e-8
    with pytest.raises(RuntimeError, match="without vectorize"):
        jacobian(lambda y: model(y, physics), y, vectorize=True, create_graph=True)


def test_tangents_of_a_variable_that_does_not_depend_on_the_input():
    w = torch.tensor([0.4, 0.7], dtype=F64)

    def fixed_point(w, steps=0):
        f = Parametric(lambda x, w: (w * x[1].sin() + 0.2 * x[0], 0.3 * x[1] + 0.1 * x[0].cos()), w)
        x = (torch.zeros(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64))
        for _ in range(steps):
            x = f(x)
        if not steps:
            star, _ = Solver("anderson", tol=1e-15, max_iter=200)(f, x)
            x = ModularIDHook(Solver("gmres", tol=1e-14))(f, star)
        return torch.cat(x)

    exact = jacobian(lambda w: fixed_point(w, 200), w)
    assert relative_error(torch.func.jacfwd(fixed_point)(w), exact) <= 1e-10
    assert relative_error(jacobian(fixed_point, w, vectorize=True, strategy="forward-mode"), exact) <= 1e-10
    assert relative_error(jacobian(fixed_point, w), exact) <= 1e-10
