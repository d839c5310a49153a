r"""The implicit gradient against exact ones (contracts 1-4, 6-8)."""

from __future__ import annotations

import contextvars
import copy
import gc
import importlib
import pickle
import weakref

import pytest
import torch
from deepinv.physics import BlurFFT, Inpainting
from torch import nn

from deepinv_deq import ConvergenceError, ConvergenceWarning, DEGrad, DEProx, DEQReconstructor, ModularIDHook, Solver
from deepinv_deq.implicit import DifferentiableMap
from tests.problems import (
    F64,
    TEMPLATES,
    MatrixPhysics,
    Parametric,
    SmallDenoiser,
    affine,
    dense_gradient,
    imaging,
    relative_error,
    unrolled,
)


def rotate(x):
    return torch.rot90(x, 1, (-2, -1))


def ei_loss(model, y, physics):
    r"""Measurement consistency plus the EI composition f(A T_g f(y)) of eq. 9."""
    x1 = model(y, physics)
    x2 = rotate(x1)
    x3 = model(physics.A(x2), physics)
    return (physics.A(x1) - y).pow(2).mean() + 3 * (x3 - x2).pow(2).mean()


def sup_loss(model, y, physics):
    return model(y, physics).sin().sum()


def gradients(loss, model, inputs):
    return torch.autograd.grad(loss, [*model.parameters(), *inputs])


# Contract 1: exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_one_pass_equals_the_dense_jacobian(template):
    model, physics, _, y = imaging(template)
    y.requires_grad_()
    x_hat = model(y, physics)
    g = torch.cos(x_hat.detach())
    inputs = [*model.parameters(), y]
    exact = dense_gradient(lambda x: model.iteration.bind(y, physics)(x), x_hat, g, inputs)
    ours = torch.autograd.grad(x_hat, inputs, g)
    # the parameters as one vector: the fixed point of DE-Grad does not depend on its stepsize
    assert relative_error(ours[:-1], exact[:-1]) <= 1e-8
    assert relative_error(ours[-1], exact[-1]) <= 1e-8


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("loss", [sup_loss, ei_loss])
def test_losses_equal_a_fully_unrolled_solve(template, loss):
    model, physics, _, y = imaging(template)
    y.requires_grad_()
    ours = gradients(loss(model, y, physics), model, [y])
    exact = gradients(loss(lambda y, p: unrolled(model, y, p), y, physics), model, [y])
    assert relative_error(ours[:-1], exact[:-1]) <= 1e-8
    assert relative_error(ours[-1], exact[-1]) <= 1e-8


@pytest.mark.parametrize("loss", [sup_loss, ei_loss])
def test_float32_gradient(loss):
    model, physics, _, y = imaging(dtype=torch.float32, tol=1e-6)
    exact_model, exact_physics, _, exact_y = imaging()
    ours = gradients(loss(model, y.requires_grad_(), physics), model, [y])
    exact = gradients(loss(exact_model, exact_y.requires_grad_(), exact_physics), exact_model, [exact_y])
    assert relative_error(ours, exact) <= 1e-4


@pytest.mark.parametrize("method", ["gmres", "anderson", "broyden", "fixed_point_iter"])
def test_every_backward_method_gives_the_same_gradient(method):
    model, physics, _, y = imaging()
    exact = gradients(ei_loss(model, y, physics), model, [])
    model.hook = ModularIDHook(Solver(method, max_iter=400, tol=1e-13))
    assert relative_error(gradients(ei_loss(model, y, physics), model, []), exact) <= 1e-8


def test_gradcheck_of_a_bare_callable():
    theta = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    x0, hook = torch.zeros(2, 3, dtype=F64), ModularIDHook(Solver("gmres", tol=1e-13))

    def fixed_point(theta, c):
        f = lambda x: theta[0] * torch.sin(x) + theta[1] * x + c  # noqa: E731
        return hook(f, Solver("anderson", max_iter=200, tol=1e-13)(f, x0)[0])

    c = torch.randn(2, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed_point, (theta, c))


