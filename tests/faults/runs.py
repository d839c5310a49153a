r"""Trainings in which something goes wrong."""

from __future__ import annotations

import importlib
import random
import time

import deepinv as dinv
import numpy as np
import torch
from deepinv.datasets import TensorDataset
from torch.utils.data import DataLoader

from deepinv_deq import (
    DEProx,
    DEQReconstructor,
    ModularIDHook,
    Solver,
)
from deepinv_deq.training import ResumableTrainer
from tests.problems import F64, SmallDenoiser, imaging
from tests.problems import weights as flat


class Amplify(torch.autograd.Function):
    r"""Identity with a wrong and large derivative, which no few products can invert."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1e3 * g.roll((1, 2), (-1, -2))


class Faulty(SmallDenoiser):
    fault = None

    def forward(self, x):
        out = super().forward(x)
        if self.fault == "expands":
            return 50 * out
        if self.fault == "nan":
            return out * torch.nan
        if self.fault == "nan gradient":
            return out + (0 * x).sqrt()
        if self.fault == "no adjoint":
            return Amplify.apply(out)
        return out


class NaNLoss(dinv.loss.SupLoss):
    bad = False

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * (torch.nan if self.bad else 1.0)


class TwoPasses(dinv.loss.Loss):
    r"""Its second pass through the model is always sound."""

    def forward(self, x, x_net, y, physics, model, **_):
        model.iteration.denoiser.fault = None
        return (model(y.flip(0), physics).flip(0) - x).square().mean(dim=(1, 2, 3)) + (x_net - x).square().mean()


BAD_STEP = 3


def faulty_run(folder=None, fault=None, skip=None, epochs=3, losses=None, dtype=F64, **kwargs):
    r"""Two steps per epoch; ``fault`` strikes in the third, ``skip`` leaves it out. Returns trainer and weights per step."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    _, physics, x, y = imaging(batch=4, dtype=dtype)
    loose = {"tol": 1e-6 if dtype == F64 else 1e-2, "on_failure": "ignore"}
    model = DEQReconstructor(
        DEProx(Faulty(), stepsize=0.5),
        solver=Solver("fixed_point_iter", max_iter=40, **loose),
        hook=ModularIDHook(Solver("gmres", max_iter=6, **loose)),
    ).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(x=x, y=y, use_dict_output=True), 2)
    trainer = ResumableTrainer(
        model, physics, optimizer, loader, epochs=epochs, losses=losses or NaNLoss(), metrics=None, device="cpu",
        save_path=folder, verbose=False, **kwargs,
    )  # fmt: skip
    get_samples, step, weights, steps = trainer.get_samples, optimizer.step, [], [0]

    def get(*args):
        weights.append(flat(model))
        steps[0] += 1
        now = steps[0] == BAD_STEP
        model.iteration.denoiser.fault = fault if now else None
        if isinstance(trainer.losses[0], NaNLoss):
            trainer.losses[0].bad = now and fault == "loss"
        return get_samples(*args)

    trainer.get_samples = get
    if skip:
        optimizer.step = lambda *a, **k: None if steps[0] == BAD_STEP else step(*a, **k)
    return trainer, weights


def unique_folders(monkeypatch=None):
    r"""deepinv names the folder of a run by the second, and these are started faster."""
    module = importlib.import_module("deepinv.training.trainer")
    stamp = lambda: str(time.time_ns())  # noqa: E731
    monkeypatch.setattr(module, "get_timestamp", stamp) if monkeypatch else setattr(module, "get_timestamp", stamp)
