r"""How many evaluations and products are necessary: full GMRES in float64 on the problem linearised at the fixed point.

Everything is counted until the *error* is small enough, not the residual: 1e-3 for images, 1e-2 for the adjoint solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from deepinv_deq import Solver
from deepinv_deq.course import Course
from deepinv_deq.implicit.adjoint import Adjoint
from deepinv_deq.maps import AffineMap
from tests.benchmarks.tasks import Task

IMAGE, ADJOINT = 1e-3, 1e-2
MOST = 300  # products of full GMRES
Linear = Callable[[Tensor], Tensor]


class _Reached(Exception):
    pass


class Watch(Course):
    r"""Counts the evaluations of one image until the point is near enough to a fixed point, and ends the solve there."""

    def __init__(self, f: Any, exact: Tensor, target: float):
        super().__init__(f, None, lambda x: x)
        self.exact, self.target, self.count, self.errors = exact, target, 0, []

    def _record(self, x: Any) -> None:
        self.count += 1
        self.errors.append(float((x.double() - self.exact).norm() / self.exact.norm()))
        if self.errors[-1] <= self.target:
            raise _Reached

    def select(self, rows: Any) -> None:
        return None


def of_image(task: Task, exact: Tensor, i: int) -> tuple[Any, Tensor, Tensor]:
    r"""The bound map of one image, its start, and its fixed point."""
    y = task.y[i : i + 1]
    return task.iteration.bind(y, task.physics), task.iteration.init(y, task.physics), exact[i : i + 1]


def evaluations(
    task: Task, exact: Tensor, i: int, solver: Solver, target: float = IMAGE, start: Tensor | None = None
) -> float:
    r"""Evaluations of one solve until the first point within ``target``; infinite if there is none."""
    f, x0, x_star = of_image(task, exact, i)
    x0 = x0 if start is None else start
    watch = Watch(f, x_star, target)
    try:
        with torch.no_grad():
            solver(watch, x0)
    except _Reached:
        return watch.count
    return float("inf")


def jacobian(f: Any, x: Tensor) -> Linear:
    r"""Products of the Jacobian at ``x`` with directions."""

    def product(v: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
            assert out is not None
            return out

    return product


def adjoint(f: Any, x: Tensor) -> Linear:
    r"""Products of cotangents with the Jacobian at ``x``."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        image = f(x)
    return lambda b: torch.autograd.grad(image, x, b, retain_graph=True)[0]


def products_of_gmres(
    linear: Linear,
    rhs: Tensor,
    error: Callable[[Tensor], float],
    target: float,
    inverse: Linear | None,
    left: bool,
    most: int = MOST,
) -> float:
    r"""Products that full GMRES on ``d - linear(d) = rhs`` takes until ``error(d) <= target``; infinite if ``most`` do not suffice.

    :param Callable, None inverse: preconditioner, on the ``left`` (whose residual is least) or on the right.
    """
    precondition = inverse or (lambda r: r)

    def operator(v: Tensor) -> tuple[Tensor, Tensor]:
        z = v if left else precondition(v)
        w = z - linear(z)
        return (precondition(w) if left else w), z

    r = precondition(rhs) if left else rhs
    beta = r.norm()
    basis, directions = [r / beta], []
    h = torch.zeros(most + 1, most, dtype=torch.float64)
    for k in range(1, most + 1):
        w, z = operator(basis[-1])
        directions.append(z)
        for _ in range(2):
            for j, v in enumerate(basis):
                c = (v * w).sum()
                h[j, k - 1] += c
                w = w - c * v
        h[k, k - 1] = w.norm()
        basis.append(w / w.norm())
        e = torch.zeros(k + 1, 1, dtype=torch.float64)
        e[0] = beta
        weights = torch.linalg.lstsq(h[: k + 1, :k], e).solution[:, 0]
        if error(sum(a * d for a, d in zip(weights, directions, strict=True))) <= target:
            return k
    return float("inf")


def forward_limit(task: Task, exact: Tensor, i: int) -> dict[str, float]:
    r"""Full GMRES for ``x* - x0`` with the Jacobian at ``x*``: one evaluation at ``x0`` for the residual, and its products."""
    f, x0, x_star = of_image(task, exact, i)
    linear, change = jacobian(f, x_star), x_star - x0
    rhs = change - linear(change)

    def error(d: Tensor) -> float:
        return float((d - change).norm() / x_star.norm())

    out = {"plain": 1 + products_of_gmres(linear, rhs, error, IMAGE, None, False)}
    if inverse := f.preconditioner(x_star):
        out["preconditioned"] = 1 + products_of_gmres(linear, rhs, error, IMAGE, inverse, True)
    return out


def cotangent(task: Task, exact: Tensor, i: int) -> Tensor:
    r"""That of a squared error."""
    return exact[i : i + 1] - task.x[i : i + 1].to(exact)


def adjoint_limit(task: Task, exact: Tensor, i: int) -> tuple[dict[str, float], Tensor]:
    r"""Full GMRES on the adjoint equation, and its solution."""
    f, _, x_star = of_image(task, exact, i)
    linear, g = adjoint(f, x_star), cotangent(task, exact, i)
    inverse = f.preconditioner(x_star)
    solver = Solver("gmres", max_iter=400, tol=1e-6, history=100)
    b_star = solver(AffineMap(linear, g, inverse), torch.zeros_like(g))[0]

    def error(b: Tensor) -> float:
        return float((b - b_star).norm() / b_star.norm())

    out = {"plain": products_of_gmres(linear, g, error, ADJOINT, None, False)}
    if inverse:
        out["preconditioned"] = products_of_gmres(linear, g, error, ADJOINT, inverse, False)
    return out, b_star


def products(task: Task, exact: Tensor, b_star: Tensor, i: int, solver: Solver) -> tuple[int, float]:
    r"""Products of our adjoint solve at the loosest of its tolerances that gives :data:`ADJOINT`, and its error."""
    f, _, x_star = of_image(task, exact, i)
    x = x_star.to(task.y).requires_grad_()
    g, inverse = cotangent(task, exact, i).to(x), f.preconditioner(x.detach())
    for tol in (1e-1, 5e-2, 3e-2, 2e-2, 1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4, 3e-4, 1e-4):
        solves = Adjoint(replace(solver, tol=tol), exact=True, single=True, report=lambda stat: None)
        with torch.enable_grad():
            image = f.step(x) if f.has_own_step else f(x)
        (b,), _, stat = solves.pull_back((image,), (x,), (), (g,), inverse, steps=f.has_own_step)
        assert stat is not None
        error = float((b.double() - b_star).norm() / b_star.norm())
        if error <= ADJOINT:
            break
    return int(stat["nstep"].max()), error