def test_a_state_of_several_tensors_and_a_complex_one():
    a = torch.tensor(0.4, dtype=F64, requires_grad=True)
    f = lambda s: (a * torch.tanh(s[1].real) + 1, (0.3 + 0.2j) * a * s[1] + s[0] * (1 - 1j))  # noqa: E731
    x0 = (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, dtype=torch.complex128))
    x, stat = Solver("anderson", max_iter=200, tol=1e-14)(f, x0)
    assert stat.converged.all() and x[1].is_complex()
    u, v = ModularIDHook(Solver("gmres", tol=1e-13))(f, x)
    (ours,) = torch.autograd.grad(u.sin().sum() + (v * v.conj()).real.sum(), a)
    s = x0
    for _ in range(200):
        s = f(s)
    (exact,) = torch.autograd.grad(s[0].sin().sum() + (s[1] * s[1].conj()).real.sum(), a)
    assert relative_error(ours, exact) <= 1e-8


def test_an_unbatched_state_is_one_sample():
    f, x_star, w = affine(batch=1)
    w.requires_grad_()
    c = x_star[0] - w.detach() @ x_star[0]
    f = lambda x: w @ x + c  # noqa: E731
    x_hat = ModularIDHook(Solver("gmres", tol=1e-13, history=40))(f, x_star[0])
    exact = dense_gradient(f, x_star[0], torch.ones_like(c), [w])
    assert relative_error(torch.autograd.grad(x_hat.sum(), w), exact) <= 1e-8


def test_gradient_of_the_physics_parameters():
    model, physics, _, y = imaging()
    matrix = physics.matrix.clone().requires_grad_()
    ours = torch.autograd.grad(sup_loss(model, y, MatrixPhysics(matrix, 4)), matrix)
    fixed = torch.autograd.grad(unrolled(model, y, MatrixPhysics(matrix, 4)).sin().sum(), matrix)
    assert relative_error(ours, fixed) <= 1e-8


def test_jfb_is_one_step_of_autograd():
    model, physics, _, y = imaging(mode="jfb")
    y.requires_grad_()
    ours = gradients(sup_loss(model, y, physics), model, [y])
    x_star = model(y, physics).detach()
    image = model.iteration.bind(y, physics)(x_star)
    exact = torch.autograd.grad(image, [*model.parameters(), y], torch.cos(x_star))
    assert relative_error(ours, exact) <= 1e-12
    implicit, *_ = imaging()
    assert relative_error(ours, gradients(sup_loss(implicit, y, physics), implicit, [y])) > 1e-2


# Contract 2: linear in the cotangent -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gmres", "anderson", "broyden"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1e4, 1e8])
def test_gradient_is_linear_in_the_loss(method, dtype, scale):
    model, physics, _, y = imaging(dtype=dtype)
    model.solver = Solver("anderson", tol=1e-5, max_iter=200)
    model.hook = ModularIDHook(Solver(method, tol=1e-2, max_iter=100))
    loss = ei_loss(model, y, physics)
    one = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    many = torch.autograd.grad(loss, list(model.parameters()), torch.tensor(scale, dtype=dtype))
    assert relative_error([g.double() / scale for g in many], one) <= 1e-5


def test_zero_and_nan_cotangents():
    model, physics, _, y = imaging()
    x_hat = model(y, physics)
    zero = torch.autograd.grad(x_hat, list(model.parameters()), torch.zeros_like(x_hat), retain_graph=True)
    assert all((g == 0).all() for g in zero)
    with pytest.warns(ConvergenceWarning, match="the cotangent"):
        nan = torch.autograd.grad(x_hat, list(model.parameters()), torch.full_like(x_hat, torch.nan))
    assert any(g.isnan().any() for g in nan) and not model.hook.stat.converged.any()


def test_a_nan_cotangent_of_one_sample_leaves_the_others_exact():
    model, physics, _, y = imaging()
    y.requires_grad_()
    model.hook.solver = Solver("gmres", tol=1e-13, max_iter=200, on_failure="ignore")
    x_hat, g = model(y, physics), torch.ones(2, 1, 4, 4, dtype=F64)
    (expected,) = torch.autograd.grad(x_hat, y, g, retain_graph=True)
    g[1, 0, 0, 0] = torch.inf
    (got,) = torch.autograd.grad(x_hat, y, g)
    torch.testing.assert_close(got[0], expected[0])
    assert not got[1].isfinite().any()


