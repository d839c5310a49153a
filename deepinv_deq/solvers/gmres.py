r"""GMRES for affine fixed points, a Krylov space for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepinv_deq.solvers.krylov import LOST, Cycle
from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.solvers.problem import Linear, Problem
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
        now = problem.measure(x, x + step, step)
        absolute, relative, plain, traces = now.absolute, now.relative, now.plain, ([now.absolute], [now.relative])
        nstep = torch.full_like(absolute, problem.evaluations)
        active = (absolute < torch.inf) & (relative > tol)
        at_floor, singular, ill = torch.zeros_like(active).repeat(3, 1)
        check = 0 if problem.affine else 1  # only its true residual tells whether this map is affine

        while bool(active.any()) and problem.evaluations + check < max_iter:
            tried, length = active, min(self.depth, max_iter - problem.evaluations - check)
            cycle = Cycle(problem, product, x, step, now, tried, length)
            for j in range(1, length + 1):
                cycle.advance(tol)
                for trace, value in zip(traces, (cycle.absolute, cycle.relative), strict=True):
                    trace.append(torch.where(tried, value, trace[-1]))
                if j % every == 0 and not bool(cycle.active.any()):
                    break
            cycle.settle()
            nstep = nstep + cycle.used
            at_floor, ill = at_floor | cycle.at_floor, ill | cycle.ill
            again = cycle.active if problem.affine else tried
            claimed = tried & ~again
            spent = problem.evaluations >= max_iter
            if spent or not bool(again.any()):
                claimed = tried
                crawls = cycle.crawls(ill, len(traces[0]) - 1 - cycle.size)
                singular = singular | (cycle.active & (cycle.stagnates() | crawls))
            singular = singular | cycle.singular
            new, left = cycle.solution()
            x = where_rows(claimed, new, x)
            absolute, relative = (
                torch.where(claimed, cycle.absolute, absolute),
                torch.where(claimed, cycle.relative, relative),
            )
            plain = torch.where(claimed, problem.measure(new, new + left, left).plain, plain)
            if spent or not bool(again.any()):
                break
            image, step = problem.image_and_step(new)  # the true residual, from which the recurrence starts anew
            nstep = torch.where(again, nstep + 1, nstep)
            true = problem.measure(new, image, step)
            better = again & (true.absolute < absolute)
            fell = better & (true.absolute < 0.999 * absolute)
            x = where_rows(better, new, x)
            absolute, relative, plain = (
                torch.where(better, a, b)
                for a, b in ((true.absolute, absolute), (true.relative, relative), (true.plain, plain))
            )
            active = fell & ~cycle.at_floor & ~cycle.singular & (relative > tol)
            stuck = again & ~fell & ~(relative <= tol)
            rounding = stuck & (relative <= ROUNDING * true.rounding)
            lost = rounding & (relative > (LOST if problem.affine else torch.inf))
            at_floor = at_floor | (rounding & ~lost)
            singular = singular | lost | (stuck & ~rounding & (cycle.size >= STALL))
            now = true

        converged = (relative < torch.inf) & (relative <= tol)
        found = {"x": x, "absolute": absolute, "relative": relative, "plain": plain, "nstep": nstep}
        found |= {"converged": converged, "at_floor": at_floor & ~converged}
        found["singular"] = singular & ~converged & ~at_floor & torch.tensor(problem.affine, device=x.device)
        return x, information(found, traces)

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
