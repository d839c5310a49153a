r"""A small model, its data and deepinv's Trainer for both."""

from __future__ import annotations

import deepinv as dinv
import torch
from deepinv.datasets import TensorDataset
from torch.utils.data import DataLoader

from deepinv_deq import FixedPointResidual, SolverEvaluations
from deepinv_deq.datasets import phantoms
from tests.problems import imaging

F32 = torch.float32


def deq(seed=0, tol=1e-4, **kwargs):
    model, physics, *_ = imaging(side=8, dtype=F32, tol=tol, seed=seed, **kwargs)
    return model, physics


def loader(physics, n=4, seed=0, batch_size=2):
    x = phantoms(n, 8, seed=seed)
    return DataLoader(TensorDataset(x=x, y=physics.A(x), use_dict_output=True), batch_size)


def make(kind=dinv.Trainer, *, model=None, physics=None, lr=1e-2, sgd=False, **kwargs):
    torch.manual_seed(0)
    default_model, default_physics = deq()
    model, physics = model or default_model, physics or default_physics
    optimizer = (torch.optim.SGD if sgd else torch.optim.Adam)(model.parameters(), lr=lr)
    settings = {
        "train_dataloader": loader(physics) if not isinstance(physics, list) else [loader(p) for p in physics],
        "epochs": 2,
        "metrics": [dinv.metric.PSNR(), FixedPointResidual(), SolverEvaluations()],
        "device": "cpu",
        "save_path": None,
        "verbose": False,
    }
    return kind(model, physics, optimizer, **(settings | kwargs))
