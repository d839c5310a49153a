r"""One safeguarded loop for nonlinear fixed points, and the proposal rules that run in it.

A rule proposes the next point from the present one, its image, and the mask of samples that must start anew. The loop
counts, stops, freezes and keeps the best point of every sample by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from deepinv_deq._maps import FlatMap
from deepinv_deq._states import norms, residuals, result, where_rows


class Rule(Protocol):
    r"""Proposes the next point from the present one, its image, and the mask of samples that must start anew."""

    def __call__(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""Propose, for all samples that it remembers."""

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these."""


def iterate(
    propose: Rule,
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int,
    tol: float,
    growth: float,
    sync_every: int,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Run ``x <- propose(x, f(x), restart)`` for each sample until its relative residual is below ``tol``.

    A point whose residual is more than ``growth`` times the best one (or not finite) is rejected: the rule is told to
    forget its history for that sample (``restart``), and the next point is a damped step from the best one. Every
    rejection in a row doubles what is accepted, lest the transient growth of a non-normal map traps the solve.

    Where the map offers an approximate inverse ``P`` of the identity minus its Jacobian, the rule is shown ``x + P(f(x) -
    x)`` in the place of ``f(x)``.

    A sample that is done is frozen on the device at once; the host looks every ``sync_every`` evaluations. When at least
    half of the samples are done, and the map can be restricted to the others, it is.

    :param Rule propose: next point from the present one, its image, and the mask of samples to restart from there.
    :param float growth: largest accepted ratio of a point's residual to the best one so far.
    """
    eps = torch.finfo(x0.dtype).eps
    x, best = x0, _Best(x0)
    rejections = best.absolute.clone().zero_()
    active, floor = torch.ones_like(rejections, dtype=torch.bool), torch.zeros_like(rejections)

    for k in range(1, max_iter + 1):
        fx = image = func(x)
        if isinstance(func, FlatMap) and func.precondition is not None:
            fx = x + func.precondition(fx - x)  # of the same fixed points, in units of the state
        absolute, relative = residuals(x, fx)
        if k == 1:  # a fixed point at zero has no relative accuracy: rounding of the first image is all one can ask for
            floor = eps * norms(fx).nan_to_num(0.0, 0.0)
        done = (relative <= tol) | (absolute <= floor)
        better = active & ((absolute < best.absolute) | done)
        restart = active & ~better & ~((absolute <= growth * 2**rejections * best.absolute) & torch.isfinite(absolute))
        best.update(k, x, fx, absolute, relative, better, active)
        active = active & ~done & torch.isfinite(best.absolute)
        if k == max_iter:
            break
        if k % sync_every == 0:
            left = int(active.sum())
            if left == 0:
                break
            rows = torch.nonzero(active)[:, 0] if 2 * left <= len(active) else None
            fewer = func.subset(rows, x, image) if rows is not None and isinstance(func, FlatMap) else None
            if rows is not None and fewer is not None:
                func = fewer
                propose.keep(rows)
                best.keep(rows)
                x, fx, restart, rejections, active, floor, better = (
                    t[rows] for t in (x, fx, restart, rejections, active, floor, better)
                )
        rejections = torch.where(better, torch.zeros_like(rejections), rejections + restart)
        fallback = best.x + (0.5**rejections)[:, None] * (best.fx - best.x)
        rejected = restart | ~active
        x_next = propose(where_rows(rejected, best.x, x), where_rows(rejected, best.fx, fx), restart)
        x = where_rows(active, where_rows(restart | ~torch.isfinite(x_next).all(dim=1), fallback, x_next), best.x)

    return best.result(tol, floor)


