r"""Anderson acceleration."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.states import norms, nowhere


class Anderson(Method):
    r"""Anderson mixing (:footcite:t:`walker2011anderson`, type II) of the last ``history`` points of each sample.

    The weights minimise :math:`\|\sum_i \alpha_i g_i\|` with :math:`\sum_i \alpha_i = 1`, where :math:`g_i = F(x_i) -
    x_i`. Every residual is stored at unit size. So neither the size of the residuals nor their fall over the history changes the weights.
    One row of their Gram matrix is new per step.
    """

    history = 8

    def __init__(self, x0: Tensor, settings: Settings):
        super().__init__(x0, settings)
        (batch, size), depth = x0.shape, self.depth
        self.changes, self.residuals = x0.new_zeros(2, batch, depth, size)
        # of the residuals in memory; a slot without one has an infinite unit, so that it gets no weight
        self.units = x0.new_full((batch, depth), torch.inf, dtype=torch.float64)
        # added to a diagonal of about 1: above rounding, far below any residual ratio
        self.lam = 100 * torch.finfo(x0.dtype).eps
        # of the positive numbers of the type
        self.range = torch.finfo(x0.dtype).tiny * torch.finfo(x0.dtype).eps, torch.finfo(x0.dtype).max
        self.empty = torch.eye(depth, dtype=torch.float64, device=x0.device).expand(batch, -1, -1)
        self.gram = self.empty.clone()
        # 1 where the slot of a row is older than that of a column
        self.older = torch.ones(depth, depth, dtype=torch.float64, device=x0.device).triu(1)
        self.slot = -1
        self.previous: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""Mix the images of the points in memory."""
        slot = self.slot = (self.slot + 1) % self.depth
        g = self.residual
        if self.previous is not None:
            # from one image to the next: a sum of images with large weights would lose the digits that small steps have
            self.changes[:, slot] = (x - self.previous[0]) + (g - self.previous[1])
        self.previous = x, g
        if not nowhere(restart):
            self.gram = torch.where(restart[:, None, None], self.empty, self.gram)
            self.units.masked_fill_(restart[:, None], torch.inf)
        self.units[:, slot] = unit = norms(g).clamp(*self.range)
        self.residuals[:, slot] = scaled = g / unit[:, None].to(g.dtype)
        row = torch.bmm(scaled[:, None], self.residuals.transpose(1, 2))[:, 0].double()
        row.masked_fill_(self.units == torch.inf, 0.0)  # forgotten residuals are still in memory
        row[:, slot] += self.lam
        self.gram[:, slot, :], self.gram[:, :, slot] = row, row
        weights = self._weights()
        self.older = self.older.roll((1, 1), (0, 1))
        of_changes = (weights @ self.older).to(x.dtype)[:, None]
        mixed = torch.baddbmm(fx[:, None], of_changes, self.changes, alpha=-1)[:, 0]
        if self.damping == 1.0:
            return mixed
        of_residuals = (weights * self.units.masked_fill(weights == 0, 0.0)).to(x.dtype)[:, None]
        return mixed - (1 - self.damping) * torch.bmm(of_residuals, self.residuals)[:, 0]

    def _weights(self) -> Tensor:
        r"""The weights of the slots."""
        scale = self.units.amin(dim=1, keepdim=True) / self.units
        weights = scale * torch.linalg.solve_ex(self.gram, scale[..., None]).result[..., 0]
        return weights / weights.sum(dim=1, keepdim=True)

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these."""
        self.changes, self.residuals, self.gram, self.empty = (
            t[rows] for t in (self.changes, self.residuals, self.gram, self.empty)
        )
        self.units = self.units[rows]
        if self.previous is not None:
            self.previous = self.previous[0][rows], self.previous[1][rows]
