r"""Anderson acceleration."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.states import everywhere, unit_size


class Anderson(Method):
    r"""Anderson mixing (:footcite:t:`walker2011anderson`, type II) of the last ``history`` points of each sample.

    The weights minimise :math:`\|\sum_i \alpha_i g_i\|` with :math:`\sum_i \alpha_i = 1`, where :math:`g_i = F(x_i) -
    x_i`. Every residual is stored at unit size, and the Gram matrix has a unit diagonal before it is regularised. So
    neither the size of the residuals nor their fall over the history changes the weights. One row of the matrix is new per step.
    """

    history = 8

    def __init__(self, x0: Tensor, settings: Settings):
        super().__init__(x0, settings)
        (batch, size), depth = x0.shape, self.depth
        self.changes, self.residuals = x0.new_zeros(2, batch, depth, size)
        self.units = x0.new_ones(batch, depth, dtype=torch.float64)
        # of the residuals in their units; a slot without one has an infinite norm, so that it gets no weight
        self.norms = torch.full_like(self.units, torch.inf)
        lam = 100 * torch.finfo(x0.dtype).eps  # of a unit diagonal: above rounding, far below any residual ratio
        self.empty = (1 + lam) * torch.eye(depth, dtype=torch.float64, device=x0.device).expand(batch, -1, -1)
        self.gram = self.empty.clone()
        self.slot = 0
        self.previous: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""Mix the images of the points in memory."""
        slot, self.slot, g = self.slot, (self.slot + 1) % self.depth, self.residual
        if self.previous is not None:
            # from one image to the next: a sum of images with large weights would lose the digits that small steps have
            self.changes[:, slot] = (x - self.previous[0]) + (g - self.previous[1])
        self.previous = x, g
        if not everywhere(~restart):
            self.gram = torch.where(restart[:, None, None], self.empty, self.gram)
            self.norms.masked_fill_(restart[:, None], torch.inf)
        unit = unit_size(g)
        scaled = g / unit
        self.residuals[:, slot], self.units[:, slot] = scaled, unit[:, 0].double()
        row = torch.bmm(scaled[:, None], self.residuals.transpose(1, 2))[:, 0].double()
        norm = row[:, slot, None].sqrt()  # from the same products, so that their rounding cancels
        norm = torch.where(norm > 0, norm, torch.inf)
        self.norms[:, slot] = norm[:, 0]
        row = row / norm / self.norms
        row[:, slot] = self.empty[:, slot, slot]
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
        r"""The weights of the slots, NaN where no slot has a residual."""
        sizes = self.units * self.norms
        scale = sizes.amin(dim=1, keepdim=True) / sizes
        weights = scale * torch.linalg.solve_ex(self.gram, scale[..., None]).result[..., 0]
        return weights / weights.sum(dim=1, keepdim=True)

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these."""
        self.changes, self.residuals, self.gram, self.empty = (
            t[rows] for t in (self.changes, self.residuals, self.gram, self.empty)
        )
        self.units, self.norms = self.units[rows], self.norms[rows]
        if self.previous is not None:
            self.previous = self.previous[0][rows], self.previous[1][rows]
