r"""Plain iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_deq.solvers.loop import Method


class Picard(Method):
    r"""Picard iteration :math:`x \leftarrow x + \beta (F(x) - x)`."""

    growth = torch.inf  # plain iteration has no history to reset, so it never restarts
    preconditioned = False  # a preconditioned step would be another iteration than the one that was asked for

    def update(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        r"""A step along the residual. A copy: a function may return the same tensor in every call."""
        return fx.clone() if self.damping == 1.0 else x + self.damping * self.residual
