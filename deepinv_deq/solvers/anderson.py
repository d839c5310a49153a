r"""Anderson acceleration."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.states import unit_size


class Anderson(Method):
    r"""Anderson mixing (:footcite:t:`walker2011anderson`, type II) of the last ``history`` points of each sample.

    The weights minimise :math:`\|\sum_i \alpha_i g_i\|` with :math:`\sum_i \alpha_i = 1`, where :math:`g_i = F(x_i) -
    x_i`. Every residual is stored at unit size, and the Gram matrix is scaled to a unit diagonal before it is regularised. So
    neither the size of the residuals nor their fall over the history changes the weights. One row of the matrix is new per step.
    """

    history = 8

    def __init__(self, x0: Tensor, settings: Settings):
        super().__init__(x0, settings)
        (batch, size), depth = x0.shape, self.depth
        self.changes, self.residuals = x0.new_zeros(2, batch, depth, size)
        self.gram = x0.new_zeros(batch, depth, depth, dtype=torch.float64)
        self.units = x0.new_ones(batch, depth, dtype=torch.float64)
        self.valid = torch.zeros(batch, depth, dtype=torch.bool, device=x0.device)
        self.lam = 100 * torch.finfo(x0.dtype).eps  # of a unit diagonal: above rounding, far below any residual ratio
        self.slot = 0
        self.previous: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""Mix the images of the points in memory."""
        slot, self.slot, g = self.slot, (self.slot + 1) % self.depth, self.residual
        # from one image to the next: a sum of images with large weights would lose the digits that small steps have
        self.changes[:, slot] = 0.0 if self.previous is None else (x - self.previous[0]) + (g - self.previous[1])
        unit = unit_size(g)
        self.residuals[:, slot], self.units[:, slot], self.previous = g / unit, unit[:, 0].double(), (x, g)
        self.valid &= ~restart[:, None]
        self.valid[:, slot] = True
        row = torch.bmm(self.residuals, self.residuals[:, slot, :, None])[..., 0].double()
        self.gram[:, slot, :], self.gram[:, :, slot] = row, row
        weights = self._weights()
        oldest_first = weights.roll(-self.slot, 1)
        older = (oldest_first.cumsum(1) - oldest_first).roll(self.slot, 1)
        mixed = torch.baddbmm(fx[:, None], older.to(x.dtype)[:, None], self.changes, alpha=-1)[:, 0]
        if self.damping == 1.0:
            return mixed
        of_residuals = (weights * self.units).to(x.dtype)[:, None]
        return mixed - (1 - self.damping) * torch.bmm(of_residuals, self.residuals)[:, 0]

    def _weights(self) -> Tensor:
        scale = torch.diagonal(self.gram, dim1=1, dim2=2).rsqrt()
        scale = torch.where(self.valid & (scale < torch.inf), scale, 0.0)
        unit = scale[:, :, None] * self.gram * scale[:, None, :]
        torch.diagonal(unit, dim1=1, dim2=2).add_(torch.where(scale > 0, self.lam, 1.0))
        scale = scale * (self.units.amin(dim=1, keepdim=True) / self.units)
        weights = scale * torch.linalg.solve_ex(unit, scale[..., None]).result[..., 0]
        total = weights.sum(dim=1, keepdim=True)
        newest = torch.zeros_like(weights)
        newest[:, self.slot - 1] = 1.0
        return torch.where(total.abs() > 0, weights / total, newest)

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these."""
        self.changes, self.residuals, self.units = self.changes[rows], self.residuals[rows], self.units[rows]
        self.gram, self.valid = self.gram[rows], self.valid[rows]
        if self.previous is not None:
            self.previous = self.previous[0][rows], self.previous[1][rows]
