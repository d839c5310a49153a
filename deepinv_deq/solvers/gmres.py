r"""GMRES for affine fixed points, a Krylov space for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from deepinv_deq import compat
from deepinv_deq.maps import AffineMap
from deepinv_deq.solvers.evaluation import Linear, relative_to
from deepinv_deq.solvers.hessenberg import Numbers
from deepinv_deq.solvers.krylov import LOST, Cycle, HasTangent, Point
from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.solvers.problem import Problem
from deepinv_deq.solvers.progress import ROUNDING, STALL, information
from deepinv_deq.states import Layout, norms, unit_size, where_rows


class GMRES(Method):
    r"""GMRES (:footcite:t:`saad1986gmres`) for :math:`b = \ell(b) + c`, that is :math:`(I - \ell) b = c`.

    One evaluation of :math:`\ell` per step; no method that sees :math:`\ell` through products alone needs fewer. With a
    preconditioner it is flexible GMRES (:footcite:t:`saad1993flexible`), which minimises the same residual. ``history`` is the
    number of basis vectors kept before a restart, which bounds the memory.

    For a map that is not an :class:`AffineMap <deepinv_deq.maps.AffineMap>`, one evaluation at zero gives :math:`c`, and one
    after each cycle measures the answer. The best point evaluated is returned.
    """

    history = 30
    directions = True

    def solve(self, problem: Problem, x0: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
        r"""Solve from ``x0``.

        :param Problem problem: the problem.
        :param torch.Tensor x0: first point, of shape ``(B, N)``.
        :param Settings settings: settings of the solver.
        :return: the best point, and the keys of its :class:`SolverStat <deepinv_deq.SolverStat>`.
        """
        try:
            return self._solve(problem, x0, settings)
        except HasTangent:
            return self._solve_with_tangent(problem, x0, settings)

    def _solve(self, problem: Problem, x0: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
        tol, max_iter, every = settings.tol, settings.max_iter, settings.sync_every
        product, x, step = self._start(problem, x0)
        measured = problem.measure(x, x + step, step)
        now, plain = Point.of(measured, x), measured.plain
        absolute, relative = now.absolute, now.relative
        courses: list[Sequence[Numbers]] = [(absolute, relative)]
        nstep = np.full(len(x), float(problem.evaluations))
        active = (absolute < np.inf) & (relative > tol)
        at_floor = singular = ill = np.zeros_like(active)
        check = 0 if problem.affine else 1  # only its true residual tells whether this map is affine

        while active.any() and problem.evaluations + check < max_iter:
            tried, length = active, min(self.depth, max_iter - problem.evaluations - check)
            cycle = Cycle(problem, product, x, step, now, tried, length)
            for j in range(1, length + 1):
                cycle.advance()
                if j % every == 0 or j == length:
                    cycle.look(tol)
                    if not cycle.active.any():
                        break
            for course in cycle.courses:
                courses.append(_choose(tried, course, courses[-1]))
            cycle.settle()
            nstep = nstep + cycle.used
            at_floor, ill = at_floor | cycle.at_floor, ill | cycle.ill
            again = cycle.active if problem.affine else tried
            claimed = tried & ~again
            last = problem.evaluations >= max_iter or not again.any()
            if last:
                claimed = tried
                crawls = cycle.crawls(ill, len(courses) - 1 - cycle.size)
                singular = singular | (cycle.active & (cycle.stagnates() | crawls))
            singular = singular | cycle.singular
            new, left = cycle.solution()
            x = _choose_rows(claimed, new, x)
            absolute, relative = _choose(claimed, (cycle.absolute, cycle.relative), (absolute, relative))
            if claimed.any():
                plain = _choose_rows(claimed, relative_to(norms(left), norms(new + left)), plain)
            if last:
                break
            image, step = problem.image_and_step(new)  # the true residual, from which the recurrence starts anew
            nstep = np.where(again, nstep + 1, nstep)
            measured = problem.measure(new, image, step)
            now = Point.of(measured, new)
            better = again & (now.absolute < absolute)
            fell = better & (now.absolute < 0.999 * absolute)
            x = _choose_rows(better, new, x)
            plain = _choose_rows(better, measured.plain, plain)
            absolute, relative = _choose(better, (now.absolute, now.relative), (absolute, relative))
            active = fell & ~cycle.at_floor & ~cycle.singular & (relative > tol)
            stuck = again & ~fell & ~(relative <= tol)
            rounding = stuck & (relative <= ROUNDING * now.rounding)
            lost = rounding & (relative > (LOST if problem.affine else np.inf))
            at_floor = at_floor | (rounding & ~lost)
            singular = singular | lost | (stuck & ~rounding & (cycle.size >= STALL))

        converged = (relative < np.inf) & (relative <= tol)
        singular = singular & ~converged & ~at_floor & problem.affine
        rows = np.stack([absolute, relative, nstep, converged, at_floor & ~converged, singular])
        there = torch.as_tensor(np.concatenate([rows, *courses]), device=x.device)  # one copy
        found = dict(zip(("absolute", "relative", "nstep"), there[:3], strict=True)) | {"x": x, "plain": plain}
        found |= {key: t > 0 for key, t in zip(("converged", "at_floor", "singular"), there[3:6], strict=True)}
        return x, information(found, (there[6::2].T, there[7::2].T))

    def _solve_with_tangent(self, problem: Problem, x0: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
        r"""In forward mode: the tangent of the solution is that of its residual, solved for with the same linear part."""
        with compat.tangents(False):
            x, info = self._solve(problem, x0, settings)
        tangent = forward_ad.unpack_dual(problem.image_and_step(x)[1]).tangent
        if tangent is None:  # only the start had one
            return x, info
        with compat.tangents(False):
            zero = torch.zeros_like(x)
            product = self._start(problem, zero)[0]
            equation = AffineMap(lambda v: v - product(v), tangent, problem.precondition, lambda v: -product(v))
            linear = Problem(equation, Layout(x, batched=True), zero, precondition=True)
            v, of_tangent = linear.leave(*self._solve(linear, zero, settings))
        return forward_ad.make_dual(x, v), info | {"converged": info["converged"] & of_tangent["converged"]}

    def _start(self, problem: Problem, x0: Tensor) -> tuple[Linear, Tensor, Tensor]:
        r"""The product with :math:`I - \ell`, the start (x0 or zero, whichever has the smaller residual) and its residual."""
        zero = torch.zeros_like(x0)
        offset = problem.offset if problem.affine else problem(zero)
        if problem.affine:
            product = problem.product
        else:
            unit = unit_size(where_rows((offset != 0).any(dim=1), offset, x0))  # products at the size of the problem
            product = lambda b: b - (problem(unit * b) - offset) / unit  # noqa: E731
        if not bool(x0.any()):
            return product, x0, offset
        image, step = problem.image_and_step(x0)
        there, here = problem.measure(zero, offset, offset), problem.measure(x0, image, step)
        worse = ~(here.absolute <= there.absolute) & (there.absolute < torch.inf)
        return product, where_rows(worse, zero, x0), where_rows(worse, offset, step)


def _choose(rows: Numbers, new: Sequence[Numbers], old: Sequence[Numbers]) -> tuple[Numbers, ...]:
    return tuple(np.where(rows, a, b) for a, b in zip(new, old, strict=True))


def _choose_rows(rows: Numbers, new: Tensor, old: Tensor) -> Tensor:
    if rows.all() or not rows.any():
        return new if rows.all() else old
    there = torch.as_tensor(rows, device=new.device)
    return torch.where(there if new.ndim == 1 else there[:, None], new, old)
