r"""Anderson acceleration against its textbook formula."""

from __future__ import annotations

import pytest
import torch

from deepinv_deq import Solver
from tests.problems import F64, affine
from tests.solvers import NONLINEAR


def textbook(f, x, depth, damping, steps):
    r"""The points that type-II mixing evaluates, by least squares over the differences of residuals, for one sample."""
    points, residuals = [], []
    for _ in range(steps):
        points.append(x)
        residuals.append(f(x) - x)
        p, g = torch.stack(points[-depth:], dim=-1), torch.stack(residuals[-depth:], dim=-1)
        x = p[..., -1] + damping * g[..., -1]
        if len(points) > 1:
            dp, dg = p.diff(dim=-1), g.diff(dim=-1)
            gamma = torch.linalg.lstsq(dg[0], g[0, :, -1:]).solution
            x = x - ((dp + damping * dg) @ gamma)[..., 0]
    return points


@pytest.mark.parametrize("damping", [1.0, 0.4])
@pytest.mark.parametrize("depth", [1, 3, 8])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_points_are_those_of_the_textbook(depth, damping, scale):
    f, exact, w = affine(batch=1, n=30, high=0.9)
    c = scale * f(torch.zeros_like(exact))
    seen = []

    def recorded(x):
        seen.append(x.clone())
        return x @ w.T + c

    settings = {"history": depth, "damping": damping, "max_iter": 11, "tol": 1e-14, "on_failure": "ignore"}
    Solver("anderson", **settings)(recorded, torch.zeros_like(exact))
    expected = textbook(lambda x: x @ w.T + c, torch.zeros_like(exact), depth, damping, 11)
    for point, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(point, wanted, rtol=1e-2, atol=1e-3 * scale)


@pytest.mark.parametrize("method", NONLINEAR)
def test_a_long_history_takes_memory_for_points_only(method):
    f, exact, _ = affine(batch=1, n=4)
    x, stat = Solver(method, history=3000, max_iter=3000, tol=1e-10)(f, torch.zeros_like(exact))
    assert stat.converged.all()
    torch.testing.assert_close(x, exact, rtol=1e-8, atol=1e-8)


def test_samples_with_and_without_a_residual_mix_alike():
    # the second sample starts at its fixed point, so its residuals are zero
    x, stat = Solver("anderson", tol=1e-12, max_iter=60)(
        lambda x: torch.stack([0.9 * x[0] + 1.0, x[1]]), torch.zeros(2, 3, dtype=F64)
    )
    assert stat.converged.all() and torch.allclose(x[0], torch.full((3,), 10.0, dtype=F64)) and (x[1] == 0).all()


@pytest.mark.parametrize("scale", [1e-41, 1e-38, 1e-30, 1.0, 1e30])
def test_few_large_entries_keep_their_digits_at_any_scale(scale):
    rates, c = torch.zeros(2, 1, 10**5)
    rates[:, :20], c[:, :20] = (
        torch.linspace(0, 0.99, 20),
        scale * torch.randn(20, generator=torch.Generator().manual_seed(0)),
    )
    x, stat = Solver("anderson", tol=1e-3, max_iter=40)(lambda x: rates * x + c, torch.zeros_like(c))
    assert stat.converged.all() and stat.evaluations <= 30
