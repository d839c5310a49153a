r"""The safeguarded loop on problems with exact answers: accuracy, safeguards, honesty."""

from __future__ import annotations

import math

import pytest
import torch

from deepinv_deq import ConvergenceWarning, Solver
from deepinv_deq.maps import AffineMap, Map
from tests.problems import F64, affine, relative_error
from tests.solvers import NONLINEAR, OURS, norm, residual


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("dtype,tol", [(F64, 1e-11), (torch.float32, 1e-5)])
def test_affine_fixed_point(method, dtype, tol):
    f, exact, _ = affine(high=0.9, dtype=dtype)
    x, stat = Solver(method, max_iter=400, tol=tol)(f, torch.zeros_like(exact))
    assert stat.converged.all()
    assert relative_error(x, exact) <= 30 * tol  # the error is the residual over 1 - 0.9


@pytest.mark.parametrize("method", NONLINEAR)
def test_nonlinear_fixed_point(method):
    x, stat = Solver(method, max_iter=300, tol=1e-13)(torch.cos, torch.zeros(4, 7, dtype=F64))
    assert stat.converged.all()
    assert torch.allclose(x, torch.full_like(x, 0.7390851332151607), atol=1e-12)


@pytest.mark.parametrize("method", OURS)
def test_the_residual_reported_is_that_of_the_point_returned(method):
    f, exact, _ = affine()
    x, stat = Solver(method, max_iter=12, tol=1e-9, on_failure="ignore")(f, torch.zeros_like(exact))
    torch.testing.assert_close(stat.residual, residual(f, x), rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(stat.plain_residual, residual(f, x) * norm(x) / norm(f(x)), rtol=1e-6, atol=1e-15)
    assert stat["rel_trace"].shape == (3, len(stat["rel_trace"][0])) and stat.residual.shape == (3,)


@pytest.mark.parametrize("method", OURS)
def test_evaluations_are_counted_exactly_and_bounded(method):
    f, exact, _ = affine()
    calls = []

    def counted(x):
        calls.append(1)
        return f(x)

    for max_iter in (1, 2, 3, 7):
        calls.clear()
        x, stat = Solver(method, max_iter=max_iter, tol=1e-12, on_failure="ignore")(counted, torch.zeros_like(exact))
        # GMRES keeps one evaluation to measure its answer, so a budget of 2 allows no step
        assert len(calls) == stat.evaluations == (1 if method == "gmres" and max_iter == 2 else max_iter)
        assert x.shape == exact.shape


@pytest.mark.parametrize("method", ["anderson", "broyden"])
def test_acceleration_beats_plain_iteration(method):
    f, exact, _ = affine()
    fast = Solver(method, max_iter=400, tol=1e-6)(f, torch.zeros_like(exact))[1].evaluations
    plain = Solver("fixed_point_iter", max_iter=1000, tol=1e-6)(f, torch.zeros_like(exact))[1].evaluations
    assert fast < plain / 3


@pytest.mark.parametrize("method", ["anderson", "broyden"])
def test_expansive_maps_are_solved_where_plain_iteration_diverges(method):
    f, exact, _ = affine(low=-3.0, high=0.5)
    x, stat = Solver(method, max_iter=300, tol=1e-9)(f, torch.zeros_like(exact))
    assert stat.converged.all() and relative_error(x, exact) <= 1e-7
    _, plain = Solver("fixed_point_iter", max_iter=50, tol=1e-9, on_failure="ignore")(f, torch.zeros_like(exact))
    assert not plain.converged.any()


@pytest.mark.parametrize("method", ["anderson", "broyden"])
def test_a_bad_step_never_replaces_the_best_point(method):
    r"""A kink that throws the accelerated step far off: the point returned is at least as good as any evaluated."""
    seen = []

    def f(x):
        fx = torch.where(x < 2.0, 0.9 * x + 0.35, -5.0 * x + 40.0)
        seen.append((fx - x).abs())
        return fx

    x, stat = Solver(method, max_iter=40, tol=1e-14, on_failure="ignore")(f, torch.zeros(3, 1, dtype=F64))
    assert torch.equal(stat["abs_lowest"], torch.cat(seen, 1).min(dim=1).values)


@pytest.mark.parametrize("method", NONLINEAR)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_never_replace_the_best_point(method, bad):
    calls = []

    def f(x):
        calls.append(1)
        fx = 0.5 * x + 1
        if len(calls) == 4:
            fx[0] = bad
        return fx

    x, stat = Solver(method, max_iter=60, tol=1e-9, on_failure="ignore")(f, torch.zeros(2, 3, dtype=F64))
    assert torch.isfinite(x).all() and torch.isfinite(stat.residual).all()
    assert stat.converged.all()  # the bad point was left by a shorter step


@pytest.mark.parametrize("method", OURS)
def test_a_map_that_is_nan_everywhere_is_reported(method):
    x0 = torch.ones(2, 3)
    with pytest.warns(ConvergenceWarning, match="NaN or Inf"):
        x, stat = Solver(method)(lambda x: x * math.nan, x0)
    assert torch.isfinite(x).all() and not stat.converged.any() and stat.evaluations <= 2


def test_one_broken_sample_does_not_spoil_the_others():
    def f(x):
        fx = 0.5 * x + 1
        fx[1] = math.nan
        return fx

    for method in NONLINEAR:
        x, stat = Solver(method, max_iter=60, tol=1e-6, on_failure="ignore")(f, torch.zeros(3, 2, dtype=F64))
        assert stat.converged.tolist() == [True, False, True] and torch.allclose(x[::2], torch.tensor(2.0, dtype=F64))


def test_an_affine_map_with_a_nan_constant_has_a_nan_solution_and_spoils_no_other():
    f, exact, w = affine()
    c = f(torch.zeros_like(exact))
    c[1, 2] = math.nan
    for method in OURS:
        with pytest.warns(ConvergenceWarning, match="NaN or Inf"):
            x, stat = Solver(method, max_iter=2000, tol=1e-8)(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
        assert stat.converged.tolist() == [True, False, True] and x[1].isnan().all()
        assert relative_error(x[::2], exact[::2]) <= 1e-6


# The limits of a floating-point type ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda f, w, c: f, lambda f, w, c: AffineMap(lambda b: b @ w.T, c)])
def test_the_floor_of_single_precision_is_found_and_said(make):
    method = "anderson"
    f, exact, w = affine(high=0.9, dtype=torch.float32)
    g = make(f, w, f(torch.zeros_like(exact)))
    with pytest.warns(
        ConvergenceWarning, match=r"float32 cannot reach 1\.0e-12 \(floor about .*: use float64 or a larger"
    ):
        x, stat = Solver(method, max_iter=300, tol=1e-12)(g, torch.zeros_like(exact))
    exactly = stat["abs_lowest"] == 0  # a fixed point of the rounded map, by luck
    # how often a residual halves by luck near the floor depends on the processor
    assert stat.evaluations <= 200 and torch.equal(stat["at_floor"], ~exactly) and torch.equal(stat.converged, exactly)
    assert stat.residual.max() <= 1e-6 and relative_error(x, exact) <= 1e-5
    # in double precision, the same tolerance is met
    f, exact, w = affine(high=0.9)
    stat = Solver(method, max_iter=300, tol=1e-12)(make(f, w, f(torch.zeros_like(exact))), torch.zeros_like(exact))[1]
    assert stat.converged.all() and not stat["at_floor"].any()


def test_the_floor_is_higher_where_steps_are_small():
    class Small(Map):
        def __call__(self, x):
            return x - 1e-3 * (x - torch.linspace(1, 2, 50, dtype=x.dtype).expand_as(x).sin())

        def natural(self, x):
            return lambda r: 1e3 * r

    for dtype, reached in ((torch.float32, False), (F64, True)):
        solver = Solver("anderson", max_iter=300, tol=1e-7, on_failure="ignore")
        stat = solver(Small(), torch.zeros(2, 50, dtype=dtype))[1]
        assert stat.converged.all() == reached and stat["at_floor"].any() != reached and stat.evaluations < 60


@pytest.mark.parametrize("method", ["anderson", "broyden"])
def test_the_floor_is_found_where_terms_of_the_map_are_larger_than_its_image(method):
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=F64))[0]

    class Terms(Map):
        def __call__(self, x):
            return x + self.step(x)

        def step(self, x):
            q = rotation.to(x)
            return 20 * ((x @ q) @ q.T - x) + 0.9 * x.roll(1, 1).cos() - x  # the first term is rounding alone

    for dtype, reached in ((torch.float32, False), (F64, True)):
        solver = Solver(method, max_iter=1000, tol=1e-7, on_failure="ignore")
        stat = solver(Terms(), torch.zeros(2, 64, dtype=dtype))[1]
        assert stat.converged.all() == reached and stat["at_floor"].all() != reached and stat.evaluations < 150


