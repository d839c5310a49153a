r"""One safeguarded loop for nonlinear fixed points, and the base class of the methods that run in it.

A method proposes the next point. The loop counts, stops, freezes and keeps the best point of every sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.solvers.problem import Problem
from deepinv_deq.solvers.progress import Best, Progress
from deepinv_deq.states import everywhere, norms, where_rows


@dataclass(frozen=True)
class Settings:
    r"""Solver settings passed to a method, see :class:`Solver <deepinv_deq.Solver>`.

    :param int max_iter: largest number of evaluations.
    :param float tol: relative residual to reach.
    :param int, None history: number of past points to keep; ``None`` is the method's own default.
    :param float damping: step along the residual.
    :param int sync_every: number of evaluations after which the host checks whether all samples are done.
    """

    max_iter: int = 50
    tol: float = 1e-4
    history: int | None = None
    damping: float = 1.0
    sync_every: int = 1


class Method:
    r"""Base class of the methods: one object per solve, made from the first point.

    A subclass implements :meth:`update`, and :meth:`keep` if it remembers anything per sample.

    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param Settings settings: settings of the solver.
    """

    #: The residual ``F(x) - x`` at the point that :meth:`update` is given; it may have digits that ``fx - x`` has lost.
    residual: Tensor
    #: A residual above this multiple of the best one rejects the point: the loop restarts the sample from the best point.
    growth: float = 10.0
    #: Whether the method may be given ``x + P(F(x) - x)`` in the place of ``F(x)``, where the map has a preconditioner ``P``.
    preconditioned: bool = True
    #: Whether the method evaluates the map at other points than its iterates, as Krylov methods do.
    directions: bool = False
    #: Number of past points kept by default; ``None`` is as many as there are evaluations.
    history: int | None = None

    def __init__(self, x0: Tensor, settings: Settings):
        self.damping = settings.damping
        #: Number of past points to keep in this solve.
        self.depth = min(settings.history or self.history or settings.max_iter, settings.max_iter)

    def update(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""Propose the next point of every sample.

        :param torch.Tensor x: the present point, of shape ``(B, N)``.
        :param torch.Tensor fx: its image.
        :param torch.Tensor restart: mask of shape ``(B,)`` of the samples whose history must be forgotten.
        :return: the next point.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement update(x, fx, restart).")

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these.

        :param torch.Tensor rows: indices of the samples that go on.
        """

    def solve(self, problem: Problem, x0: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
        r"""Solve from ``x0``.

        :param Problem problem: the problem.
        :param torch.Tensor x0: first point, of shape ``(B, N)``.
        :param Settings settings: settings of the solver.
        :return: the best point, and the keys of its :class:`SolverStat <deepinv_deq.SolverStat>`.
        """
        return iterate(self, problem, x0, settings)


def iterate(method: Method, problem: Problem, x0: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
    r"""Run ``x <- update(x, F(x), restart)`` for each sample until its relative residual is below the tolerance.

    A point is rejected if its residual is not finite, or more than ``growth`` times the best one. The method then forgets its
    history of that sample, and the next point is a damped step from the best one. Each consecutive rejection halves that step and
    doubles the acceptance threshold, so that the transient growth of a non-normal map does not trap the solve.

    A sample that is done is frozen on the device at once. The host checks every ``sync_every`` evaluations. When at least
    half of the samples are done, and the map can be restricted to the others, it is. Otherwise the last evaluation tells whether the
    samples that were done before are still: the map may couple them.
    """
    tol, max_iter, eps = settings.tol, settings.max_iter, torch.finfo(x0.dtype).eps
    x, norm, best, progress, whole = x0, norms(x0), Best(x0), Progress(), problem
    shorter, active = torch.ones_like(best.absolute), torch.ones_like(best.converged)
    floor, one, none = torch.zeros_like(best.absolute), shorter, ~active

    for k in range(1, max_iter + 1):
        now = problem.evaluate(x, norm)
        fx, step = now.image, now.step
        done = now.relative <= tol
        if k == 1:  # a fixed point at zero has no relative accuracy: it is reached far below the rounding of the start
            floor = eps**2 * now.size.nan_to_num(0.0, 0.0)
        done = done | (torch.maximum(now.absolute, now.size) <= floor)
        better = active & ((now.absolute < best.absolute) | done)
        improved = everywhere(better)  # then nothing is rejected, as in most evaluations
        if improved:
            restart, shorter = none, one
            best.replace(k, x, now, done)
        else:
            restart = active & ~(better | (shorter * now.absolute < method.growth * best.absolute))
            shorter = torch.where(better, 1.0, torch.where(restart, 0.5 * shorter, shorter))
            best.update(k, x, now, better, active, done)
        active = active & ~done
        if k == 1:
            active = active & (best.absolute < torch.inf)
        stalled = progress.ended(k, now, best)
        if stalled is not None:
            best.at_floor = best.at_floor | (active & stalled)
            active = active & ~stalled
        if k == max_iter:
            break
        as_they_are = False  # whether it is certain that no sample is done or rejected: then nothing needs selecting
        if k % settings.sync_every == 0:
            wanted = active.sum(dtype=torch.float64)
            wanted = wanted if improved else wanted + restart.any() / 2
            restarted, left = math.modf(wanted.item())  # one synchronisation
            if left == 0:
                break
            rows = torch.nonzero(active)[:, 0] if 2 * left <= len(active) else None
            fewer = None if rows is None else problem.subset(rows, x)
            if rows is not None and fewer is not None:
                problem = fewer
                method.keep(rows)
                best.keep(rows)
                progress.keep(rows)
                x, fx, step, restart, shorter, active, floor, one, none = (
                    t[rows] for t in (x, fx, step, restart, shorter, active, floor, one, none)
                )
            as_they_are = not restarted and left == len(active)
        if not as_they_are:
            rejected = restart | ~active
            x, step = where_rows(rejected, best.x, x), where_rows(rejected, best.step, step)
            fx = where_rows(rejected, best.x + best.step, fx)
        method.residual = step
        x_next = method.update(x, fx, restart)
        norm = norms(x_next)  # Inf or NaN where an entry is
        usable = norm < torch.inf if as_they_are else (norm < torch.inf) & ~rejected
        if not everywhere(usable):
            damped = best.x + shorter[:, None].to(x.dtype) * best.step
            x_next = where_rows(usable, x_next, damped)
            x_next = x_next if as_they_are else where_rows(active, x_next, best.x)
            norm = norms(x_next)
        x = x_next

    if problem is whole:
        best.measured_together(now, done, tol)
    return best.result()