# Contract 3: repeatable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["implicit", "jfb"])
def test_a_second_backward_gives_the_same_gradient(mode):
    model, physics, _, y = imaging(mode=mode)
    loss = ei_loss(model, y, physics)
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bare", [False, True])
def test_several_forwards_before_one_backward_are_independent(bare):
    model, physics, x, _ = imaging()
    ys = [physics.A(x * s) for s in (0.5, 1.0, 1.5)]

    def reconstruct(y):
        if not bare:
            return model(y, physics)
        f = lambda x, g=model.iteration.bind(y, physics): g(x)  # noqa: E731
        return model.hook(f, model.solver(f, model.iteration.init(y, physics))[0])

    together = torch.autograd.grad(sum(reconstruct(y).sin().sum() for y in ys), list(model.parameters()))
    apart = [torch.autograd.grad(reconstruct(y).sin().sum(), list(model.parameters())) for y in ys]
    assert relative_error(together, [sum(parts) for parts in zip(*apart, strict=True)]) <= 1e-12


def test_a_bare_callable_gets_the_gradient_of_a_bound_one():
    model, physics, _, y = imaging()
    y.requires_grad_()
    f = model.iteration.bind(y, physics)
    x_star, _ = model.solver(f, model.iteration.init(y, physics))
    assert isinstance(f, DifferentiableMap)
    inputs = [*model.parameters(), y]
    bound = torch.autograd.grad(model.hook(f, x_star).sin().sum(), inputs, retain_graph=True)  # both share Aᵀy
    bare = torch.autograd.grad(model.hook(lambda x: f(x), x_star).sin().sum(), inputs)
    assert relative_error(bare, bound) <= 1e-12


# Contract 4: independent of the batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter"])
def test_a_sample_does_not_depend_on_its_batch_mates(method):
    model, physics, x, _ = imaging(batch=4)
    x = x * torch.tensor([1.0, 1e-3, 1e3, 10.0], dtype=F64).reshape(-1, 1, 1, 1)
    y = physics.A(x)
    model.solver = Solver(method, max_iter=300, tol=1e-4)
    model.hook = ModularIDHook(Solver("gmres", tol=1e-4))

    def solve(y):
        y = y.clone().requires_grad_()
        x_hat = model(y, physics)
        (grad,) = torch.autograd.grad(x_hat.pow(2).sum(), y)
        return x_hat.detach(), grad, model.forward_stat["nstep"], model.hook.stat["nstep"]

    joint, alone = solve(y), [solve(y[i : i + 1]) for i in range(4)]
    assert len(set(joint[2].tolist())) > 1  # the samples do stop at different steps
    for together, apart in zip(joint, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-11, atol=1e-13)


# Memory: no graph between forward and backward (contract 5, the part that must hold from the start) ------------------


def test_no_graph_of_the_iteration_lives_between_forward_and_backward():
    model, physics, _, y = imaging()
    alive = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if torch.is_grad_enabled() or x.requires_grad:
                token = x.new_zeros(1)
                ctx.token = token
                alive.append(weakref.ref(token))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    inner = model.iteration.denoiser
    model.iteration.denoiser = nn.Sequential(inner)
    inner.register_forward_hook(lambda m, i, out: Probe.apply(out))
    loss = ei_loss(model, y, physics)
    gc.collect()
    assert not [r for r in alive if r() is not None]
    gc.disable()  # what backward taped must go at once, not when the garbage collector finds it
    try:
        loss.backward()
        left = [r for r in alive if r() is not None]
    finally:
        gc.enable()
    assert len(alive) == 2  # one taped evaluation for each of the two passes
    assert not left


def test_evaluation_mode_costs_the_solver_and_nothing_more():
    model, physics, _, y = imaging()
    calls = []
    model.iteration.denoiser.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(y, physics)
    assert len(calls) == model.forward_stat.evaluations


# Contract 5: cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("mode", ["implicit", "jfb"])
def test_chunks_do_not_change_the_gradient_and_tape_every_sample_once(template, mode):
    results, taped = {}, {}
    for size in (1, 2, 5):
        model, physics, _, y = imaging(template, batch=5, mode=mode)
        model.solver = Solver("anderson", max_iter=300, tol=1e-13, chunk_size=size)
        model.hook.solver = Solver("gmres", max_iter=200, tol=1e-13, chunk_size=size)
        taped[size] = []

        def count(module, args, out, sizes=taped[size]):
            sizes += [len(out)] if out.requires_grad else []

        model.iteration.denoiser.register_forward_hook(count)
        results[size] = gradients(ei_loss(model, y.requires_grad_(), physics), model, [y])
        assert mode == "jfb" or len(model.hook.stat["nstep"]) == 5
    for size in (1, 2):
        assert relative_error(results[size], results[5]) <= 1e-10
        assert max(taped[size]) == size and sum(taped[size]) == 2 * 5  # two passes
    assert taped[5] == [5, 5]


