r"""What a solve costs: chunks, samples that are done, and reads by the host."""

from __future__ import annotations

import math

import pytest
import torch

from deepinv_deq import ConvergenceWarning, Solver, states
from deepinv_deq.maps import AffineMap
from deepinv_deq.solvers.broyden import Broyden
from deepinv_deq.solvers.loop import Settings
from tests.problems import F64, Batch, Synchronisations, affine, relative_error
from tests.solvers import NONLINEAR, OURS, RATES, residual


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
def test_the_host_waits_as_often_as_it_is_told_to(method, monkeypatch):
    monkeypatch.setattr(states, "on_host", lambda t: False)  # as on an accelerator
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


def test_broyden_takes_the_memory_that_it_uses():
    f, exact, _ = affine(batch=3, n=40)
    x0 = torch.zeros_like(exact)
    few, many = (Broyden(x0, Settings(max_iter=n)) for n in (8, 10**7))
    assert many.u.numel() == few.u.numel() == 3 * 8 * 40 and many.depth == 10**7
    for history in (None, 1, 5, 8, 9, 11):
        x, stat = Solver("broyden", max_iter=400, tol=1e-10, history=history)(f, x0)
        assert stat.converged.all() and relative_error(x, exact) < 1e-8
    method, x = Broyden(x0, Settings(max_iter=100, history=11)), x0
    for k in range(40):
        method.residual = f(x) - x
        x = method.update(x, f(x), torch.zeros(3, dtype=torch.bool))
        assert method.used <= min(k, 11) and method.u.shape == method.v.shape and method.u.shape[1] <= 11
