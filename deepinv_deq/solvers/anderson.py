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
        self.images, self.residuals = x0.new_zeros(2, batch, depth, size)
        self.gram = x0.new_zeros(batch, depth, depth, dtype=torch.float64)
        self.units = x0.new_ones(batch, depth, dtype=torch.float64)
        self.valid = torch.zeros(batch, depth, dtype=torch.bool, device=x0.device)
        self.lam = 100 * torch.finfo(x0.dtype).eps  # of a unit diagonal: above rounding, far below any residual ratio
        self.slot = 0

    def update(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""Mix the images of the points in memory."""
        slot, self.slot, damping = self.slot, (self.slot + 1) % self.depth, self.settings.damping
        g = fx - x
        unit = unit_size(g)
        self.images[:, slot], self.residuals[:, slot] = fx, g / unit
        self.units[:, slot] = unit[:, 0].double()
        self.valid &= ~restart[:, None]
        self.valid[:, slot] = True
        row = torch.bmm(self.residuals, self.residuals[:, slot, :, None])[..., 0].double()
        self.gram[:, slot, :], self.gram[:, :, slot] = row, row
        weights = self._weights()
        mixed = torch.bmm(weights.to(x.dtype)[:, None], self.images)[:, 0]
        if damping == 1.0:
            return mixed
        of_residuals = (weights * self.units).to(x.dtype)[:, None]
        return mixed - (1 - damping) * torch.bmm(of_residuals, self.residuals)[:, 0]

    def _weights(self) -> Tensor:
        scale = torch.diagonal(self.gram, dim1=1, dim2=2).rsqrt()
        scale = torch.where(self.valid & torch.isfinite(scale), scale, 0.0)
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
        self.images, self.residuals, self.units = self.images[rows], self.residuals[rows], self.units[rows]
        self.gram, self.valid = self.gram[rows], self.valid[rows]
