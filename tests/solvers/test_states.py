r"""States of any shape, type and scale."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinv_deq import ModularIDHook, Solver, states
from deepinv_deq.maps import AffineMap
from deepinv_deq.states import Layout, finite_rows, norms, powers_of_two, unit_size, where_rows
from tests.problems import F64, affine, relative_error
from tests.solvers import NONLINEAR, OURS, norm


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e-6, 1e6, 1e20, 1e150])
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
@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e150])
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


def test_bad_states():
    with pytest.raises(ValueError, match="must return the shape it is given"):
        Solver()(lambda x: x[:, :2], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="same batch size"):
        Solver()(lambda s: s, (torch.zeros(2, 3), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="tensor or a non-empty tuple"):
        Solver()(lambda s: s, ())


# Extreme scales ----------------------------------------------------------------------------------------------------

SCALES = [1e-30, 1e-20, 1.0, 1e20, 1e30]


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64])
@pytest.mark.parametrize("scale", SCALES)
def test_affine_maps_are_solved_at_any_scale(method, dtype, scale):
    f, exact, w = affine(high=0.9)
    c = (scale * f(torch.zeros_like(exact))).to(dtype)
    w, tol = w.to(dtype), 1e-5
    for g in (lambda x: x @ w.T + c, AffineMap(lambda b: b @ w.T, c)):
        for x0 in (torch.zeros_like(c), scale * torch.ones_like(c)):
            x, stat = Solver(method, max_iter=400, tol=tol)(g, x0)
            x, image = (t.to(torch.promote_types(dtype, F64)) / scale for t in (x, g(x)))
            assert stat.converged.all() and relative_error(x.real, exact) <= 30 * tol
            denominator = norm(c.to(x.dtype) / scale) if isinstance(g, AffineMap) else norm(x)
            torch.testing.assert_close(stat.residual.double(), norm(image - x) / denominator, rtol=0.3, atol=1e-6)


@pytest.mark.parametrize("method", NONLINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", SCALES)
def test_nonlinear_maps_are_solved_at_any_scale(method, dtype, scale):
    f = lambda x: scale * (0.9 * torch.sin(x / scale) + 0.4)  # noqa: E731
    exact, _ = Solver("anderson", tol=1e-14)(lambda x: 0.9 * torch.sin(x) + 0.4, torch.ones(1, 1, dtype=F64))
    for x0 in (torch.zeros(3, 5, dtype=dtype), torch.full((3, 5), scale, dtype=dtype)):
        x, stat = Solver(method, max_iter=100, tol=1e-5)(f, x0)
        assert stat.converged.all() and 5 <= stat.evaluations <= 40
        assert (x.double() / scale / exact - 1).abs().max() <= 1e-4


def test_samples_of_different_scales_share_a_batch():
    scales = torch.tensor([1e-30, 1.0, 1e30])[:, None]
    c = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * scales
    for method in OURS:
        x, stat = Solver(method, max_iter=300, tol=1e-5)(lambda x: 0.7 * x.roll(1, 1) + c, torch.zeros_like(c))
        assert stat.converged.all() and torch.equal(stat["nstep"], stat["nstep"][:1].expand(3))
        assert relative_error(x[::2] / scales[::2], x[[1, 1]]) <= 1e-4


@pytest.mark.parametrize("scale", SCALES)
def test_a_loss_of_any_scale_has_its_gradient_and_a_true_statistic(scale):
    f, exact, w = affine(batch=2, high=0.9)
    g = torch.randn(2, 40, generator=torch.Generator().manual_seed(3), dtype=F64)
    a = torch.ones(40, requires_grad=True)
    hook = ModularIDHook(Solver("gmres", tol=1e-5))
    hook(lambda x: x @ w.float().T + a, exact.float()).backward(scale * g.float())
    adjoint = torch.linalg.solve(torch.eye(40, dtype=F64) - w, g.T).T
    assert relative_error(a.grad.double() / scale, adjoint.sum(0)) <= 1e-4
    assert hook.stat.converged.all() and hook.stat.residual.max() <= 2e-5


def test_norms_at_the_edges_of_both_types():
    for dtype in (torch.float32, F64):
        info = torch.finfo(dtype)
        for size in (info.tiny, info.tiny**0.5, 1.0, info.max**0.5, info.max / 4):
            x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=dtype) * (size / 4)
            torch.testing.assert_close(norms(x)[0] / (size / 4), torch.tensor(5.0, dtype=F64), rtol=1e-6, atol=0)
            assert norms(x)[1] == 0 and 1 <= size / unit_size(x)[0] < 2 and unit_size(x)[1] == 1
    bad = torch.tensor([[1.0, torch.nan], [1.0, torch.inf]])
    assert torch.isnan(norms(bad)[0]) and torch.isinf(norms(bad)[1]) and unit_size(bad).eq(1).all()
    assert norms(torch.zeros(2, 0)).tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-300, 1e-200, 3e-48, 0.75, 1.0, 1e39, 1e200, 1e308])
def test_the_unit_of_a_row_is_a_power_of_two_at_any_scale(size):
    x = torch.tensor([[0.5 * size, -size], [0.0, 0.0]], dtype=F64)
    assert unit_size(x)[:, 0].tolist() == [2.0 ** (math.frexp(size)[1] - 1), 1.0]
    assert norms(x)[0] == pytest.approx(math.sqrt(1.25) * size, rel=1e-14)


def test_rows_are_selected_without_a_copy_where_the_host_knows_the_answer(monkeypatch):
    a, b = torch.ones(2, 3), torch.zeros(2, 3)
    for mask in itertools.product([False, True], repeat=2):
        expected = torch.stack([a[0] if chosen else b[0] for chosen in mask])
        assert torch.equal(where_rows(torch.tensor(mask), a, b), expected)
    assert where_rows(torch.tensor([True, True]), a, b) is a and where_rows(torch.tensor([False, False]), a, b) is b
    bad = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [1e38, -1e38], [0.0, 0.0]])
    for known in (True, False):
        monkeypatch.setattr(states, "on_host", lambda t, known=known: known)
        assert finite_rows(bad).tolist() == [False, False, True, True]
        assert finite_rows(torch.zeros(2, 0)).tolist() == [True, True]


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter", "gmres"])
def test_the_answer_is_no_view_of_the_start(method):
    start = torch.zeros(2, 3, dtype=F64)
    x, stat = Solver(method)(lambda x: x / 2, start)
    assert bool(stat.converged.all()) and x.data_ptr() != start.data_ptr()


def test_a_function_may_return_the_same_tensor_in_every_call():
    image, start = torch.empty(1, 3, dtype=F64), torch.ones(1, 3, dtype=F64)
    for method in ("anderson", "broyden", "fixed_point_iter"):
        x, stat = Solver(method, tol=1e-10, max_iter=100)(lambda x: image.copy_(0.5 * x + 1), start)
        torch.testing.assert_close(x, torch.full_like(x, 2.0))


def test_matrices_of_lazily_conjugated_states():
    x = torch.randn(2, 3, dtype=torch.complex128)
    layout = Layout(x, batched=True)
    assert torch.equal(layout.unpack(layout.pack(torch.conj(x))), torch.conj(x))


def test_units_of_measurements_that_are_true_or_false():
    assert torch.equal(powers_of_two(torch.tensor([[True, False], [False, False]]), usual=True), torch.ones(2))
