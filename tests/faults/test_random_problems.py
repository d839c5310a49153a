r"""Random maps, models and settings: results are right, or said not to be."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepinv_deq import (
    DEGrad,
    DEProx,
    DEQReconstructor,
    ModularIDHook,
    Solver,
)
from deepinv_deq.maps import as_map
from deepinv_deq.solvers import METHODS
from tests.faults.common import (
    SCALES,
    SOLVES,
    TINY,
    TRIED,
)
from tests.problems import F64, SmallDenoiser, imaging, relative_error


def random_map(rng, batch, shape, gain, kind, dtype):
    r"""Samples of their own: affine, saturating, or wild where they are large. ``gain`` above 1 expands."""
    n = max(1, int(np.prod(shape)))
    w = torch.randn(n, n, generator=rng, dtype=F64)
    w = (gain * w / torch.linalg.matrix_norm(w, 2)).to(dtype)
    c = torch.randn(batch, n, generator=rng, dtype=F64).to(dtype)

    def select(rows):
        def f(x):
            z = x.reshape(len(x), n) @ w.T + c[rows]
            z = z if kind == "affine" else z.tanh() if kind == "tanh" else z * z
            return z.reshape(x.shape)

        return f

    return select


def relative_residual(f, x):
    r"""What a tolerance bounds: the step in natural units, relative to the point; 1 at zero."""
    f = as_map(f)
    change = f.step(x)
    change = change if f.natural(x) is None else f.natural(x)(change)
    gap, size = ((t.double().reshape(len(x), -1)).norm(dim=1) for t in (change, x))
    return torch.where(gap == 0, gap, torch.where(size == 0, 1.0, gap / size))


PROBLEMS = {
    "seed": st.integers(0, 10**6),
    "batch": st.integers(1, 4),
    "shape": st.sampled_from([(), (1,), (5,), (2, 3), (1, 4, 4)]),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "gain": st.sampled_from([0.0, 0.5, 0.95, 1.5, 30.0]),
    "kind": st.sampled_from(["affine", "tanh", "square"]),
    "exponent": st.integers(-6, 6),
}
SETTINGS = {
    "method": st.sampled_from(["anderson", "broyden", "fixed_point_iter", "gmres"]),
    "max_iter": st.integers(1, 60),
    "tol": st.sampled_from([1e-8, 1e-5, 1e-2]),
    "history": st.sampled_from([None, 1, 2, 7]),
    "damping": st.sampled_from([0.3, 1.0]),
    "sync_every": st.sampled_from([None, 3]),
}


@TINY
@given(**PROBLEMS, **SETTINGS)
def test_a_solve_is_finite_and_its_statistic_true(seed, batch, shape, dtype, gain, kind, exponent, **options):
    rng = torch.Generator().manual_seed(seed)
    unit = 10.0**exponent
    f = random_map(rng, batch, shape or (1,), gain, kind, dtype)(slice(None))
    g = lambda x: unit * f(x / unit)  # noqa: E731
    x0 = unit * torch.randn(batch, *(shape or (1,)), generator=rng, dtype=F64).to(dtype)
    solver = Solver(**options, on_failure="ignore")
    x, stat = solver(g, x0)
    assert x.shape == x0.shape and x.dtype == dtype and bool(x.isfinite().all())
    assert 1 <= stat.evaluations <= options["max_iter"] + (options["method"] == "gmres")
    measured = relative_residual(g, x)
    floor = 50 * torch.finfo(dtype).eps
    small = (measured <= max(1.01 * options["tol"], floor)) | (relative_gap(g, x, x0) <= floor)
    assert bool(small[stat.converged].all()), (measured, stat.outcome)
    # where it failed it says by how much, and the number is that of the point it returned
    failed = ~stat.converged & stat.residual.isfinite()
    torch.testing.assert_close(stat.residual[failed].double(), measured[failed], rtol=0.01, atol=floor)
    assert bool((stat.residual[failed] > options["tol"]).all())
    TRIED["solves of random maps with random settings"] += 1


def relative_gap(f, x, x0):
    r"""``‖f(x) - x‖ / ‖f(x0)‖``: all that can be asked of a fixed point at zero."""
    gap, size = ((t.double().reshape(len(x), -1)).norm(dim=1) for t in (f(x) - x, f(x0)))
    return torch.where(gap == 0, gap, gap / size)


@TINY
@given(
    **(PROBLEMS | {"dtype": st.just(F64), "batch": st.integers(2, 4), "kind": st.sampled_from(["affine", "tanh"])}),
    **SETTINGS,
)
def test_a_sample_does_not_depend_on_its_batch_mates(seed, batch, shape, dtype, gain, kind, exponent, **options):
    rng = torch.Generator().manual_seed(seed)
    select = random_map(rng, batch, shape or (1,), gain, kind, dtype)
    x0 = torch.randn(batch, *(shape or (1,)), generator=rng, dtype=F64)
    solver = Solver(**options, on_failure="ignore")
    x, stat = solver(select(slice(None)), x0)
    for i in range(batch):
        one, alone = solver(select(slice(i, i + 1)), x0[i : i + 1])
        if not bool(alone.converged) or not bool(
            stat.converged[i]
        ):  # rounding is all that differs, and chaos enlarges it
            assert (
                bool(alone.converged) == bool(stat.converged[i])
                or min(float(alone.residual), float(stat.residual[i])) >= 0.1 * options["tol"]
            )
            continue
        error = (one[0] - x[i]).norm() / one.norm().clamp_min(1e-300)
        slack = 1e-6 if gain < 1 else 1e-3
        assert error <= slack or gain > 1 and kind == "tanh", (error, stat.outcome, alone.outcome)
        assert abs(float(stat["nstep"][i]) - float(alone["nstep"][0])) <= (0 if gain < 1 else 8)
    TRIED["batches whose samples were also solved alone"] += 1


@TINY
@given(
    template=st.sampled_from([DEProx, DEGrad]),
    dtype=st.sampled_from([torch.float32, F64]),
    side=st.sampled_from([4, 6]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-5, 5),
    stepsize=st.sampled_from([0.1, 0.5, 1.0, 5.0]),
    scale=st.sampled_from([0.1, 0.4, 1.5]),
    method=st.sampled_from(["anderson", "broyden", "fixed_point_iter"]),
    tol=st.sampled_from([1e-5, 1e-3]),
)
def test_a_reconstruction_and_its_gradient_are_sound_or_said_not_to_be(
    template, dtype, side, batch, seed, exponent, stepsize, scale, method, tol
):
    _, physics, x, y = imaging(side=side, batch=batch, dtype=dtype, seed=seed)
    y = y * 10.0**exponent
    model = DEQReconstructor(
        template(SmallDenoiser(scale, seed), stepsize=stepsize),
        solver=Solver(method, max_iter=40, tol=tol, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=40, tol=tol, on_failure="ignore")),
    ).to(dtype)
    x_hat = model(y, physics)
    stat = model.forward_stat
    assert bool(x_hat.isfinite().all())
    measured = relative_residual(model.iteration.bind(y, physics), x_hat.detach())
    assert bool((measured <= max(1.01 * tol, 100 * torch.finfo(dtype).eps))[stat.converged].all()), stat.outcome
    x_hat.square().sum().backward()
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert finite or not bool(model.hook.stat.converged.all())
    if batch > 1 and bool(stat.converged.all()) and scale < 1:  # and the batch has nothing to do with it
        alone = model(y[-1:], physics)
        bound = 1e-4 if dtype == torch.float32 else 1e-9
        assert relative_error(alone, x_hat[-1:]) <= bound and bool(model.forward_stat.converged)
    TRIED["reconstructions with their gradients, with random settings"] += 1


KINDS = {  # a type, the largest exponent of ten of its scales, a tolerance that it can reach
    torch.float16: (3, 3e-2),
    torch.bfloat16: (30, 2e-1),
    torch.float32: (30, 1e-4),
    torch.float64: (30, 1e-8),
    torch.complex64: (30, 1e-4),
    torch.complex128: (30, 1e-8),
}


def contraction(rng, n, batch, dtype, gain, unit, saturates):
    r"""``x ↦ u · g(W x / u) + c`` with ``‖W‖ = gain``, in the precision of ``dtype``, and the same in double precision."""
    wide = torch.complex128 if dtype.is_complex else F64
    w = torch.randn(n, n, generator=rng, dtype=wide)
    w = gain * w / torch.linalg.matrix_norm(w, 2)
    c = (unit * torch.randn(batch, n, generator=rng, dtype=wide)).to(dtype)
    w = w.to(dtype)

    def make(w, c):
        def f(x):
            z = (x / unit) @ w.mT
            return unit * (z.tanh() if saturates else z) + c

        return f

    return make(w, c), make(w.to(wide), c.to(wide)), w.to(wide), c.to(wide)


def test_solves_at_any_scale_and_in_any_precision():
    for seed in range(SOLVES):
        rng = torch.Generator().manual_seed(seed)
        pick = lambda values, rng=rng: values[int(torch.randint(len(values), (), generator=rng))]  # noqa: E731
        dtype, gain, method = pick(list(KINDS)), pick([0.0, 0.5, 0.9]), pick([*METHODS])
        most, tol = KINDS[dtype]
        unit = 10.0 ** (most * (2 * float(torch.rand((), generator=rng)) - 1))
        saturates, n, batch = method != "gmres" and pick([False, True]), pick([1, 3, 12]), pick([1, 3])
        saturates = saturates and not dtype.is_complex  # tanh has poles
        f, exact, w, c = contraction(rng, n, batch, dtype, gain, unit, saturates)
        start = pick([0.0, 1.0, 10.0]) * unit
        x0 = (start * torch.randn(batch, n, generator=rng, dtype=w.dtype)).to(dtype)
        x, stat = Solver(method, max_iter=120, tol=tol, on_failure="ignore")(f, x0)
        assert bool(torch.isfinite(x).all()) and x.dtype == dtype, (seed, dtype, unit)
        wide = x.to(w.dtype)
        size = torch.linalg.vector_norm(wide / unit, dim=1)
        left = torch.linalg.vector_norm((exact(wide) - wide) / unit, dim=1) / size
        rounding = 8 * torch.finfo(dtype).eps
        assert bool((left <= 1.05 * tol + rounding)[stat.converged].all()), (seed, dtype, unit, left, stat.outcome)
        assert bool((left >= 0.5 * tol - rounding)[~stat.converged].all()), (seed, dtype, unit, left, stat.outcome)
        if not saturates:
            solution = torch.linalg.solve(torch.eye(n, dtype=w.dtype) - w, (c / unit).mT).mT
            error = torch.linalg.vector_norm(wide / unit - solution, dim=1) / size
            allowed = (1.05 * tol + rounding) / (1 - gain)
            assert bool((error <= allowed)[stat.converged].all()), (seed, dtype, unit, error)
        assert method in ("fixed_point_iter",) or dtype.itemsize < 4 or bool(stat.converged.all()), (seed, stat.outcome)
        TRIED[SCALES] += 1
