r"""Networks and models shared by the tests of iterations."""

from __future__ import annotations

import torch
from torch import nn

from deepinv_deq import DEProx, DEQReconstructor, ModularIDHook, Solver
from tests.problems import F64, SmallDenoiser


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).to(F64)


def solve(chunk_size, template=DEProx, denoiser=None, **settings):
    settings = {"stepsize": 0.5} | settings
    return DEQReconstructor(
        template(SmallDenoiser(channels=3) if denoiser is None else denoiser, **settings).to(F64),
        solver=Solver(tol=1e-12, max_iter=300, chunk_size=chunk_size),
        hook=ModularIDHook(Solver("gmres", tol=1e-12, max_iter=300, chunk_size=chunk_size)),
    )