@pytest.mark.parametrize("dtype,tol,rate", [(F64, 1e-12, 0.995), (torch.float32, 2e-6, 0.999)])
@pytest.mark.parametrize("method", NONLINEAR)
def test_slow_convergence_is_not_taken_for_the_floor(method, dtype, tol, rate):
    rates = torch.tensor([0.99, rate], dtype=dtype)[:, None]
    c = 1e-3 * torch.arange(1, 8, dtype=dtype)
    solver = Solver(method, max_iter=40000, tol=tol, chunk_size=2)
    x, stat = solver(lambda z: rates * z.roll(1, 1) + c, torch.zeros(2, 7, dtype=dtype))
    assert stat.converged.all() and not stat["at_floor"].any()
    if method == "fixed_point_iter":
        assert stat.evaluations > 4000


def test_a_start_far_off_is_no_excuse():
    r"""The first image is much larger than the fixed point: its rounding is not what the solution may be wrong by."""
    for method in OURS:
        x, stat = Solver(method, max_iter=300, tol=1e-5)(lambda x: 0.5 * x + 5e-4, torch.full((2, 3), 1e6))
        assert stat.converged.all() and torch.allclose(x, torch.tensor(1e-3), rtol=1e-4)


@pytest.mark.parametrize("method", NONLINEAR)
def test_numbers_below_the_normal_ones_are_no_excuse(method):
    c = torch.full((2, 3), 1e-312, dtype=F64)
    x, stat = Solver(method, max_iter=300, tol=1e-4, on_failure="ignore")(lambda x: 0.5 * x + c, torch.zeros_like(c))
    assert stat.converged.all() and torch.allclose(x / c, torch.tensor(2.0, dtype=F64), rtol=1e-3)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("affinely", [False, True])
def test_inf_is_never_reported_as_converged(method, bad, affinely):
    f = (lambda x: x + bad) if not affinely else AffineMap(lambda b: b * bad, torch.ones(2, 3))
    for x0 in (torch.zeros(2, 3), torch.ones(2, 3)):
        x, stat = Solver(method, on_failure="ignore")(f, x0)
        assert not stat.converged.any() and torch.isfinite(x).all()
        assert not (stat.residual <= 1e-4).any()
