r"""What a solve has reached: the best point of every sample, the course of its residual, and when it ended at the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.solvers.evaluation import Evaluation, relative_to
from deepinv_deq.states import where_rows

STALL = 10  # After this many evaluations without progress, a residual of rounding size counts as the floor.
FALL = 0.95  # A residual counts as smaller below this fraction of what it was.
ROUNDING = 16.0  # largest residual at the floor, in units of the estimated rounding of one evaluation
# Near the floor a residual may creep down for hundreds of evaluations. One that has not halved in half of a long solve is there, too: at any
# linear rate it would have halved. The terms inside of a map can be larger than its image, and so can their rounding.
CREEP, CREEPING = 60, 40.0
_MEASURES = "absolute", "relative", "residual", "size"


class Progress:
    r"""How far the smallest residual of each sample fell in the last evaluations."""

    def __init__(self) -> None:
        self._smallest: list[Tensor] = []

    def ended(self, k: int, now: Evaluation, best: Best) -> Tensor | None:
        r"""Take in the ``k``-th evaluation.

        :return: which samples are at the floor of rounding; ``None`` for no sample.
        """
        self._smallest.append(best.absolute)
        if k <= STALL:
            return None
        ended = self._stands(FALL, max(STALL, k // 3)) & (best.relative <= ROUNDING * now.rounding)
        if k <= CREEP:
            return ended
        return ended | (self._stands(0.5, max(CREEP, k // 2)) & (best.relative <= CREEPING * now.rounding))

    def _stands(self, part: float, evaluations: int) -> Tensor:
        r"""Whether the smallest residual is still above a part of what it was some evaluations ago."""
        return self._smallest[-1] >= part * self._smallest[-1 - evaluations]

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these."""
        every = torch.stack(self._smallest)
        self._smallest = list(every[:, rows])


class Best:
    r"""The best point of every sample, its residuals and their course, while ever fewer samples are worked on."""

    def __init__(self, x0: Tensor):
        self.x, self.step = x0, torch.zeros_like(x0)
        self.absolute = torch.full((x0.shape[0],), torch.inf, dtype=torch.float64, device=x0.device)
        self.relative = self.residual = self.absolute
        self.size = torch.ones_like(self.absolute)  # to which a residual of Inf is Inf
        self.nstep = torch.zeros_like(self.absolute)
        self.converged, self.at_floor, self.coupled = torch.zeros_like(self.absolute, dtype=torch.bool).repeat(3, 1)
        self.traces: tuple[list[Tensor], list[Tensor]] = [], []
        self._rows: Tensor | None = None  # which samples of the batch these are; None: all of them
        self._all: dict[str, Tensor] = {}

    def update(self, k: int, x: Tensor, now: Evaluation, better: Tensor, active: Tensor, done: Tensor) -> None:
        r"""Take in the ``k``-th evaluated point of each sample."""
        self.x, self.step = where_rows(better, x, self.x), where_rows(better, now.step, self.step)
        for name in _MEASURES:
            setattr(self, name, torch.where(better, getattr(now, name), getattr(self, name)))
        self.nstep = torch.where(active, float(k), self.nstep)
        self.converged = self.converged | (active & done)
        pairs = (now.absolute, self.absolute), (now.relative, self.relative)
        self._trace([torch.where(active, new, best) for new, best in pairs])

    def replace(self, k: int, x: Tensor, now: Evaluation, done: Tensor) -> None:
        r"""The same where the points of all samples are better, with fewer operations."""
        self.x, self.step = x, now.step
        for name in _MEASURES:
            setattr(self, name, getattr(now, name))
        self.nstep, self.converged = torch.full_like(self.nstep, k), self.converged | done
        self._trace([now.absolute, now.relative])

    def _trace(self, courses: list[Tensor]) -> None:
        for trace, course in zip(self.traces, courses, strict=True):
            trace.append(course if self._rows is None else trace[-1].index_copy(0, self._rows, course))

    def measured_together(self, now: Evaluation, done: Tensor, tol: float) -> None:
        r"""Take in the last evaluation. A sample that was done before others, and is not so now, is coupled with them."""
        self.coupled = self.converged & ~done & ~(now.relative <= (ROUNDING * now.rounding).clamp_min(2 * tol))
        self.converged = self.converged & ~self.coupled
        for name in _MEASURES:
            setattr(self, name, torch.where(self.coupled, getattr(now, name), getattr(self, name)))

    def keep(self, rows: Tensor) -> None:
        r"""Work on these samples only."""
        self._all = self._merged()
        self._rows = rows if self._rows is None else self._rows[rows]
        self.step = self.step[rows]
        for name in self._all:
            setattr(self, name, getattr(self, name)[rows])

    def _merged(self) -> dict[str, Tensor]:
        names = "x", *_MEASURES, "nstep", "converged", "at_floor", "coupled"
        mine = {name: getattr(self, name) for name in names}
        if self._rows is None:
            return mine
        return {name: self._all[name].index_copy(0, self._rows, t) for name, t in mine.items()}

    def result(self) -> tuple[Tensor, dict[str, Any]]:
        r"""The points, and the keys of their statistic."""
        found = self._merged()
        found["plain"] = relative_to(found["residual"], found["size"])
        traces = torch.stack(self.traces[0], dim=1), torch.stack(self.traces[1], dim=1)
        return found["x"], information(found, traces)


def information(found: dict[str, Tensor], traces: Sequence[Tensor]) -> dict[str, Any]:
    r"""The keys of a statistic from measures in double precision; residuals get the precision of the point, and are Inf instead of NaN."""
    measured = {"abs_lowest": found["absolute"], "rel_lowest": found["relative"], "plain_residual": found["plain"]}
    measured |= {"abs_trace": traces[0], "rel_trace": traces[1], "nstep": found["nstep"]}
    info = {key: t.nan_to_num(torch.inf, torch.inf).to(found["x"].dtype) for key, t in measured.items()}
    return info | {key: found[key] for key in ("converged", "at_floor", "singular", "coupled") if key in found}
