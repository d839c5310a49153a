r"""The part of GMRES that the host computes: samples apart from each other, no lost tangents, NumPy as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from deepinv_deq import Solver
from deepinv_deq.maps import AffineMap, Map
from tests.problems import F64, affine, relative_error


@pytest.mark.parametrize("make", [lambda f, w, c: f, lambda f, w, c: AffineMap(lambda b: b @ w.T, c)])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_solutions_have_their_tangents(make, start):
    f, exact, w = affine()
    solver, c = Solver("gmres", tol=1e-12, max_iter=200, on_failure="raise"), f(torch.zeros_like(exact))
    turn = 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=F64) / len(w) ** 0.5

    def solve(c, w):
        return solver(make(lambda x: x @ w.T + c, w, c), torch.full_like(exact, start))[0]

    def by_algebra(c, w):
        return torch.linalg.solve(torch.eye(len(w), dtype=F64) - w, c.T).T

    directions = torch.ones_like(c), turn
    expected = torch.func.jvp(by_algebra, (c, w), directions)[1]
    x, tangent = torch.func.jvp(solve, (c, w), directions)
    assert relative_error(x, exact) <= 1e-9 and relative_error(tangent, expected) <= 1e-8
    with forward_ad.dual_level():
        x = solve(*(forward_ad.make_dual(t, d) for t, d in zip((c, w), directions, strict=True)))
        assert relative_error(forward_ad.unpack_dual(x).tangent, expected) <= 1e-8
        x0 = forward_ad.make_dual(torch.ones_like(c), c)  # the solution does not depend on the start
        assert forward_ad.unpack_dual(solver(make(lambda x: x @ w.T + c, w, c), x0)[0]).tangent is None


def test_the_errors_of_numpy_that_a_user_chose_stay():
    seen = []

    class Nested(Map):
        def __call__(self, x):
            return 0.5 * x + 1

        def natural(self, x):
            def units(r):
                seen.append(np.geterr()["divide"])
                inner = AffineMap(lambda b: 0.5 * b, r)
                return Solver("gmres", tol=1e-9)(inner, torch.zeros_like(r))[0]

            return units

    with np.errstate(all="raise"):
        x, stat = Solver("gmres", tol=1e-6)(Nested(), torch.zeros(2, 5, dtype=F64))
        assert set(np.geterr().values()) == set(seen) == {"raise"}
    assert stat.converged.all() and torch.allclose(x, torch.tensor(2.0, dtype=F64))


@pytest.mark.parametrize("kind", [dict, AffineMap])
@pytest.mark.parametrize("size", [1, 400])
def test_samples_do_not_change_each_other(kind, size):
    r"""Samples that are done, broken, zero or singular, beside others: what each would be alone."""
    w = torch.diag(torch.linspace(-0.9, 0.9, size, dtype=F64))
    c = torch.randn(6, size, generator=torch.Generator().manual_seed(0), dtype=F64)
    c[1], c[2], c[3, 0], c[4] = 0.0, 1e-30 * c[2], torch.nan, 1e30 * c[4]

    def solve(rows):
        f = (lambda x: x @ w + c[rows]) if kind is dict else AffineMap(lambda b: b @ w, c[rows])
        return Solver("gmres", tol=1e-8, max_iter=70, on_failure="ignore")(f, torch.zeros_like(c[rows]))

    x, stat = solve(slice(None))
    assert stat.converged.tolist() == [True, True, True, False, True, True]
    for i in (0, 1, 2, 4, 5):
        alone, its = solve(slice(i, i + 1))
        torch.testing.assert_close(x[i : i + 1], alone, rtol=1e-7, atol=1e-9 * float(alone.abs().max()))
        assert kind is dict or stat["nstep"][i] == its["nstep"][0]
