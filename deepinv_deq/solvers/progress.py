r"""What a solve has reached: the best point of every sample, the course of its residual, and when it ended at the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.solvers.problem import Evaluation
from deepinv_deq.states import where_rows

STALL = 10  # After this many evaluations without progress, a residual of rounding size counts as the floor.
FALL = 0.95  # A residual counts as smaller below this fraction of the last mark.
ROUNDING = 16.0  # largest residual at the floor, in units of the estimated rounding of one evaluation
# Near the floor a residual may creep down for hundreds of evaluations. One that has not halved in half of a long solve is there, too: at any
# linear rate it would have halved. The terms inside of a map can be larger than its image, and so can their rounding.
CREEP, CREEPING = 60, 40.0


class Progress:
    r"""Numbers of evaluations since the residual of each sample fell, by a little and by half."""

    def __init__(self, x0: Tensor):
        self._factors = torch.tensor([[FALL], [0.5]], dtype=torch.float64, device=x0.device)
        self._marks = self._factors.new_full((2, len(x0)), torch.inf)
        self._ages = torch.zeros_like(self._marks)

    def ended(self, k: int, now: Evaluation, better: Tensor, best: Tensor) -> Tensor | None:
        r"""Take in the ``k``-th evaluation.

        :return: which samples are at the floor of rounding, ``best`` being their smallest relative residuals; ``None`` for no sample.
        """
        fell = better & (now.absolute < self._factors * self._marks)
        self._marks = torch.where(fell, now.absolute, self._marks)
        self._ages = (self._ages + 1).masked_fill(fell, 0.0)
        if k <= STALL:
            return None
        ended = (self._ages[0] >= max(STALL, k // 3)) & (best <= ROUNDING * now.rounding)
        if k <= CREEP:
            return ended
        return ended | ((self._ages[1] >= max(CREEP, k // 2)) & (best <= CREEPING * now.rounding))

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these."""
        self._marks, self._ages = self._marks[:, rows], self._ages[:, rows]


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
        self._trace([torch.where(active, new, best) for new, best in pairs])

    def replace(self, k: int, x: Tensor, now: Evaluation, done: Tensor) -> None:
        r"""The same where the points of all samples are better, with fewer operations."""
        self.x, self.step, self.plain, self.absolute, self.relative = x, now.step, now.plain, now.absolute, now.relative
        self.nstep, self.converged = torch.full_like(self.nstep, k), self.converged | done
        self._trace([now.absolute, now.relative])

    def _trace(self, courses: list[Tensor]) -> None:
        for trace, course in zip(self.traces, courses, strict=True):
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
        traces = torch.stack(self.traces[0], dim=1), torch.stack(self.traces[1], dim=1)
        return found["x"], information(found, traces)


def information(found: dict[str, Tensor], traces: Sequence[Tensor]) -> dict[str, Any]:
    r"""The keys of a statistic from measures in double precision; residuals get the precision of the point."""
    dtype = found["x"].dtype
    info = {
        "abs_lowest": found["absolute"].to(dtype),
        "rel_lowest": found["relative"].to(dtype),
        "plain_residual": found["plain"].to(dtype),
        "abs_trace": traces[0].to(dtype),
        "rel_trace": traces[1].to(dtype),
        "nstep": found["nstep"].to(dtype),
    }
    return info | {key: found[key] for key in ("converged", "at_floor", "singular", "coupled") if key in found}
