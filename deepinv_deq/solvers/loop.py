r"""One safeguarded loop for nonlinear fixed points, and the base class of the methods that run in it.

A method proposes the next point. The loop counts, stops, freezes and keeps the best point of every sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.solvers.problem import Evaluation, Problem
from deepinv_deq.states import finite_rows, where_rows

STALL = 10  # After this many evaluations without progress, a residual of rounding size counts as the floor.
FALL = 0.95  # A residual counts as smaller below this fraction of the last mark.
ROUNDING = 16.0  # largest residual at the floor, in units of the estimated rounding of one evaluation
# Near the floor a residual may creep down for hundreds of evaluations. One that has not halved in half of a long solve is there, too: at any
# linear rate it would have halved. The terms inside of a map can be larger than its image, and so can their rounding.
CREEP, CREEPING = 60, 40.0


@dataclass(frozen=True)
class Settings:
    r"""Solver settings passed to a method, see :class:`Solver <deepinv_deq.Solver>`.

    :param int max_iter: largest number of evaluations.
    :param float tol: relative error to reach.
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
    r"""Run ``x <- update(x, F(x), restart)`` for each sample until its relative error is below the tolerance.

    A point is rejected if its residual is not finite, or more than ``growth`` times the best one. The method then forgets its
    history of that sample, and the next point is a damped step from the best one. Each consecutive rejection doubles the
    acceptance threshold, so that the transient growth of a non-normal map does not trap the solve.

    A sample that is done is frozen on the device at once. The host checks every ``sync_every`` evaluations. When at least
    half of the samples are done, and the map can be restricted to the others, it is. Otherwise the last evaluation tells whether the
    samples that were done before are still: the map may couple them.
    """
    tol, max_iter, eps = settings.tol, settings.max_iter, torch.finfo(x0.dtype).eps
    x, best, whole = x0, Best(x0), problem
    rejections, age, slow, floor = torch.zeros_like(best.absolute).repeat(4, 1)
    mark = half = best.absolute
    active = torch.ones_like(best.converged)

    for k in range(1, max_iter + 1):
        now = problem.evaluate(x)
        fx, step = now.image, now.step
        if k == 1:  # a fixed point at zero has no relative accuracy: it is reached far below the rounding of the start
            floor = eps**2 * now.size.nan_to_num(0.0, 0.0)
        done = (now.relative <= tol) | ((now.absolute <= floor) & (now.size <= floor))
        better = active & ((now.absolute < best.absolute) | done)
        accepted = now.absolute <= method.growth * 2**rejections * best.absolute
        restart = active & ~better & ~(accepted & (now.absolute < torch.inf))
        fell = better & (now.absolute < FALL * mark)
        age, mark = torch.where(fell, 0.0, age + 1), torch.where(fell, now.absolute, mark)
        halved = better & (now.absolute < 0.5 * half)
        slow, half = torch.where(halved, 0.0, slow + 1), torch.where(halved, now.absolute, half)
        best.update(k, x, now, better, active, done)
        stalled = (age >= max(STALL, k // 3)) & (best.relative <= ROUNDING * now.rounding)
        stalled = stalled | ((slow >= max(CREEP, k // 2)) & (best.relative <= CREEPING * now.rounding))
        stalled = active & ~done & stalled
        best.at_floor = best.at_floor | stalled
        active = active & ~done & ~stalled & (best.absolute < torch.inf)
        if k == max_iter:
            break
        as_they_are = False  # whether it is certain that no sample is done or rejected: then nothing needs selecting
        if k % settings.sync_every == 0:
            left, restarted = divmod(int(2 * active.sum() + restart.any()), 2)  # one synchronisation
            if left == 0:
                break
            rows = torch.nonzero(active)[:, 0] if 2 * left <= len(active) else None
            fewer = None if rows is None else problem.subset(rows, x)
            if rows is not None and fewer is not None:
                problem = fewer
                method.keep(rows)
                best.keep(rows)
                x, fx, step, restart, rejections, age, mark, slow, half, active, floor, better = (
                    t[rows] for t in (x, fx, step, restart, rejections, age, mark, slow, half, active, floor, better)
                )
            as_they_are = not restarted and left == len(active)
        rejections = torch.where(better, 0.0, rejections + restart)
        fallback = best.x + (0.5**rejections)[:, None].to(x.dtype) * best.step
        rejected = restart | ~active
        if not as_they_are:
            x, step = where_rows(rejected, best.x, x), where_rows(rejected, best.step, step)
            fx = where_rows(rejected, best.x + best.step, fx)
        method.residual = step
        x_next = method.update(x, fx, restart)
        x = where_rows(restart | ~finite_rows(x_next), fallback, x_next)
        x = x if as_they_are else where_rows(active, x, best.x)

    if problem is whole:
        best.measured_together(now, done, tol)
    return best.result()


class Best:
    r"""The best point of every sample, its residuals and their course, while ever fewer samples are worked on."""

    def __init__(self, x0: Tensor):
        self.x, self.step = x0, torch.zeros_like(x0)
        self.absolute = torch.full((x0.shape[0],), torch.inf, dtype=torch.float64, device=x0.device)
        self.relative, self.plain = self.absolute.clone(), self.absolute.clone()
        self.nstep = torch.zeros_like(self.absolute)
        self.converged, self.at_floor, self.coupled = torch.zeros_like(self.absolute, dtype=torch.bool).repeat(3, 1)
        self.traces: tuple[list[Tensor], list[Tensor]] = [], []
        self._rows: Tensor | None = None  # which samples of the batch these are; None: all of them
        self._all: dict[str, Tensor] = {}

    def update(self, k: int, x: Tensor, now: Evaluation, better: Tensor, active: Tensor, done: Tensor) -> None:
        r"""Take in the ``k``-th evaluated point of each sample."""
        self.x, self.step = where_rows(better, x, self.x), where_rows(better, now.step, self.step)
        self.plain = torch.where(better, now.plain, self.plain)
        self.absolute = torch.where(better, now.absolute, self.absolute)
        self.relative = torch.where(better, now.relative, self.relative)
        self.nstep = torch.where(active, float(k), self.nstep)
        self.converged = self.converged | (active & done)
        pairs = (now.absolute, self.absolute), (now.relative, self.relative)
        for trace, (new, best) in zip(self.traces, pairs, strict=True):
            course = torch.where(active, new, best)
            trace.append(course if self._rows is None else trace[-1].index_copy(0, self._rows, course))

    def measured_together(self, now: Evaluation, done: Tensor, tol: float) -> None:
        r"""Take in the last evaluation. A sample that was done before others, and is not so now, is coupled with them."""
        self.coupled = self.converged & ~done & ~(now.relative <= (ROUNDING * now.rounding).clamp_min(2 * tol))
        self.converged = self.converged & ~self.coupled
        for name in ("absolute", "relative", "plain"):
            setattr(self, name, torch.where(self.coupled, getattr(now, name), getattr(self, name)))

    def keep(self, rows: Tensor) -> None:
        r"""Work on these samples only."""
        self._all = self._merged()
        self._rows = rows if self._rows is None else self._rows[rows]
        self.step = self.step[rows]
        for name in self._all:
            setattr(self, name, getattr(self, name)[rows])

    def _merged(self) -> dict[str, Tensor]:
        names = "x", "absolute", "relative", "plain", "nstep", "converged", "at_floor", "coupled"
        mine = {name: getattr(self, name) for name in names}
        if self._rows is None:
            return mine
        return {name: self._all[name].index_copy(0, self._rows, t) for name, t in mine.items()}

    def result(self) -> tuple[Tensor, dict[str, Any]]:
        r"""The points, and the keys of their statistic."""
        found = self._merged()
        return found["x"], information(found, self.traces)


def information(found: dict[str, Tensor], traces: tuple[list[Tensor], list[Tensor]]) -> dict[str, Any]:
    r"""The keys of a statistic from measures in double precision; residuals get the precision of the point."""
    dtype = found["x"].dtype
    info = {
        "abs_lowest": found["absolute"].to(dtype),
        "rel_lowest": found["relative"].to(dtype),
        "plain_residual": found["plain"].to(dtype),
        "abs_trace": torch.stack(traces[0], dim=1).to(dtype),
        "rel_trace": torch.stack(traces[1], dim=1).to(dtype),
        "nstep": found["nstep"].to(dtype),
    }
    return info | {key: found[key] for key in ("converged", "at_floor", "singular", "coupled") if key in found}
