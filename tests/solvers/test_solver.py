r"""The settings of a solver, the names of methods, and what a solve costs."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torchdeq.solver import _solvers, get_solver, register_solver
from torchdeq.solver.anderson import anderson_solver

from deepinv_deq import ConvergenceWarning, Solver
from deepinv_deq.maps import AffineMap, Map
from deepinv_deq.solvers import METHODS, Method, available_methods
from tests.problems import F64, Batch, Synchronisations, affine, relative_error
from tests.solvers import NONLINEAR, OURS, residual


def test_any_registered_method_works_and_is_judged_by_its_true_residual():
    register_solver("test_liar", lambda func, x0, **_: (func(x0), [], {"rel_lowest": torch.zeros(len(x0))}))
    try:
        _, stat = Solver("test_liar", on_failure="ignore")(lambda x: 0.5 * x + 1, torch.zeros(2, 3))
    finally:
        del _solvers["test_liar"]
    assert not stat.converged.any() and torch.allclose(stat.residual, torch.tensor(0.5)) and stat.evaluations == 2
    x, stat = Solver("simple_fixed_point_iter", max_iter=60)(lambda x: 0.5 * x + 1, torch.zeros(2, 3))
    assert stat.converged.all()


def test_ours_does_not_replace_torchdeqs():
    assert get_solver("anderson") is anderson_solver
    assert set(OURS) <= set(available_methods())


@pytest.mark.parametrize(
    "method,settings_,message",
    [
        ("newton", {}, "must be one of anderson, broyden"),
        ("anderson", {"tol": 0.0}, "tol .* must be positive"),
        ("anderson", {"tol": math.nan}, "tol .* must be positive"),
        ("anderson", {"max_iter": 0}, "max_iter .* at least 1"),
        ("anderson", {"history": 0}, "history must be at least 1"),
        ("anderson", {"chunk_size": 0}, "chunk_size must be at least 1"),
        ("gmres", {"sync_every": 0}, "sync_every must be at least 1"),
        ("anderson", {"damping": 0.0}, r"damping must be in \(0, 1\]"),
        ("anderson", {"on_failure": "shout"}, "must be one of warn, raise, ignore"),
    ],
)
def test_bad_settings(method, settings_, message):
    with pytest.raises(ValueError, match=message):
        Solver(method, **settings_)


def test_a_solver_is_frozen_and_copies():
    options = {"extra": 1}
    solver = Solver("simple_fixed_point_iter", tol=1e-3, options=options)
    with pytest.raises(AttributeError):
        solver.tol = 1.0
    options["extra"] = 2
    assert solver.options["extra"] == 1  # the user's dictionary is neither kept nor changed
    with pytest.raises(ValueError, match="'anderson' takes its settings as arguments of Solver, not extra"):
        Solver("anderson", options=options)
    x, _ = Solver("simple_fixed_point_iter", options={"tau": 0.5}, max_iter=3, on_failure="ignore")(
        lambda x: x * 0 + 8, torch.zeros(1, 1)
    )
    assert x.item() == 7.0  # 4, 6, 7: options have the last word
    for twin in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert twin == solver and hash(twin) == hash(solver)
        assert twin(torch.cos, torch.zeros(1, 1))[1].converged.all()


def test_the_result_has_no_graph():
    a = torch.tensor(0.5, requires_grad=True)
    x, stat = Solver("anderson")(lambda x: a * x + 1, torch.zeros(2, 3))
    assert not x.requires_grad and not stat.residual.requires_grad


def test_a_solver_is_plain_data():
    for solver in (Solver("gmres", tol=1e-3), Solver("simple_fixed_point_iter", options={"extra": 1})):
        plain = dataclasses.asdict(solver)
        assert Solver(**plain) == solver and set(plain) == {f.name for f in dataclasses.fields(Solver)}
    assert dataclasses.replace(solver, tol=0.5).options == {"extra": 1}
    with pytest.raises(TypeError, match="cannot be changed"):
        solver.options["extra"] = 2


def test_names_of_0_1_can_be_imported():
    from deepinv_deq.solvers import ConvergenceError, SolverStat, anderson, broyden, fixed_point_iter, gmres  # noqa: F401
    from deepinv_deq.solvers.anderson import Anderson  # a module and a function of that name
    from deepinv_deq.states import State, as_tuple  # noqa: F401

    assert METHODS["anderson"] is Anderson
    f, exact, _ = affine(high=0.9)
    for function in (anderson, broyden, fixed_point_iter, gmres):
        x, samples, stat = function(f, torch.zeros_like(exact), max_iter=400, tol=1e-8)
        assert samples == [] and stat["converged"].all() and relative_error(x, exact) <= 1e-6


# A new method ------------------------------------------------------------------------------------------------------


class Aitken(Method):
    r"""Irons and Tuck's form of Aitken's method: one step length per sample, from the last two residuals."""

    def __init__(self, x0, settings):
        self.g, self.length = None, x0.new_ones(len(x0), 1)

    def update(self, x, fx, restart):
        g, old = fx - x, self.g
        if old is not None:
            length = -self.length * (old * (g - old)).sum(1, keepdim=True) / (g - old).square().sum(1, keepdim=True)
            self.length = torch.where(torch.isfinite(length) & ~restart[:, None], length, 1.0)
        self.g = g
        return x + self.length * g

    def keep(self, rows):
        self.g, self.length = self.g[rows], self.length[rows]


def test_a_new_method_is_one_class_and_one_line(monkeypatch):
    with pytest.raises(ValueError, match="Unknown solver method 'aitken'"):
        Solver("aitken")
    monkeypatch.setitem(METHODS, "aitken", Aitken)
    assert "aitken" in available_methods()
    f = Batch(RATES, 2**13)  # large enough for samples to be dropped
    x, stat = Solver("aitken", max_iter=300, tol=1e-9, chunk_size=6)(f, torch.zeros(6, 2**13, dtype=F64))
    plain = Solver("fixed_point_iter", max_iter=300, tol=1e-9, chunk_size=6)(f, torch.zeros(6, 2**13, dtype=F64))[1]
    assert stat.converged.all() and bool((residual(f, x) <= 1.01e-9).all()) and min(f.calls) == 3
    assert int(stat["nstep"].sum()) < int(plain["nstep"].sum())
    alone, single = Solver("aitken", max_iter=300, tol=1e-9)(f.select(slice(1, 2)), torch.zeros(1, 2**13, dtype=F64))
    assert single["nstep"] == stat["nstep"][1] and relative_error(x[1:2], alone) <= 1e-12


# One meaning of a tolerance ----------------------------------------------------------------------------------------


class Descent(Map):
    r"""``x ↦ x − η (H x − c)``: the same fixed point for any ``η``, and residuals proportional to it."""

    def __init__(self, hessian, c, eta, preconditioned=False):
        self.hessian, self.c, self.eta, self.preconditioned = hessian, c, eta, preconditioned

    def step(self, x):
        return -self.eta * (x @ self.hessian - self.c)

    def __call__(self, x):
        return x + self.step(x)

    def natural(self, x):
        return self.preconditioner(x) or (lambda r: r / self.eta)

    def preconditioner(self, x):
        near = torch.linalg.inv(self.hessian + 0.05 * torch.eye(len(self.hessian), dtype=x.dtype)) / self.eta
        return (lambda r: r @ near) if self.preconditioned else None


def descent(dtype=F64, **settings):
    q = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    hessian = q @ torch.diag(torch.linspace(0.2, 1.5, 30, dtype=F64)) @ q.T
    c = torch.randn(2, 30, generator=torch.Generator().manual_seed(1), dtype=F64)
    exact = torch.linalg.solve(hessian, c.T).T
    return lambda eta: Descent(hessian.to(dtype), c.to(dtype), eta, **settings), exact, torch.zeros_like(c.to(dtype))


@pytest.mark.parametrize("method", ["anderson", "broyden"])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_tolerance_does_not_depend_on_the_stepsize(method, preconditioned, dtype):
    problem, exact, x0 = descent(dtype, preconditioned=preconditioned)
    solver, evaluations = Solver(method, max_iter=600, tol=1e-4), []
    for eta in (1.0, 0.1, 0.01, 0.001):
        x, stat = solver(problem(eta), x0)
        # the smallest eigenvalue of H is 0.2: the criterion bounds the error up to that
        assert stat.converged.all() and relative_error(x, exact) <= 1e-3
        natural = problem(eta).natural(x)(problem(eta).step(x))
        torch.testing.assert_close(stat.residual, natural.norm(dim=1) / x.norm(dim=1), rtol=1e-2, atol=1e-9)
        assert bool((stat.plain_residual <= 2 * max(eta, 0.01) * stat.residual + 1e-6).all()) or preconditioned
        evaluations.append(stat.evaluations)
    if preconditioned:
        assert max(evaluations) - min(evaluations) <= 1, evaluations
    if method == "anderson":
        assert evaluations[1] <= 2 * evaluations[0], evaluations


def test_the_criterion_is_the_same_without_preconditioning():
    problem, exact, x0 = descent(preconditioned=True)
    f = problem(0.5)
    for precondition in (True, False):
        x, stat = Solver("anderson", max_iter=200, tol=1e-6, precondition=precondition)(f, x0)
        measured = f.natural(x)(f.step(x)).norm(dim=1) / x.norm(dim=1)
        torch.testing.assert_close(stat.residual, measured, rtol=1e-6, atol=0)
        assert stat.converged.all() and relative_error(x, exact) <= 1e-5


class WithoutStep(Descent):
    r"""The same map without its way to the residual."""

    step = Map.step

    def __call__(self, x):
        return x - self.eta * (x @ self.hessian - self.c)


def test_a_step_without_cancellation_is_used():
    problem, exact, x0 = descent(torch.float32, preconditioned=True)
    f = problem(1e-4)
    solver = Solver("anderson", max_iter=200, tol=2e-6, on_failure="ignore")
    x, stat = solver(f, x0)
    assert stat.converged.all() and relative_error(x, exact) <= 2e-5
    x, stat = solver(WithoutStep(f.hessian, f.c, f.eta, True), x0)  # F(x) - x is all rounding
    assert not stat.converged.any() and stat["at_floor"].all() and relative_error(x, exact) > 1e-5


# Cost --------------------------------------------------------------------------------------------------------------

RATES = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.0, 0.3], dtype=F64)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_chunks_change_the_cost_and_nothing_else(method, size):
    settings_ = {"method": method, "max_iter": 300, "tol": 1e-9}
    whole, chunked = Batch(RATES, 50), Batch(RATES, 50)
    x0 = torch.zeros(6, 50, dtype=F64)
    x, stat = Solver(**settings_, chunk_size=6)(whole, x0)
    again, parts = Solver(**settings_, chunk_size=size)(chunked, x0)
    torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    assert torch.equal(parts["nstep"], stat["nstep"]) and parts.converged.all()
    torch.testing.assert_close(parts.residual, stat.residual, rtol=1e-3, atol=1e-13)
    assert set(whole.calls) == {6} and max(chunked.calls) == size
    assert stat.work == stat.evaluations == len(whole.calls)
    assert parts.evaluations == stat.evaluations and parts.work == pytest.approx(sum(chunked.calls) / 6)
    assert parts["rel_trace"].shape == stat["rel_trace"].shape and "6 of 6" in parts.outcome


def test_chunks_work_for_methods_of_others():
    f, x0 = Batch(RATES[:4], 50), torch.zeros(4, 50, dtype=F64)
    x, stat = Solver("simple_fixed_point_iter", max_iter=150, tol=1e-3, chunk_size=2)(f, x0)
    assert max(f.calls) == 2 and stat.converged.all() and (f(x) - x).norm() <= 1e-3 * x.norm()


def test_chunks_by_default_have_as_many_samples_as_a_cache_holds():
    for n, expected in ((2**17, 1), (2**14, 2), (10000, 4), (8, 6)):
        f = Batch(RATES.float(), n)
        Solver("fixed_point_iter", max_iter=1, on_failure="ignore")(f, torch.zeros(6, n))
        assert max(f.calls) == expected


@pytest.mark.parametrize("method", NONLINEAR)
def test_samples_that_are_done_are_dropped_from_the_batch(method):
    n = 2**14  # enough numbers for it to be worth while
    solver = Solver(method, max_iter=400, tol=1e-9, chunk_size=6, history=40 if method == "broyden" else None)
    f, plain = Batch(RATES, n), Batch(RATES, n)
    x, stat = solver(f, torch.zeros(6, n, dtype=F64))
    y, reference = solver(lambda x: plain(x), torch.zeros(6, n, dtype=F64))
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert torch.equal(stat["nstep"], reference["nstep"]) and stat.converged.all()
    torch.testing.assert_close(stat["rel_trace"], reference["rel_trace"], rtol=1e-3, atol=1e-13)
    torch.testing.assert_close(stat.residual, residual(plain, x), rtol=1e-3, atol=1e-14)
    assert plain.calls.count(6) == len(plain.calls) > f.calls.count(6)
    assert stat.evaluations == len(f.calls) == reference.evaluations and stat.work == sum(f.calls) / 6
    # never more samples than twice those that still need it
    needed = [int((stat["nstep"] > k).sum()) for k in range(len(f.calls))]
    assert all(size <= max(2 * need - 1, 1) or size == 6 for size, need in zip(f.calls, needed, strict=True))


def test_a_broken_sample_is_dropped_and_reported():
    f = Batch(RATES, 4000)
    f.c[4] = math.nan
    with pytest.warns(ConvergenceWarning, match="5 of 6"):
        x, stat = Solver("anderson", max_iter=400, tol=1e-9, chunk_size=6)(f, torch.zeros(6, 4000, dtype=F64))
    assert stat.converged.tolist() == [True] * 4 + [False, True] and torch.isfinite(x).all()
    assert stat["nstep"][4] == 1


@pytest.mark.parametrize("method", OURS)
def test_the_host_waits_as_often_as_it_is_told_to(method):
    f, exact, w = affine()
    c = f(torch.zeros_like(exact))
    waits, results = {}, {}
    for every in (1, 4, 1000):
        solver = Solver(method, max_iter=25, tol=1e-30, sync_every=every, on_failure="ignore")
        with Synchronisations() as mode:
            results[every] = solver(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
        waits[every] = mode.count
    assert waits[1] - waits[1000] >= 24 > 7 >= waits[4] - waits[1000] and waits[1000] <= 8
    for every in (4, 1000):
        assert torch.equal(results[every][0], results[1][0])


@pytest.mark.parametrize("method", OURS)
def test_a_host_that_looks_rarely_changes_no_result(method):
    f, exact, w = affine()
    maps = [f] if method != "gmres" else [f, AffineMap(lambda b: b @ w.T, f(torch.zeros_like(exact)))]
    for g in maps:
        x, stat = Solver(method, max_iter=1000, tol=1e-8)(g, torch.zeros_like(exact))
        y, rare = Solver(method, max_iter=1000, tol=1e-8, sync_every=7)(g, torch.zeros_like(exact))
        assert torch.equal(x, y) and torch.equal(stat["nstep"], rare["nstep"])
        assert stat.evaluations <= rare.evaluations <= stat.evaluations + 6


class Named(torch.nn.Module):
    r"""A callable with submodules and attributes that have the names of a map's methods."""

    def __init__(self):
        super().__init__()
        self.select, self.preconditioner, self.rebind = (torch.nn.Linear(4, 4) for _ in range(3))
        self.inputs, self.diagnose, self.separable = (torch.ones(1),), "text", True

    def forward(self, x):
        return 0.5 * torch.tanh(x) + 1


def test_attributes_of_a_callable_are_no_methods_of_a_map():
    f = Named()
    x, stat = Solver("anderson", tol=1e-6, chunk_size=1)(f, torch.zeros(3, 4))
    assert stat.converged.all() and torch.allclose(f(x), x, atol=1e-5)
    with pytest.warns(ConvergenceWarning):
        Solver("anderson", tol=1e-9, max_iter=2)(f, torch.zeros(3, 4))
