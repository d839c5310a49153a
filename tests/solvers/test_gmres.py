r"""GMRES: optimality, restarts, maps that are not affine, singular systems."""

from __future__ import annotations

import warnings

import pytest
import torch

from deepinv_deq import ConvergenceWarning, ModularIDHook, Solver
from deepinv_deq.maps import AffineMap
from tests.problems import F64, affine, relative_error
from tests.solvers import norm, residual


def test_gmres_uses_its_whole_budget_on_an_affine_map():
    f, exact, w = affine()
    c = f(torch.zeros_like(exact))
    for start, extra in ((torch.zeros_like(c), 0), (torch.ones_like(c), 1)):
        for max_iter in (1, 2, 5):
            solver = Solver("gmres", max_iter=max_iter, tol=1e-12, on_failure="ignore")
            _, stat = solver(AffineMap(lambda b: b @ w.T, c), start)
            assert stat.evaluations == max_iter and stat["nstep"].tolist() == [max_iter] * 3
    _, stat = Solver("gmres", history=6, max_iter=90, tol=1e-9, on_failure="ignore")(
        AffineMap(lambda b: b @ w.T, c), start
    )
    assert stat["nstep"].max() == stat.evaluations


def test_gmres_does_not_claim_to_have_solved_a_nonlinear_map():
    c = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    f = lambda x: 3 * torch.sin(2 * x) + c  # noqa: E731
    x, stat = Solver("gmres", max_iter=30, tol=1e-6, on_failure="ignore")(f, torch.zeros_like(c))
    torch.testing.assert_close(stat.residual, residual(f, x))
    assert torch.equal(stat.converged, residual(f, x) <= 1e-6) and not stat.converged.all()


