r"""GMRES for affine fixed points, a Krylov space for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deq.solvers.evaluation import Linear
from deepinv_deq.solvers.hessenberg import Numbers
from deepinv_deq.solvers.krylov import LOST, Cycle, Point
from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.solvers.problem import Problem
from deepinv_deq.solvers.progress import ROUNDING, STALL, information
from deepinv_deq.states import unit_size, where_rows


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
        tol, max_iter, every = settings.tol, settings.max_iter, settings.sync_every
        product, x, step = self._start(problem, x0)
        now = Point.of(problem, x, x + step, step)
        absolute, relative, plain = now.absolute, now.relative, now.plain
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
                plain = np.where(claimed, Point.of(problem, new, new + left, left).plain, plain)
            if last:
                break
            image, step = problem.image_and_step(new)  # the true residual, from which the recurrence starts anew
            nstep = np.where(again, nstep + 1, nstep)
            now = Point.of(problem, new, image, step)
            better = again & (now.absolute < absolute)
            fell = better & (now.absolute < 0.999 * absolute)
            x = _choose_rows(better, new, x)
            true = now.absolute, now.relative, now.plain
            absolute, relative, plain = _choose(better, true, (absolute, relative, plain))
            active = fell & ~cycle.at_floor & ~cycle.singular & (relative > tol)
            stuck = again & ~fell & ~(relative <= tol)
            rounding = stuck & (relative <= ROUNDING * now.rounding)
            lost = rounding & (relative > (LOST if problem.affine else np.inf))
            at_floor = at_floor | (rounding & ~lost)
            singular = singular | lost | (stuck & ~rounding & (cycle.size >= STALL))

        converged = (relative < np.inf) & (relative <= tol)
        there = partial(torch.as_tensor, device=x.device)
        measures = {"absolute": absolute, "relative": relative, "plain": plain, "nstep": nstep, "converged": converged}
        measures["at_floor"] = at_floor & ~converged
        measures["singular"] = singular & ~converged & ~at_floor & problem.affine
        traces = [there(np.stack(trace, axis=1)) for trace in zip(*courses, strict=True)]
        return x, information({"x": x} | {key: there(value) for key, value in measures.items()}, traces)

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
    r"""As :func:`deepinv_deq.states.where_rows`, for a mask on the host."""
    if rows.all():
        return new
    return where_rows(torch.as_tensor(rows, device=new.device), new, old) if rows.any() else old