class _Best:
    r"""The best point of every sample, its residuals and their course, while ever fewer samples are worked on."""

    def __init__(self, x0: Tensor):
        self.x = self.fx = x0
        self.absolute = x0.new_full((x0.shape[0],), torch.inf)
        self.relative, self.nstep = self.absolute.clone(), torch.zeros_like(self.absolute)
        self.traces: tuple[list[Tensor], list[Tensor]] = [], []
        self._rows: Tensor | None = None  # which samples of the batch these are; None: all of them
        self._all: tuple[Tensor, ...] = ()

    def update(
        self, k: int, x: Tensor, fx: Tensor, absolute: Tensor, relative: Tensor, better: Tensor, active: Tensor
    ) -> None:
        r"""Take in the ``k``-th evaluated point of each sample."""
        self.x, self.fx = where_rows(better, x, self.x), where_rows(better, fx, self.fx)
        self.absolute = torch.where(better, absolute, self.absolute)
        self.relative = torch.where(better, relative, self.relative)
        self.nstep = torch.where(active, float(k), self.nstep)
        for trace, now, best in zip(self.traces, (absolute, relative), (self.absolute, self.relative), strict=True):
            course = torch.where(active, now, best)
            trace.append(course if self._rows is None else trace[-1].index_copy(0, self._rows, course))

    def keep(self, rows: Tensor) -> None:
        r"""Work on these samples only."""
        self._all = self._merged()
        self._rows = rows if self._rows is None else self._rows[rows]
        self.x, self.fx, self.absolute, self.relative, self.nstep = (
            t[rows] for t in (self.x, self.fx, self.absolute, self.relative, self.nstep)
        )

    def _merged(self) -> tuple[Tensor, ...]:
        mine = self.x, self.absolute, self.relative, self.nstep
        if self._rows is None:
            return mine
        return tuple(a.index_copy(0, self._rows, m) for a, m in zip(self._all, mine, strict=True))

    def result(self, tol: float, floor: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        r"""In TorchDEQ's form. Who was dropped had converged, or had no finite image to begin with."""
        x, absolute, relative, nstep = self._merged()
        converged = self.absolute <= floor
        if self._rows is not None:
            converged = torch.isfinite(absolute).index_copy(0, self._rows, converged)
        return result(x, absolute, relative, self.traces, nstep, (relative <= tol) | converged)


class Picard:
    r"""A plain step along the residual."""

    def __init__(self, damping: float):
        self.damping = damping

    def __call__(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        return x + self.damping * (fx - x)

    def keep(self, rows: Tensor) -> None:
        pass


class Anderson:
    r"""Anderson mixing of the last ``history`` points (type II), for every sample its own.

    The weights minimise :math:`\|\sum_i \alpha_i g_i\|` with :math:`\sum_i \alpha_i = 1`, where :math:`g_i = f(x_i) -
    x_i`. The Gram matrix is scaled to a unit diagonal before it is regularised, so neither the size of the residual nor
    its fall over the history changes the weights; one row of it is new per step.
    """

    def __init__(self, x0: Tensor, history: int, damping: float):
        batch, size = x0.shape
        self.images, self.residuals = x0.new_zeros(2, batch, history, size)
        self.gram = x0.new_zeros(batch, history, history, dtype=torch.float64)
        self.valid = torch.zeros(batch, history, dtype=torch.bool, device=x0.device)
        self.lam = 100 * torch.finfo(x0.dtype).eps  # of a unit diagonal: above rounding, far below any residual ratio
        self.damping, self.slot, self.history = damping, 0, history

    def __call__(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        slot, self.slot = self.slot, (self.slot + 1) % self.history
        g = fx - x
        self.images[:, slot], self.residuals[:, slot] = fx, g
        self.valid &= ~restart[:, None]
        self.valid[:, slot] = True
        row = torch.bmm(self.residuals, g[:, :, None])[..., 0].double()
        self.gram[:, slot, :], self.gram[:, :, slot] = row, row
        alpha = self._weights().to(x.dtype)[:, None]
        mixed = torch.bmm(alpha, self.images)[:, 0]
        if self.damping == 1.0:
            return mixed
        return mixed - (1 - self.damping) * torch.bmm(alpha, self.residuals)[:, 0]

    def _weights(self) -> Tensor:
        scale = torch.diagonal(self.gram, dim1=1, dim2=2).rsqrt()
        scale = torch.where(self.valid & torch.isfinite(scale), scale, 0.0)
        unit = scale[:, :, None] * self.gram * scale[:, None, :]
        torch.diagonal(unit, dim1=1, dim2=2).add_(torch.where(scale > 0, self.lam, 1.0))
        weights = scale * torch.linalg.solve_ex(unit, scale[..., None]).result[..., 0]
        total = weights.sum(dim=1, keepdim=True)
        newest = torch.zeros_like(weights)
        newest[:, self.slot - 1] = 1.0
        return torch.where(total.abs() > 0, weights / total, newest)

    def keep(self, rows: Tensor) -> None:
        self.images, self.residuals = self.images[rows], self.residuals[rows]
        self.gram, self.valid = self.gram[rows], self.valid[rows]


class Broyden:
    r"""Broyden's good method: :math:`x - B g(x)` with :math:`B \approx (\partial g / \partial x)^{-1}`, :math:`B_0 = -I`.

    The inverse is kept as :math:`-I + \sum_i u_i v_i^\top` per sample, and starts anew when ``history`` is full.
    """

    def __init__(self, x0: Tensor, history: int):
        self.u, self.v = x0.new_zeros(2, x0.shape[0], history, x0.shape[1])
        self.used, self.history = 0, history
        self.previous: tuple[Tensor, Tensor] | None = None

    def _apply(self, left: Tensor, right: Tensor, g: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(right, g[:, :, None]).transpose(1, 2), left)[:, 0] - g

    def __call__(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        g = fx - x
        if self.used == self.history:
            self.u.zero_(), self.v.zero_()
            self.used, self.previous = 0, None
        u, v = self.u[:, : self.used + 1], self.v[:, : self.used + 1]
        v.masked_fill_(restart[:, None, None], 0.0)  # with its right half gone, a term is gone
        if self.previous is not None:
            dx, dg = x - self.previous[0], g - self.previous[1]
            vt = self._apply(v, u, dx)
            denominator = (vt * dg).sum(dim=1)
            new_u = (dx - self._apply(u, v, dg)) / denominator[:, None]
            usable = ~restart & torch.isfinite(new_u).all(dim=1) & (dx != 0).any(dim=1)
            u[:, -1], v[:, -1] = (
                where_rows(usable, new_u, torch.zeros_like(x)),
                where_rows(usable, vt, torch.zeros_like(x)),
            )
            self.used += 1
        self.previous = x, g
        return x - self._apply(u, v, g)

    def keep(self, rows: Tensor) -> None:
        self.u, self.v = self.u[rows], self.v[rows]
        if self.previous is not None:
            self.previous = self.previous[0][rows], self.previous[1][rows]