def test_gmres_takes_the_least_number_of_products():
    r"""Against the optimum: the smallest Krylov space whose best residual meets the tolerance, by dense algebra."""
    f, exact, w = affine(batch=1)
    c = f(torch.zeros_like(exact))
    for tol in (1e-2, 1e-4, 1e-8):
        space, v = [], c[0]
        for optimum in range(1, 41):
            space.append(v / v.norm())
            v = w @ space[-1]
            basis = torch.linalg.qr(torch.stack(space, 1))[0]
            b = basis @ torch.linalg.lstsq(basis - w @ basis, c[0]).solution
            if (w @ b + c[0] - b).norm() <= tol * c[0].norm():
                break
        _, stat = Solver("gmres", max_iter=60, tol=tol)(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
        assert stat.evaluations <= optimum


def test_gmres_restarts_and_warm_starts():
    f, exact, _ = affine(high=0.9)
    x, stat = Solver("gmres", history=8, max_iter=200, tol=1e-10)(f, torch.randn_like(exact))
    assert stat.converged.all() and relative_error(x, exact) <= 1e-8
    again, stat = Solver("gmres", max_iter=200, tol=1e-6)(f, x)
    assert stat.evaluations <= 2 and torch.equal(again, x)


# Systems without a solution, and maps that are not affine ---------------------------------------------------------------


def singular(zeros=30, n=60, dtype=F64, seed=0):
    r"""``I - l`` is symmetric with this many eigenvalues 0, the others in [0.01, 1]: returns it and a right-hand side."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]
    values = torch.cat([torch.zeros(zeros, dtype=F64), torch.linspace(0.01, 1, n - zeros, dtype=F64)])
    return (q @ torch.diag(values) @ q.T).to(dtype), torch.randn(2, n, generator=rng, dtype=F64).to(dtype)


def test_a_breakdown_says_that_the_system_is_singular():
    with pytest.warns(
        ConvergenceWarning, match="singular or nearly so in 1 of 1 .* does not contract .* ContractionLoss"
    ):
        b, stat = Solver("gmres", max_iter=20, tol=1e-8)(
            AffineMap(lambda b: b, torch.ones(1, 3, dtype=F64)), torch.zeros(1, 3, dtype=F64)
        )
    assert not stat.converged.any() and stat.residual == 1.0 and not b.any()  # b = b + 1 has no solution
    assert stat["singular"].all() and stat.evaluations == 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_system_without_a_solution_is_named_and_leaves_no_noise(dtype):
    m, c = singular(dtype=dtype)
    f = AffineMap(lambda b: b - b @ m, c)
    for max_iter in (50, 200, 1000):
        b, stat = Solver("gmres", max_iter=max_iter, tol=1e-5, on_failure="ignore")(f, torch.zeros_like(c))
        assert (
            stat["singular"].all() and not stat.converged.any() and "is singular or nearly so in 2 of 2" in stat.outcome
        )
        assert stat.evaluations <= 120
        optimum = norm(c - c @ m @ torch.linalg.pinv(m.double(), rtol=1e-6).to(dtype)) / norm(c)
        assert bool((stat.residual >= 0.999 * optimum).all()) and bool((stat.residual <= 1.02 * optimum).all())
        torch.testing.assert_close(stat.residual, norm(f(b) - b) / norm(c), rtol=1e-3, atol=0)
        assert norm(b).max() <= 1e3 * norm(c).max()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_singular_system_with_a_solution_gets_the_smallest_one(dtype):
    m, c = singular(dtype=dtype)
    c = c @ m
    b, stat = Solver("gmres", max_iter=100, tol=1e-5)(AffineMap(lambda b: b - b @ m, c), torch.zeros_like(c))
    smallest = c.double() @ torch.linalg.pinv(m.double(), rtol=1e-6)
    assert stat.converged.all() and not stat["singular"].any()
    assert norm(b.double() - smallest).max() <= 1e-3 * norm(smallest).max()


@pytest.mark.parametrize("noise", [1e-9, 1e-7, 1e-5])
def test_rounding_in_a_singular_system_is_no_solution(noise):
    r"""A Jacobian that is the identity but for rounding: its inverse is noise."""
    e = noise * torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    c = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    f = AffineMap(lambda b: b + b @ e, c)
    b, stat = Solver("gmres", max_iter=60, tol=1e-3, on_failure="ignore")(f, torch.zeros(3, 20))
    measured = norm(f(b).double() - b.double()) / norm(c)
    assert bool((measured <= 1.0 + 1e-6).all())  # never worse than zero
    assert torch.equal(stat.converged, torch.zeros(3, dtype=torch.bool)) or bool(
        (measured[stat.converged] <= 2e-3).all()
    )
    assert bool((norm(b)[measured > 0.5] <= 1e4 * norm(c)[measured > 0.5]).all())


def test_the_gradient_of_a_map_that_does_not_contract_is_no_noise():
    a = torch.ones(20, requires_grad=True)
    mask = (torch.arange(20) < 10).float()  # the other half of x is not determined
    f = lambda x: x - 0.5 * mask * (x - a)  # noqa: E731
    hook = ModularIDHook(Solver("gmres", tol=1e-3))
    with pytest.warns(ConvergenceWarning, match="singular"):
        hook(f, torch.ones(2, 20)).square().sum().backward()
    assert not hook.stat.converged.any() and bool((a.grad.abs() <= 10).all())
    a.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loss that only sees what is determined has its gradient
        warnings.filterwarnings("ignore", "`torch.cpu.amp.autocast", FutureWarning)  # PyTorch 2.4 warns of its own code
        (hook(f, torch.ones(2, 20)) * mask).square().sum().backward()
    assert hook.stat.converged.all() and torch.allclose(a.grad, 4 * mask, rtol=1e-3)


@pytest.mark.parametrize("eta", [1.0, 1e-1, 1e-3])
def test_small_steps_do_not_loosen_the_tolerance(eta):
    r"""The gradient of a slow map: the residual is relative to the cotangent, so its bound holds for the equation."""
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    w = q @ torch.diag(1 - torch.logspace(-2, 0, 40, dtype=F64)) @ q.T
    x_star = torch.ones(2, 40, dtype=F64)
    c = (x_star - x_star @ w.T).requires_grad_()
    hook = ModularIDHook(Solver("gmres", max_iter=100, tol=1e-3))
    (gradient,) = torch.autograd.grad(hook(lambda x: x + eta * (x @ w.T + c - x), x_star).sum(), c)
    exact = torch.linalg.solve(torch.eye(40, dtype=F64) - w.T, torch.ones(40, dtype=F64)).expand(2, 40)
    # the gradient is eta b, and its error at most that of b (1 - w) = 1, over the smallest eigenvalue
    assert hook.stat.converged.all() and hook.stat.residual.max() <= 2e-3
    assert norm(gradient - exact).max() <= 1e-3 / 1e-2 * 40**0.5
    torch.testing.assert_close(norm(gradient @ (torch.eye(40, dtype=F64) - w) - 1) / 40**0.5, hook.stat.residual)


def test_slow_contractions_are_not_called_singular():
    rates = torch.linspace(0.9, 0.999, 200, dtype=F64)
    c = torch.ones(1, 200, dtype=F64)
    for dtype in (torch.float32, F64):
        f = AffineMap(lambda b: b * rates.to(dtype), c.to(dtype))  # noqa: B023
        b, stat = Solver("gmres", max_iter=400, history=100, tol=1e-4)(f, torch.zeros(1, 200, dtype=dtype))
        assert stat.converged.all() and not stat["singular"].any() and relative_error(b, c / (1 - rates)) <= 1e-1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("max_iter", [3, 12, 35])
def test_a_solve_that_ends_early_names_what_hardly_contracts_and_nothing_else(dtype, max_iter):
    solver = Solver("gmres", max_iter=max_iter, tol=1e-6, on_failure="ignore")
    c = torch.ones(1, 200, dtype=dtype)
    for step in (1.0, 1e-3):
        for smallest, nearly in ((1e-3, False), (1e-6, True)):
            rates = 1 - step * torch.logspace(0, -3, 200, dtype=F64).to(dtype)
            rates[::2] = 1 - step * smallest
            _, stat = solver(AffineMap(lambda b: b * rates, c), torch.zeros_like(c))  # noqa: B023
            assert not stat.converged.any() and not stat["at_floor"].any() and (not nearly or stat.residual > 0.1)
            assert bool(stat["singular"].all()) == (nearly and max_iter == 35)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_map_that_is_not_affine_never_gets_worse_than_the_start(seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    w, c = torch.randn(8, 8, generator=rng, dtype=F64).to(dtype), torch.randn(3, 8, generator=rng, dtype=F64).to(dtype)
    for f in (
        lambda x: torch.exp(x @ w) + c,
        lambda x: 3 * torch.sin(5 * (x @ w)) + c,
        lambda x: x.pow(3) @ w + c,
        lambda x: x @ w / (1e-3 + x.abs()) + c,
    ):
        x0 = torch.randn(3, 8, generator=rng, dtype=F64).to(dtype)
        seen = []

        def spied(x):
            fx = f(x)  # noqa: B023
            seen.append(norm(fx - x))  # noqa: B023
            return fx

        x, stat = Solver("gmres", max_iter=40, tol=1e-6, on_failure="ignore")(spied, x0)
        assert torch.isfinite(x).all() and bool((norm(f(x) - x) <= norm(f(x0) - x0)).all())
        torch.testing.assert_close(stat["abs_lowest"], norm(f(x) - x))
        assert bool((stat.residual[stat.converged] <= 1e-6).all())


def test_single_precision_products_have_a_floor():
    f, exact, w = affine(high=0.99, dtype=torch.float32)
    c = f(torch.zeros_like(exact))
    with pytest.warns(ConvergenceWarning, match=r"float32 cannot reach 1\.0e-10 \(floor about"):
        b, stat = Solver("gmres", max_iter=300, tol=1e-10)(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
    assert stat["at_floor"].all() and stat.evaluations <= 60 and relative_error(b, exact) <= 1e-3
    measured = norm(b @ w.T + c - b) / norm(c)
    assert bool((measured <= 2 * stat.residual).all())