def test_chunks_tape_one_at_a_time():
    model, physics, _, y = imaging(batch=4)
    model.hook.solver = Solver("gmres", tol=1e-6, chunk_size=1)
    alive, most = [], []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if x.requires_grad:
                most.append(sum(r() is not None for r in alive))
                ctx.token = x.new_zeros(1)
                alive.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    model.iteration.denoiser.register_forward_hook(lambda m, i, out: Probe.apply(out))
    gc.disable()
    try:
        ei_loss(model, y, physics).backward()
    finally:
        gc.enable()
    assert len(most) == 8 and max(most) == 0  # whenever a graph is begun, none is left of those before


@pytest.mark.parametrize("template", TEMPLATES)
def test_physics_of_every_sample_get_their_gradient_in_chunks(template):
    gradients_ = {}
    for size in (1, 4):
        model, _, x, _ = imaging(template, batch=4)
        mask = torch.rand(4, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        physics = Inpainting((1, 4, 4), mask=mask.detach())
        physics.mask = mask
        model.solver = Solver("anderson", max_iter=300, tol=1e-13, chunk_size=size)
        model.hook.solver = Solver("gmres", max_iter=200, tol=1e-13, chunk_size=size)
        gradients_[size] = torch.autograd.grad(model(x, physics).sin().sum(), mask)
    assert relative_error(gradients_[1], gradients_[4]) <= 1e-10


@pytest.mark.parametrize("method", ["gmres", "anderson", "broyden"])
def test_preconditioning_changes_the_cost_and_not_the_gradient(method):
    kernel = torch.tensor([[0.0, 1, 0], [1, 2, 1], [0, 1, 0]])[None, None] / 6
    physics = BlurFFT((1, 16, 16), filter=kernel).to(F64)
    y = physics.A(torch.rand(2, 1, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(0)))
    results, cost = {}, {}
    for precondition in (True, False):
        model = DEQReconstructor(DEGrad(SmallDenoiser(), stepsize=0.1, data_weight=9.0)).to(F64)
        model.solver = Solver("anderson", max_iter=500, tol=1e-12, precondition=precondition)
        model.hook.solver = Solver(method, max_iter=500, tol=1e-12, precondition=precondition)
        x_hat = model(y.requires_grad_(), physics)
        results[precondition] = gradients(x_hat.sin().sum(), model, [y])
        cost[precondition] = model.forward_stat.evaluations, model.hook.stat.evaluations
    assert relative_error(results[True], results[False]) <= 1e-9
    assert cost[True][0] < cost[False][0] / 2 and cost[True][1] < cost[False][1] / 2


# Contract 6: stateless ---------------------------------------------------------------------------------------------


def test_nothing_of_a_solve_is_in_the_state_dict():
    model, physics, _, y = imaging()
    before = set(model.state_dict())
    ei_loss(model, y, physics).backward()
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_used_model_work(copier):
    model, physics, _, y = imaging()
    expected = gradients(ei_loss(model, y, physics), model, [])
    twin = copier(model)
    assert relative_error(gradients(ei_loss(twin, y, physics), twin, []), expected) <= 1e-12


def test_dtype_changes_and_reload():
    model, physics, _, y = imaging()
    expected = gradients(ei_loss(model, y, physics), model, [])
    model.float()
    single = gradients(ei_loss(model, y.float(), copy.deepcopy(physics).float()), model, [])
    assert single[0].dtype == torch.float32 and relative_error(single, expected) <= 1e-3
    other, *_ = imaging(seed=5)
    other.load_state_dict(imaging()[0].state_dict())
    assert relative_error(gradients(ei_loss(other, y, physics), other, []), expected) <= 1e-12


def test_no_object_survives_a_step():
    model, physics, _, y = imaging()

    def live_tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(5):
        model.zero_grad(set_to_none=True)
        ei_loss(model, y, physics).backward()
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1


def test_passes_leave_nothing_in_the_context_of_the_thread():
    importlib.import_module("torch._dynamo")  # the optimisers of PyTorch import it
    model, physics, _, y = imaging()
    sup_loss(model, y, physics).backward()
    size = len(contextvars.copy_context())
    for _ in range(3):
        sup_loss(model, y, physics).backward()
    assert len(contextvars.copy_context()) == size


# Contract 7: honest ------------------------------------------------------------------------------------------------


def test_a_missed_backward_tolerance_warns_once_and_can_raise():
    f, x_star, w = affine()
    c = x_star - x_star @ w.T
    w.requires_grad_()
    f = lambda x: x @ w.T + c  # noqa: E731
    hook = ModularIDHook(Solver("gmres", max_iter=3, tol=1e-8))
    with pytest.warns(ConvergenceWarning, match="0 of 3 samples reached"):
        hook(f, x_star).sum().backward()
    hook(f, x_star).sum().backward()  # the same cause is not repeated: pytest.ini makes the warning an error
    assert not hook.stat.converged.any() and hook.stat.evaluations == 3
    with pytest.raises(ConvergenceError, match="relative residual"):
        ModularIDHook(Solver("gmres", max_iter=3, on_failure="raise"))(f, x_star).sum().backward()


def test_a_tolerance_that_a_map_of_small_steps_meets_at_once_is_found_out():
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    w = q @ torch.diag(1 - torch.logspace(-2, 0, 40, dtype=F64)) @ q.T
    x_star, eta = torch.ones(2, 40, dtype=F64), 1e-3
    c = x_star - x_star @ w.T
    w.requires_grad_()
    slow = lambda x: x + eta * (x @ w.T + c - x)  # noqa: E731
    exact = dense_gradient(slow, x_star, torch.ones_like(x_star), [w])

    def solved(tol):
        hook = ModularIDHook(Solver("gmres", max_iter=300, tol=tol))
        return hook, torch.autograd.grad(hook(slow, x_star).sum(), w)

    with pytest.warns(ConvergenceWarning, match="of the cotangent unaccounted for.*Lower tol"):
        hook, loose = solved(1e-2)
    assert hook.stat.converged.all() and hook.stat.remainder.min() > 0.5
    assert relative_error(loose, exact) > 0.5
    hook, tight = solved(1e-8)  # no warning: pytest.ini makes it an error
    assert relative_error(tight, exact) <= 1e-3 and hook.stat.remainder.max() <= 1e-3
    ModularIDHook(Solver("gmres", tol=1e-2, on_failure="ignore"))(slow, x_star).sum().backward()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_the_remainder_is_measured_in_parts_of_the_cotangent(size):
    f, x_star, w = affine(batch=2)
    w.requires_grad_()
    hook = ModularIDHook(Solver("gmres", max_iter=6, tol=1e-12, on_failure="ignore"))
    x_hat = hook(f, x_star)
    g = size * torch.ones_like(x_star)
    torch.autograd.grad(x_hat, w, g)
    assert hook.stat.remainder.shape == (2,)
    assert bool((hook.stat.remainder < 0.5).all()) and bool((hook.stat.remainder > (0 if size else -1)).all())
    residual = hook.stat["abs_lowest"] / size if size else torch.zeros(2, dtype=F64)
    torch.testing.assert_close(hook.stat.remainder, residual / 40**0.5, rtol=1e-6, atol=0)


def test_a_map_that_couples_the_batch_is_found_out():
    mix = torch.full((3, 3), 0.3, dtype=F64, requires_grad=True)
    c = torch.randn(3, 4, dtype=F64)
    f = lambda x: mix @ torch.tanh(x) + c  # noqa: E731
    x_star, _ = Solver("anderson", batched=False, tol=1e-13, max_iter=200)(f, torch.zeros_like(c))
    with pytest.warns(ConvergenceWarning, match="batched=False"):
        ModularIDHook(Solver("gmres", max_iter=30, tol=1e-10))(f, x_star).sin().sum().backward()
    x_hat = ModularIDHook(Solver("gmres", max_iter=60, tol=1e-13, batched=False))(f, x_star)
    exact = dense_gradient(f, x_star, torch.cos(x_star), [mix])
    assert relative_error(torch.autograd.grad(x_hat.sin().sum(), mix), exact) <= 1e-8


def test_a_hidden_trainable_tensor_is_an_error_not_a_lost_gradient():
    hidden = torch.tensor(0.5, dtype=F64, requires_grad=True)

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = lambda x: x * hidden

        def forward(self, x):
            return self.scale(x)

    _, physics, _, y = imaging()
    model = DEQReconstructor(DEProx(nn.Sequential(SmallDenoiser().to(F64), Closure()), stepsize=0.5))
    with pytest.raises(RuntimeError, match="gradient would be lost"):
        model(y, physics).sum().backward()


def test_bad_settings():
    with pytest.raises(ValueError, match="must be one of implicit, jfb"):
        ModularIDHook(mode="unrolled")


# Higher order -------------------------------------------------------------------------------------------------------


def tower(x_hat, inputs, orders):
    r"""Derivatives of a loss along fixed directions, each taken of the one before: gradients of order 1 to ``orders``."""
    rng = torch.Generator().manual_seed(1)
    out, value = [], x_hat.sin().sum()
    for order in range(1, orders + 1):
        grads = torch.autograd.grad(value, inputs, create_graph=order < orders, materialize_grads=True)
        out.append(grads)
        value = sum((g * torch.randn(g.shape, generator=rng, dtype=g.dtype)).sum() for g in grads)
    return out


@pytest.mark.parametrize("template", TEMPLATES)
def test_gradients_of_any_order_equal_those_of_an_unrolled_solve(template):
    model, physics, _, y = imaging(template)
    inputs = [*model.parameters(), y.requires_grad_()]
    ours = tower(model(y, physics), inputs, 3)
    exact = tower(unrolled(model, y, physics, 120), inputs, 3)
    for order, (a, b) in enumerate(zip(ours, exact, strict=True), 1):
        assert relative_error(a, b) <= 1e-8, order


def test_derivatives_of_a_scalar_equation():
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    f = Parametric(lambda x, a: a * torch.cos(x), a)
    with torch.no_grad():
        x, _ = Solver("anderson", tol=1e-15)(f, torch.zeros(1, 1, dtype=F64))
    (first,) = torch.autograd.grad(ModularIDHook(Solver("gmres", tol=1e-14))(f, x).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    s, c = x.sin().item(), x.cos().item()
    assert first.item() == pytest.approx(c / (1 + 0.5 * s), rel=1e-13)
    # the derivative of x' = cos x / (1 + a sin x), with x' again
    d = c / (1 + 0.5 * s)
    assert second.item() == pytest.approx(
        (-s * d * (1 + 0.5 * s) - c * (s + 0.5 * c * d)) / (1 + 0.5 * s) ** 2, rel=1e-12
    )


def test_finite_differences_agree_with_second_derivatives():
    model, physics, _, y = imaging(side=2, batch=1)
    assert torch.autograd.gradgradcheck(lambda y: model(y, physics), y.requires_grad_(), atol=1e-6)


def test_a_second_derivative_through_two_passes_of_the_model():
    model, physics, _, y = imaging()

    def curvature(reconstruct):
        grads = torch.autograd.grad(ei_loss(reconstruct, y, physics), list(model.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters()))

    exact = curvature(lambda y, physics: unrolled(model, y, physics, 120))
    assert relative_error(curvature(model), exact) <= 1e-8


def test_a_state_of_several_tensors_and_a_linear_map_have_second_derivatives():
    w = torch.tensor(0.4, dtype=F64, requires_grad=True)
    # (u, v) = (w v + 1, w u + u²/9): linear in one of them
    f = Parametric(lambda x, w: (w * x[1] + 1, w * x[0] + x[0].square() / 9), w)
    start = (torch.zeros(2, 1, dtype=F64), torch.zeros(2, 1, dtype=F64))
    with torch.no_grad():
        star, _ = Solver("anderson", tol=1e-15, max_iter=100)(f, start)
    ours = tower(torch.cat(ModularIDHook(Solver("gmres", tol=1e-14))(f, star)), [w], 3)
    state = start
    for _ in range(200):
        state = f(state)
    for a, b in zip(ours, tower(torch.cat(state), [w], 3), strict=True):
        assert relative_error(a, b) <= 1e-10


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_second_derivatives_where_the_solves_are_preconditioned_or_chunked(chunk_size):
    physics = BlurFFT((1, 8, 8), filter=torch.tensor([[[[0.2, 0.6, 0.2]]]])).to(F64)
    settings = {"max_iter": 300, "tol": 1e-13, "chunk_size": chunk_size}
    model = DEQReconstructor(
        DEGrad(SmallDenoiser(), stepsize=0.5).to(F64),
        solver=Solver("anderson", **settings),
        hook=ModularIDHook(Solver("gmres", **settings)),
    )
    y = physics(torch.rand(3, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    inputs = [*(p for p in model.parameters() if p.requires_grad), y]
    for a, b in zip(
        tower(model(y, physics), inputs, 2), tower(unrolled(model, y, physics, 120), inputs, 2), strict=True
    ):
        assert relative_error(a, b) <= 1e-8


def test_second_derivatives_of_a_complex_state():
    w = torch.tensor(0.7 + 0.3j, dtype=torch.complex128, requires_grad=True)
    f = Parametric(lambda x, w: 0.4 * w * torch.sin(x) + (1 + 0.5j), w)

    def derivatives(x_hat):
        loss = x_hat.abs().square().sum() + x_hat.real.sin().sum()
        (first,) = torch.autograd.grad(loss, w, create_graph=True)
        return first, *torch.autograd.grad(first.abs().square(), w)

    x = torch.zeros(2, 3, dtype=torch.complex128)
    with torch.no_grad():
        x_star, _ = Solver("anderson", tol=1e-15, max_iter=100)(f, x)
    for _ in range(100):
        x = f(x)
    for a, b in zip(derivatives(ModularIDHook(Solver("gmres", tol=1e-14))(f, x_star)), derivatives(x), strict=True):
        assert relative_error(a, b) <= 1e-12


@pytest.mark.parametrize("mode, bare", [("implicit", True), ("jfb", True), ("jfb", False)])
@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.pow(2).sum()])  # with a constant cotangent too
def test_second_order_gradients_are_refused_where_they_would_be_wrong(mode, bare, loss):
    model, physics, _, y = imaging(mode=mode)
    y.requires_grad_()
    f = model.iteration.bind(y, physics)
    x_star, _ = model.solver(f, model.iteration.init(y, physics))
    x_hat = model.hook((lambda x: f(x)) if bare else f, x_star)
    (grad,) = torch.autograd.grad(loss(x_hat), y, create_graph=True)
    with pytest.raises(RuntimeError, match="Second-order"):
        grad.pow(2).sum().backward()


def test_a_graph_of_second_order_is_freed_at_once():
    model, physics, _, y = imaging()
    f = model.iteration.bind(y.requires_grad_(), physics)
    x_star, _ = model.solver(f, model.iteration.init(y, physics))
    (grad,) = torch.autograd.grad(model.hook(f, x_star).sin().sum(), y, create_graph=True)
    held = weakref.ref(f)
    del f
    assert held() is not None
    del grad
    assert held() is None  # a cycle would wait for the garbage collector


# Contract 8: the physics of the forward pass -----------------------------------------------------------------------


def test_gradient_is_of_the_physics_at_forward_time():
    model, physics, _, y = imaging()
    expected = gradients(sup_loss(model, y, physics), model, [])
    loss = sup_loss(model, y, physics)
    other = torch.randn_like(physics.matrix)
    physics.update(matrix=other)
    assert torch.equal(physics.matrix, other)
    assert relative_error(gradients(loss, model, []), expected) <= 1e-12
    assert torch.equal(physics.matrix, other)  # and the user's physics is as they left it


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_changed_in_place_is_an_error(frozen):
    model, physics, _, y = imaging()
    weight = model.iteration.denoiser.conv.weight.requires_grad_(not frozen)
    loss = sup_loss(model, y.requires_grad_(), physics)
    with torch.no_grad():
        weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|changed in place"):
        loss.backward()


def test_a_weight_frozen_after_the_forward_pass_changes_nothing():
    model, physics, _, y = imaging()
    weight, bias = model.iteration.denoiser.conv.weight, model.iteration.denoiser.conv.bias
    expected = torch.autograd.grad(sup_loss(model, y, physics), bias)
    loss = sup_loss(model, y, physics)
    weight.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(loss, bias), expected)


def test_a_map_bound_without_gradients_is_not_trained_through_in_silence():
    model, physics, _, y = imaging()
    with torch.no_grad():
        f = model.iteration.bind(y, physics)
        x_star, _ = model.solver(f, model.iteration.init(y, physics))
        assert model.hook(f, x_star) is x_star
    with pytest.raises(RuntimeError, match="bound under torch.no_grad"):
        model.hook(f, x_star)


def test_a_physics_changed_in_place_is_an_error():
    model, physics, _, y = imaging()
    loss = sup_loss(model, y, physics)
    physics.matrix.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
