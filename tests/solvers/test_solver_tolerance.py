r"""The tolerance of a solver has one meaning for every map."""

from __future__ import annotations

import pytest
import torch

from deepinv_deq import Solver
from deepinv_deq.maps import Map
from tests.problems import F64, relative_error


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


class Plain:
    r"""The same map, which is no :class:`Map`, with its methods."""

    has_own_step = True

    def __init__(self, f):
        self.f = f

    def __call__(self, x):
        return self.f(x)

    def step(self, x):
        return self.f.step(x)

    def natural(self, x):
        return self.f.natural(x)


class Named(Plain):
    r"""Its method ``step`` is the map itself."""

    has_own_step = False

    def step(self, x):
        return self(x)


def test_step_and_natural_of_a_plain_object_are_used():
    problem, exact, x0 = descent(torch.float32)
    f = problem(1e-3)
    solver = Solver("anderson", max_iter=600, tol=1e-4, on_failure="ignore")
    expected, _ = solver(f, x0)
    x, stat = solver(Plain(f), x0)
    assert torch.equal(x, expected) and stat.converged.all() and relative_error(x, exact) <= 1e-3
    x, stat = solver(Named(problem(0.5)), x0)
    assert stat.converged.all() and relative_error(x, exact) <= 1e-3


class OnlyPreconditioned:
    r"""A plain object with a preconditioner, which is applied once per evaluation."""

    def __init__(self, f):
        self.f, self.made, self.applied = f, 0, 0

    def __call__(self, x):
        return self.f(x)

    def preconditioner(self, x):
        self.made += 1
        inverse = self.f.preconditioner(x)

        def apply(r):
            self.applied += 1
            return inverse(r)

        return apply


def test_a_preconditioner_of_a_plain_object_is_applied_once_per_evaluation():
    problem, exact, x0 = descent(preconditioned=True)
    f = OnlyPreconditioned(problem(0.5))
    x, stat = Solver("anderson", max_iter=200, tol=1e-6)(f, x0)
    assert stat.converged.all() and relative_error(x, exact) <= 1e-5
    assert f.made == 1 and f.applied == stat.evaluations + 1  # and once to estimate how it enlarges rounding
