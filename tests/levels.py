r"""Denoisers with a noise level, and models with them that are solved to rounding."""

from __future__ import annotations

import torch
from deepinv.models import Denoiser
from torch import nn

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, DEQReconstructor, ModularIDHook, Solver
from tests.problems import F64

TEMPLATES = [DEProx, DEGrad, DEHQS, DEADMM]


def exact(iteration):
    return DEQReconstructor(
        iteration,
        solver=Solver("anderson", max_iter=300, tol=1e-13),
        hook=ModularIDHook(Solver("gmres", max_iter=200, tol=1e-13)),
    ).to(F64)


class Level(nn.Module):
    r"""Contracts by its noise level, which it broadcasts over images."""

    def forward(self, x, sigma):
        return 0.5 * torch.tanh(x) / (1 + sigma)


class LevelOfDeepinv(Denoiser):
    r"""The same with deepinv's contract: a noise level of shape (B,)."""

    def forward(self, x, sigma, **kwargs):
        return 0.5 * torch.tanh(x) / (1 + self._handle_sigma(sigma, reference_tensor=x))
