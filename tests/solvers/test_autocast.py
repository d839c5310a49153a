r"""Autocast is for the map: the algebra of a solver stays in the precision of the state."""

from __future__ import annotations

import threading
import warnings

import deepinv as dinv
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepinv_deq import ConvergenceWarning, DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver
from deepinv_deq.maps import AffineMap, Map
from deepinv_deq.states import orthogonalised
from tests.problems import affine, relative_error
from tests.solvers import OURS

HALF = [torch.bfloat16, torch.float16]


def exact_inside(f):
    r"""The same function, computed in the precision of its argument whatever the caller's setting."""

    def exact(*args):
        with torch.autocast("cpu", enabled=False):
            return f(*args)

    return exact


def setting():
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", OURS)
def test_a_map_in_single_precision_is_solved_as_without_autocast(method, dtype):
    f, exact, w = affine(high=0.9, dtype=torch.float32)
    f, c = exact_inside(f), f(torch.zeros_like(exact))
    for g in (f, AffineMap(exact_inside(lambda b: b @ w.T), c)):
        solver = Solver(method, tol=1e-5, max_iter=300)
        x, stat = solver(g, torch.zeros_like(c))
        with torch.autocast("cpu", dtype=dtype):
            again, under = solver(g, torch.zeros_like(c))
        assert torch.equal(x, again) and torch.equal(stat["rel_trace"], under["rel_trace"])
        assert stat.outcome == under.outcome and under.converged.all() and relative_error(x, exact) <= 1e-3


@pytest.mark.parametrize("dtype", HALF)
def test_an_adjoint_in_single_precision_is_solved_as_without_autocast(dtype):
    f, x_star, w = affine(high=0.9, dtype=torch.float32)
    c = (x_star - x_star @ w.T).requires_grad_()
    hook, gradients = ModularIDHook(Solver("gmres", tol=1e-5)), []

    class Exact(torch.autograd.Function):  # autograd leaves the setting of the backward pass to its functions
        @staticmethod
        def forward(ctx, x):
            return exact_inside(torch.matmul)(x, w.T)

        @staticmethod
        def backward(ctx, g):
            return exact_inside(torch.matmul)(g, w)

    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            x_hat = hook(lambda x: Exact.apply(x) + c, x_star)
        gradients += torch.autograd.grad(x_hat.sum(), c)
        assert hook.stat.converged.all()
    assert torch.equal(*gradients)


class Watched(Map):
    r"""An affine map with everything that a map may offer. ``seen`` lists the setting in which each part was used."""

    def __init__(self, w, c, seen):
        self.w, self.c, self.seen = w, c, seen

    def _see(self, name):
        self.seen.setdefault(name, set()).add(setting())

    def __call__(self, x):
        self._see("image")
        return x + self.step(x)

    def step(self, x):
        self._see("step")
        return 0.5 * (self.c + x @ self.w.T - x)

    def preconditioner(self, x):
        self._see("makes a preconditioner")
        return lambda r: self._see("preconditioner") or 1.5 * r

    def natural(self, x):
        self._see("makes natural units")
        return lambda r: self._see("natural") or 2 * r

    def select(self, rows):
        self._see("select")
        return Watched(self.w, self.c[rows], self.seen)


