r"""The settings of a solver, the names of methods, and new methods."""

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
from deepinv_deq.solvers import METHODS, Method, available_methods
from tests.problems import F64, Batch, affine, relative_error
from tests.solvers import OURS, RATES, residual


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
        ("anderson", {"max_iter": 1e2}, "max_iter must be an integer, got 100.0"),
        ("anderson", {"chunk_size": 2.0}, "chunk_size must be an integer, got 2.0"),
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


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter"])
def test_a_map_that_writes_to_its_argument_is_refused(method):
    x0 = torch.full((1, 3), 0.3)
    with pytest.raises(RuntimeError, match="wrote to its argument in place"):
        Solver(method)(lambda x: x.mul_(0.5).add_(1), x0)
    assert torch.equal(x0, torch.full((1, 3), 0.3))


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter", "gmres", "simple_fixed_point_iter"])
def test_the_solution_is_no_memory_of_the_map(method):
    memory = torch.ones(2, 3)
    x, _ = Solver(method, tol=1e-6)(lambda x: memory, torch.zeros(2, 3))
    x.mul_(2)
    assert torch.equal(memory, torch.ones(2, 3))
