r"""A small DEQ, the same fixed point by an unrolled solve, and one training of either."""

from __future__ import annotations

import deepinv as dinv
import torch
from deepinv.datasets import TensorDataset
from torch import nn
from torch.utils.data import DataLoader

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver
from tests.problems import F64, unrolled

SIZE = (1, 8, 8)


class Contracting(EquilibriumUNet):
    r"""A U-Net that says something from the start, and pulls points together."""

    def __init__(self):
        super().__init__(1, channels=(2, 4))
        nn.init.normal_(self.Conv_1x1.weight, std=0.01)

    def forward(self, x, sigma=None, **kwargs):
        return 0.4 * super().forward(x)


class Unrolled(dinv.models.Reconstructor):
    r"""The fixed point of a DEQ by plain iteration under autograd, with the DEQ's own weights."""

    def __init__(self, model, steps=45):
        super().__init__()
        self.model, self.steps = model, steps

    @property
    def iteration(self):
        return self.model.iteration

    def forward(self, y, physics, **kwargs):
        return unrolled(self.model, y, physics, self.steps)


def small_deq(template=DEProx):
    torch.manual_seed(1)
    return DEQReconstructor(
        template(Contracting(), stepsize=0.7),
        solver=Solver("anderson", max_iter=200, tol=1e-13),
        hook=ModularIDHook(Solver("gmres", max_iter=100, tol=1e-13)),
    ).to(F64)


def images(n=2):
    return torch.rand(n, *SIZE, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.1


def mask(seed=0):
    return (torch.rand(1, *SIZE[1:], generator=torch.Generator().manual_seed(seed)) > 0.3).to(F64)


def inpainting(seed=0):
    return dinv.physics.Inpainting(SIZE, mask=mask(seed), noise_model=dinv.physics.GaussianNoise(0.05))


def denoising(noise):
    return dinv.physics.Denoising(noise)


def trained(model, loss, physics, epochs=1):
    r"""How deepinv's Trainer moves the weights of a model, with the same random numbers every time."""
    torch.manual_seed(0)
    before = [p.detach().clone() for p in model.parameters()]
    dinv.Trainer(
        model,
        physics,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(TensorDataset(x=images(), use_dict_output=True), batch_size=2),
        online_measurements=True,
        losses=[loss],
        metrics=[],
        epochs=epochs,
        device="cpu",
        save_path=None,
        verbose=False,
        show_progress_bar=False,
    ).train()
    return [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