@pytest.mark.parametrize("method", ["anderson", "broyden", "simple_fixed_point_iter"])
@pytest.mark.parametrize("chunk_size", [None, 6])
def test_every_part_of_a_map_runs_in_the_setting_of_the_caller(method, chunk_size):
    _, _, w = affine(n=8, dtype=torch.float32)
    c, seen = torch.randn(6, 8), {}
    c[:5], half = 0, (True, torch.bfloat16)  # samples that are done at once
    w, c = (
        torch.block_diag(*[w] * 1000) if method == "anderson" else w,
        c.repeat(1, 1000 if method == "anderson" else 1),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solver = Solver(method, tol=1e-2, on_failure="ignore", chunk_size=chunk_size)
        solver(Watched(w, c, seen), torch.zeros_like(c))
        inside = setting()
    assert inside == half and setting()[0] is False
    parts = {"step", "makes natural units", "natural"}
    assert parts <= seen.keys() and all(settings == {half} for settings in seen.values())
    assert method != "anderson" or {"preconditioner", "select"} <= seen.keys()


def test_nested_settings_and_exceptions_leave_the_setting_as_it_was():
    seen = []

    def f(x):
        seen.append(setting())
        if len(seen) > 3:
            raise ZeroDivisionError
        return torch.cos(x)

    with torch.autocast("cpu", dtype=torch.float16):
        with torch.autocast("cpu", enabled=False):
            Solver(max_iter=1, on_failure="ignore")(f, torch.zeros(2, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            Solver(max_iter=2, on_failure="ignore")(f, torch.zeros(2, 3))
            with pytest.raises(ZeroDivisionError):
                Solver()(f, torch.zeros(2, 3))
            assert setting() == (True, torch.bfloat16)
        assert setting() == (True, torch.float16)
    assert not setting()[0] and not seen[0][0] and set(seen[1:]) == {(True, torch.bfloat16)}


def test_every_thread_has_its_own_setting():
    seen, barrier = {}, threading.Barrier(3)

    def solve(dtype):
        def f(x):
            barrier.wait(60)
            seen.setdefault(dtype, []).append(setting()[1] if setting()[0] else None)
            return 0.5 * x + 1

        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            Solver("fixed_point_iter", tol=1e-30, max_iter=6, on_failure="ignore")(f, torch.zeros(1, 2))

    threads = [threading.Thread(target=solve, args=(dtype,)) for dtype in (None, *HALF)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {dtype: [dtype] * 6 for dtype in (None, *HALF)}


class Casts(TorchDispatchMode):
    r"""Counts how often a tensor of some shape is cast to another type."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cast = func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        self.count += cast and args[0].dtype != (kwargs or {}).get("dtype")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cached", [True, False])
def test_weights_are_cast_once_in_a_solve_and_never_for_a_graph(cached):
    layer, x = nn.Linear(7, 7), torch.zeros(2, 7)
    nn.init.normal_(layer.weight, std=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
        with Casts(layer.weight.shape) as casts:
            _, stat = Solver(tol=1e-2)(layer, x)
        (gradient,) = torch.autograd.grad(layer(x + 1).sum(), layer.weight)
        assert torch.is_autocast_cache_enabled() == cached
    assert stat.evaluations > 2 and casts.count == (1 if cached else stat.evaluations)
    assert gradient.abs().min() > 0


def test_without_autocast_nothing_is_switched(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("autocast was switched")

    monkeypatch.setattr(torch, "autocast", refuse)
    f, exact, _ = affine(high=0.9)
    for method in OURS:
        assert Solver(method, tol=1e-6, max_iter=300)(f, torch.zeros_like(exact))[1].converged.all()


@pytest.mark.parametrize("template", [DEProx, DEGrad])
@pytest.mark.parametrize("dtype", HALF)
def test_messages_name_the_precision_of_a_network_under_autocast(template, dtype):
    torch.manual_seed(0)
    network = EquilibriumUNet(1, channels=(4, 8), contraction=0.7)
    nn.init.normal_(network.Conv_1x1.weight, std=0.02)
    physics = dinv.physics.Inpainting((1, 8, 8), mask=(torch.arange(8) % 2 == 0).float().expand(1, 8, 8))
    y = physics.A(torch.rand(2, 1, 8, 8))
    solver = Solver("anderson", tol=1e-7, max_iter=300, on_failure="ignore")
    model = DEQReconstructor(
        template(network, stepsize=0.5), solver=solver, hook=ModularIDHook(Solver("gmres", tol=1e-6))
    )
    with torch.autocast("cpu", dtype=dtype):
        x_hat = model(y, physics)
    assert f"{str(dtype)[6:]} cannot reach 1.0e-07" in model.forward_stat.outcome
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ConvergenceWarning)
        x_hat.float().square().sum().backward()
    said = [str(w.message) for w in warned if w.category is ConvergenceWarning]
    assert any(f"products in {str(dtype)[6:]} cannot reach 1.0e-06" in message for message in said)
    assert not any("float32" in message for message in said)


def test_messages_name_the_precision_of_a_map_that_switches_autocast_off():
    f, exact, _ = affine(high=0.9, dtype=torch.float32)
    f, solver = exact_inside(f), Solver("anderson", tol=1e-12, max_iter=400, on_failure="ignore")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, stat = solver(f, torch.zeros_like(exact))
    assert "float32 cannot reach 1.0e-12" in stat.outcome and stat.residual.max() <= 1e-6


def test_gram_schmidt_is_not_cast():
    w, basis = torch.randn(2, 50), torch.linalg.qr(torch.randn(2, 50, 5))[0].mT.contiguous()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rest, components = orthogonalised(w, basis, basis)
    assert rest.dtype == torch.float32 and (torch.bmm(basis, rest[..., None]).abs() <= 1e-6).all()
    torch.testing.assert_close(components.float(), torch.bmm(basis, w[..., None])[..., 0], rtol=1e-5, atol=1e-6)
