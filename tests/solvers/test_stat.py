r"""What a statistic says, and when a solver warns or raises."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch

from deepinv_deq import ConvergenceError, ConvergenceWarning, Solver, SolverStat, compat
from deepinv_deq.maps import AffineMap, Map
from tests.problems import affine
from tests.solvers import OURS, norm


def test_a_missed_tolerance_warns_once_with_the_residual():
    f, exact, _ = affine()
    solver = Solver("anderson", max_iter=5, tol=1e-10)
    with pytest.warns(ConvergenceWarning, match=r"0 of 3 samples .* in 5 evaluations \(largest residual \d"):
        solver(f, torch.zeros_like(exact))
    solver(f, torch.zeros_like(exact))  # pyproject.toml turns a second warning into an error


def test_a_missed_tolerance_is_warned_of_again_when_it_is_ten_times_worse():
    solver = Solver("fixed_point_iter", max_iter=2, tol=1e-10)
    f = lambda rate: lambda x: rate * x.roll(1, 1) + torch.arange(3.0)  # noqa: E731
    residuals = []
    for rate, warns in ((0.01, True), (0.02, False), (0.5, True), (0.6, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            residuals.append(float(solver(f(rate), torch.ones(1, 3))[1].residual))
        assert bool(caught) == warns, residuals
    assert residuals[1] < 10 * residuals[0] and residuals[2] > 10 * residuals[0]


@pytest.mark.parametrize("dtype, named", [(torch.float32, True), (torch.float64, False)])
def test_tf32_is_named_where_it_may_be_the_cause(monkeypatch, dtype, named):
    monkeypatch.setattr(compat, "rounds_convolutions", lambda device: True)
    with pytest.warns(ConvergenceWarning) as caught:
        Solver("anderson", max_iter=3, tol=1e-7)(lambda x: x.cos(), torch.zeros(1, 4, dtype=dtype))
    assert ("torch.backends.cudnn.allow_tf32 = False" in str(caught[0].message)) == named


def test_no_convolution_is_rounded_on_the_cpu():
    assert not compat.rounds_convolutions(torch.device("cpu"))
    assert compat.rounds_convolutions(torch.device("cuda")) == torch.backends.cudnn.allow_tf32


def test_raise_keeps_the_statistic():
    f, exact, _ = affine()
    with pytest.raises(ConvergenceError, match="Raise max_iter or tol") as caught:
        Solver("anderson", max_iter=5, on_failure="raise")(f, torch.zeros_like(exact))
    assert isinstance(caught.value.stat, SolverStat) and caught.value.stat.evaluations == 5


def test_a_statistic_reads_like_torchdeqs():
    _, stat = Solver("anderson")(torch.cos, torch.zeros(2, 1))
    assert {"abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep"} <= set(stat)
    assert "2 of 2 samples reached" in stat.outcome
    assert pickle.loads(pickle.dumps(stat)).evaluations == stat.evaluations


def test_the_residual_of_an_affine_map_is_relative_to_its_constant():
    f, exact, w = affine()
    c = f(torch.zeros_like(exact))
    for method in OURS:
        solver = Solver(method, max_iter=9, tol=1e-9, on_failure="ignore")
        b, stat = solver(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
        torch.testing.assert_close(stat.residual, norm(f(b) - b) / norm(c))
        torch.testing.assert_close(stat["abs_lowest"], norm(f(b) - b))
        torch.testing.assert_close(stat.plain_residual, norm(f(b) - b) / norm(f(b)))
        solver.verify(b, f(b), c, stat)
        torch.testing.assert_close(stat.residual, norm(f(b) - b) / norm(c))
        with pytest.warns(DeprecationWarning, match="SolverStat.residual"):
            assert stat.remainder is stat.residual


def test_a_false_claim_is_found_out():
    f, exact, w = affine()
    c = f(torch.zeros_like(exact))
    solver = Solver("gmres", tol=1e-6)
    b, stat = solver(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
    assert stat.converged.all()
    b[1] += 1e-3
    with pytest.warns(
        ConvergenceWarning, match="reported convergence, but the measured residual is .*not deterministic"
    ):
        solver.verify(b, f(b), c, stat)
    assert stat.converged.tolist() == [True, False, True]


def test_a_zero_constant_has_a_zero_solution():
    for method in OURS:
        for x0 in (torch.zeros(2, 3), torch.ones(2, 3)):
            solver = Solver(method, max_iter=300, tol=1e-6)
            x, stat = solver(AffineMap(lambda b: 0.5 * b, torch.zeros(2, 3)), x0)
            assert stat.converged.all() and x.abs().max() <= 1e-10 and torch.isfinite(stat.residual).all()
            solver.verify(x, 0.5 * x, torch.zeros(2, 3), stat)
        assert torch.isfinite(stat.residual).all()


def test_chunks_have_one_statistic():
    class Rows(Map):
        def __init__(self, c, w):
            self.c, self.w = c, w

        def __call__(self, x):
            return x @ self.w.T + self.c

        def select(self, rows):
            return Rows(self.c[rows], self.w)

    f, exact, w = affine(batch=4, high=0.9, dtype=torch.float32)
    f = Rows(f(torch.zeros_like(exact)), w)
    with pytest.warns(ConvergenceWarning, match="float32 cannot reach 1.0e-12"):
        x, stat = Solver("anderson", max_iter=500, tol=1e-12, chunk_size=1)(f, torch.zeros_like(exact))
    assert (stat["at_floor"] | stat.converged).all() and stat["at_floor"].any() and len(stat.plain_residual) == 4
    assert not (stat["at_floor"] & stat.converged).any()
    assert stat["rel_trace"].shape == (4, stat.evaluations)
