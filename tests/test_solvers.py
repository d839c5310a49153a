r"""Solvers on problems with exact answers: accuracy, independence, honesty, bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchdeq.solver import register_solver
from torchdeq.solver.anderson import anderson_solver

from deepinv_deq import ConvergenceError, ConvergenceWarning, Solver, SolverStat
from deepinv_deq.maps import AffineMap
from deepinv_deq.solvers import available_methods
from tests.problems import F64, Batch, affine, relative_error

OURS = ["anderson", "broyden", "fixed_point_iter", "gmres"]
NONLINEAR = ["anderson", "broyden", "fixed_point_iter"]


def residual(f, x):
    fx = f(x)
    return (fx - x).flatten(1).norm(dim=1) / fx.flatten(1).norm(dim=1)


# Accuracy ----------------------------------------------------------------------------------------------------------


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
    assert not stat.converged.any()


def test_an_affine_map_with_a_nan_constant_has_a_nan_solution_and_spoils_no_other():
    f, exact, w = affine()
    c = f(torch.zeros_like(exact))
    c[1, 2] = math.nan
    for method in OURS:
        with pytest.warns(ConvergenceWarning, match="NaN or Inf"):
            x, stat = Solver(method, max_iter=2000, tol=1e-8)(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
        assert stat.converged.tolist() == [True, False, True] and x[1].isnan().all()
        assert relative_error(x[::2], exact[::2]) <= 1e-6


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
            if (w @ b + c[0] - b).norm() <= tol * (w @ b + c[0]).norm():
                break
        _, stat = Solver("gmres", max_iter=60, tol=tol)(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
        assert stat.evaluations <= optimum + 1


def test_gmres_restarts_and_warm_starts():
    f, exact, _ = affine(high=0.9)
    x, stat = Solver("gmres", history=8, max_iter=200, tol=1e-10)(f, torch.randn_like(exact))
    assert stat.converged.all() and relative_error(x, exact) <= 1e-8
    again, stat = Solver("gmres", max_iter=200, tol=1e-6)(f, x)
    assert stat.evaluations <= 2 and torch.equal(again, x)


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


# Scale, batch, layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_affine_solves_do_not_depend_on_the_scale(method, scale):
    # in float64: rounding of c * scale makes the course of a quasi-Newton method differ in single precision
    f, exact, w = affine(high=0.9)
    c = f(torch.zeros_like(exact))
    solver = Solver(method, max_iter=300, tol=1e-3)
    one, stat = solver(AffineMap(lambda b: b @ w.T, c), torch.zeros_like(c))
    many, scaled = solver(AffineMap(lambda b: b @ w.T, c * scale), torch.zeros_like(c))
    assert stat.evaluations == scaled.evaluations
    assert relative_error(many.double() / scale, one) <= 1e-5


@pytest.mark.parametrize("method", NONLINEAR)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nonlinear_methods_do_not_depend_on_the_scale(method, scale):
    f = lambda x: torch.sin(x) * 0.9 + 0.4  # noqa: E731
    solver, x0 = Solver(method, max_iter=300, tol=1e-6), torch.linspace(0, 1, 6, dtype=F64).reshape(2, 3)
    one, stat = solver(f, x0)
    many, scaled = solver(lambda x: scale * f(x / scale), x0 * scale)
    assert stat.evaluations == scaled.evaluations and relative_error(many / scale, one) <= 1e-7


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(OURS),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from([torch.float32, F64, torch.complex64, torch.complex128]),
    st.floats(-6, 6),
)
def test_any_shape_dtype_and_scale(method, batch, shape, dtype, exponent):
    c = 10**exponent * torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    tol = 1e-4 if dtype in (torch.float32, torch.complex64) else 1e-9
    x, stat = Solver(method, max_iter=200, tol=tol)(lambda x: 0.5 * x.flip(-1) + c, torch.zeros_like(c))
    assert x.shape == c.shape and x.dtype == dtype and stat.converged.all()
    assert relative_error(torch.view_as_real(x) if x.is_complex() else x, _exact(c)) <= 10 * tol


def _exact(c):
    x = (c + 0.5 * c.flip(-1)) / 0.75
    return torch.view_as_real(x) if x.is_complex() else x


def test_tuples_of_tensors_are_one_state():
    f = lambda s: (0.5 * s[1].mean(dim=(1, 2), keepdim=True)[..., 0] + 1, 0.3 * s[1] + s[0][..., None])  # noqa: E731
    (u, v), stat = Solver("anderson", tol=1e-10)(f, (torch.zeros(2, 1, dtype=F64), torch.zeros(2, 3, 4, dtype=F64)))
    exact = 1 / (1 - 0.5 / 0.7)
    assert stat.converged.all()
    assert torch.allclose(u, torch.full_like(u, exact)) and torch.allclose(v, torch.full_like(v, exact / 0.7))


def test_half_precision_states_are_solved_in_single_precision():
    x, stat = Solver("anderson", tol=1e-2)(lambda x: 0.5 * x + 1, torch.zeros(2, 8, dtype=torch.bfloat16))
    assert (
        x.dtype == torch.bfloat16
        and stat.residual.dtype == torch.float32
        and torch.allclose(x, torch.tensor(2.0).bfloat16())
    )


def test_fixed_points_at_zero_and_empty_batches():
    for method in OURS:
        x, stat = Solver(method, max_iter=300, tol=1e-6)(lambda x: 0.5 * x, torch.ones(2, 3, dtype=F64))
        assert stat.converged.all() and x.abs().max() <= 1e-12
    x, stat = Solver("anderson")(lambda x: 0.5 * x, torch.zeros(0, 3))
    assert x.shape == (0, 3) and stat.converged.all()


# Honesty -----------------------------------------------------------------------------------------------------------


def test_a_missed_tolerance_warns_once_with_the_residual():
    f, exact, _ = affine()
    solver = Solver("anderson", max_iter=5, tol=1e-10)
    with pytest.warns(ConvergenceWarning, match=r"0 of 3 samples .* in 5 evaluations \(largest residual \d"):
        solver(f, torch.zeros_like(exact))
    solver(f, torch.zeros_like(exact))  # pyproject.toml turns a second warning into an error


def test_raise_keeps_the_statistic():
    f, exact, _ = affine()
    with pytest.raises(ConvergenceError, match="Raise max_iter or tol") as caught:
        Solver("anderson", max_iter=5, on_failure="raise")(f, torch.zeros_like(exact))
    assert isinstance(caught.value.stat, SolverStat) and caught.value.stat.evaluations == 5


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


# TorchDEQ's registry, settings, copies --------------------------------------------------------------------------------


def test_any_registered_method_works_and_is_judged_by_its_true_residual():
    register_solver("test_liar", lambda func, x0, **_: (func(x0), [], {"rel_lowest": torch.zeros(len(x0))}))
    try:
        _, stat = Solver("test_liar", on_failure="ignore")(lambda x: 0.5 * x + 1, torch.zeros(2, 3))
    finally:
        from torchdeq.solver import _solvers

        del _solvers["test_liar"]
    assert not stat.converged.any() and torch.allclose(stat.residual, torch.tensor(1 / 3)) and stat.evaluations == 2
    x, stat = Solver("simple_fixed_point_iter", max_iter=60)(lambda x: 0.5 * x + 1, torch.zeros(2, 3))
    assert stat.converged.all()


def test_ours_does_not_replace_torchdeqs():
    from torchdeq.solver import get_solver

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


def test_bad_states():
    with pytest.raises(ValueError, match="must return the shape it is given"):
        Solver()(lambda x: x[:, :2], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="same batch size"):
        Solver()(lambda s: s, (torch.zeros(2, 3), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="tensor or a non-empty tuple"):
        Solver()(lambda s: s, ())


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


def test_a_statistic_reads_like_torchdeqs():
    _, stat = Solver("anderson")(torch.cos, torch.zeros(2, 1))
    assert {"abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep"} <= set(stat)
    assert "2 of 2 samples reached" in stat.outcome
    assert pickle.loads(pickle.dumps(stat)).evaluations == stat.evaluations


def test_the_result_has_no_graph():
    a = torch.tensor(0.5, requires_grad=True)
    x, stat = Solver("anderson")(lambda x: a * x + 1, torch.zeros(2, 3))
    assert not x.requires_grad and not stat.residual.requires_grad


# Cost: who is done costs nothing ------------------------------------------------------------------------------------

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
    solver = Solver(method, max_iter=400, tol=1e-9, chunk_size=6)
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


class Synchronisations(TorchDispatchMode):
    r"""Counts how often the host reads a value of a tensor, which on an accelerator is when it waits."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in (*waiting, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


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


def test_gmres_says_so_when_the_system_is_singular():
    b, stat = Solver("gmres", max_iter=20, tol=1e-8, on_failure="ignore")(
        AffineMap(lambda b: b, torch.ones(1, 3, dtype=F64)), torch.zeros(1, 3, dtype=F64)
    )
    assert not stat.converged.any() and stat.residual == 1.0 and not b.any()  # b = b + 1 has no solution
