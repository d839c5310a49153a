r"""One safeguarded loop for nonlinear fixed points, and the proposal rules that run in it.

A rule proposes the next point from the present one, its image, and the mask of samples that must start anew. The loop
counts, stops, freezes and keeps the best point of every sample by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepinv_deq._states import norms, residuals, result, where_rows


def iterate(
    propose: Callable[[Tensor, Tensor, Tensor], Tensor],
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int,
    tol: float,
    growth: float,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Run ``x <- propose(x, f(x), restart)`` for each sample until its relative residual is below ``tol``.

    A point whose residual is more than ``growth`` times the best one (or not finite) is rejected: the rule is told to
    forget its history for that sample (``restart``), and the next point is a damped step from the best one. Every
    rejection in a row doubles what is accepted, lest the transient growth of a non-normal map traps the solve.

    :param Callable propose: next point from the present one, its image, and the mask of samples to restart from there.
    :param float growth: largest accepted ratio of a point's residual to the best one so far.
    """
    eps = torch.finfo(x0.dtype).eps
    x, best_x, best_fx = x0, x0, x0
    best = x0.new_full((x0.shape[0],), torch.inf)
    best_rel, rejections, nstep = best.clone(), torch.zeros_like(best), torch.zeros_like(best)
    active = torch.ones_like(best, dtype=torch.bool)
    floor = torch.zeros_like(best)
    traces: tuple[list[Tensor], list[Tensor]] = [], []

    for k in range(1, max_iter + 1):
        fx = func(x)
        absolute, relative = residuals(x, fx)
        if k == 1:  # a fixed point at zero has no relative accuracy: rounding of the first image is all one can ask for
            floor = eps * norms(fx).nan_to_num(0.0, 0.0)
        done = (relative <= tol) | (absolute <= floor)
        better = active & ((absolute < best) | done)
        restart = active & ~better & ~((absolute <= growth * 2**rejections * best) & torch.isfinite(absolute))
        best_x, best_fx = where_rows(better, x, best_x), where_rows(better, fx, best_fx)
        best, best_rel = torch.where(better, absolute, best), torch.where(better, relative, best_rel)
        nstep = torch.where(active, float(k), nstep)
        active = active & ~done & torch.isfinite(best)
        traces[0].append(torch.where(active | better, absolute, best))
        traces[1].append(torch.where(active | better, relative, best_rel))
        if k == max_iter or not active.any():
            break
        rejections = torch.where(better, torch.zeros_like(best), rejections + restart)
        fallback = best_x + (0.5**rejections)[:, None] * (best_fx - best_x)
        rejected = restart | ~active
        x_next = propose(where_rows(rejected, best_x, x), where_rows(rejected, best_fx, fx), restart)
        x = where_rows(active, where_rows(restart | ~torch.isfinite(x_next).all(dim=1), fallback, x_next), best_x)

    return result(best_x, best, best_rel, traces, nstep, (best_rel <= tol) | (best <= floor))


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
        newest = torch.nn.functional.one_hot(torch.tensor((self.slot - 1) % self.history), self.history)
        return torch.where(total.abs() > 0, weights / total, newest.to(weights))


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
        keep = (~restart)[:, None, None]
        u, v = self.u[:, : self.used + 1], self.v[:, : self.used + 1]
        if restart.any():
            u.mul_(keep), v.mul_(keep)
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
