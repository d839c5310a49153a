r"""Broyden's method."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.states import finite_rows, only_rows, unit_size


class Broyden(Method):
    r"""Broyden's good method (:footcite:t:`broyden1965class`) for :math:`g(x) = F(x) - x = 0`.

    The step is :math:`- B g(x)` with :math:`B \approx (\partial g / \partial x)^{-1}`, :math:`B_0 = -I`. The inverse is kept as
    :math:`-I + \sum_i u_i v_i^\top` per sample, with all :math:`v_i` at unit size, and starts anew when ``history`` is full.
    """

    def __init__(self, x0: Tensor, settings: Settings):
        super().__init__(x0, settings)
        self.u, self.v = x0.new_zeros(2, x0.shape[0], min(self.depth, 8), x0.shape[1])
        self.used = 0
        self.previous: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""Take the last step into the inverse, and make a quasi-Newton step."""
        g = self.residual
        if self.used == self.depth:
            self.u.zero_(), self.v.zero_()
            self.used, self.previous = 0, None
        if self.used == self.u.shape[1]:  # grows, since few solves need all of their budget
            more = min(self.used, self.depth - self.used)
            self.u, self.v = (torch.cat([t, torch.zeros_like(t[:, :more])], dim=1) for t in (self.u, self.v))
        u, v = self.u[:, : self.used + 1], self.v[:, : self.used + 1]
        v.masked_fill_(restart[:, None, None], 0.0)  # Zeroing v_i removes the term u_i v_i^T.
        if self.previous is not None:
            dx, dg = x - self.previous[0], g - self.previous[1]
            vt = _apply(v, u, dx)
            vt = vt / unit_size(vt)
            new_u = (dx - _apply(u, v, dg)) / (vt * dg).sum(dim=1)[:, None]
            usable = ~restart & finite_rows(new_u) & (dx != 0).any(dim=1)
            u[:, -1] = only_rows(usable, new_u)
            v[:, -1] = only_rows(usable, vt)
            self.used += 1
        self.previous = x, g
        return x - _apply(u, v, g)

    def keep(self, rows: Tensor) -> None:
        r"""Forget all samples but these."""
        self.u, self.v = self.u[rows], self.v[rows]
        if self.previous is not None:
            self.previous = self.previous[0][rows], self.previous[1][rows]


def _apply(left: Tensor, right: Tensor, g: Tensor) -> Tensor:
    r""":math:`(-I + \sum_i l_i r_i^\top) g` per sample."""
    return torch.bmm(torch.bmm(right, g[:, :, None]).transpose(1, 2), left)[:, 0] - g
