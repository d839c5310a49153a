r"""What is measured: sparse-view CT and accelerated MRI, with trained models or denoisers, and one equivariant-imaging step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from torch import Tensor, nn

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, FixedPointIteration
from deepinv_deq.datasets import load_images, phantoms
from deepinv_deq.physics import SparseLinearPhysics

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "benchmarks"  # ignored by git
FILES = {"ct": "ct100_128.npz", "mri": "cardiac_mr_256.npz", "denoiser": "bsds500_gray_256.npz"}


@dataclass
class Task:
    r"""One inverse problem with its fixed-point template, images and loss; ``alpha`` weighs the equivariant term."""

    name: str
    physics: Any
    x: Tensor
    y: Tensor
    iteration: FixedPointIteration
    alpha: float

    def loss(self, model: Callable[..., Tensor], passes: int = 2) -> Tensor:
        r"""Measurement consistency, and ``passes - 1`` equivariant terms with the same rotations every time."""
        x_hat = model(self.y, self.physics)
        loss = dinv.loss.MCLoss()(x_net=x_hat, y=self.y, physics=self.physics).mean()
        rng = torch.Generator(self.y.device).manual_seed(0)
        rotate = dinv.transform.Rotate(interpolation_mode="bilinear", rng=rng)
        for _ in range(passes - 1):
            equivariance = dinv.loss.EILoss(rotate, apply_noise=False)
            loss = loss + self.alpha * equivariance(x_net=x_hat, physics=self.physics, model=model).mean()
        return loss

    def to(self, *args: Any) -> Task:
        r"""The same in another dtype or on another device."""
        self.physics, self.iteration = self.physics.to(*args), self.iteration.to(*args)
        self.x, self.y = self.x.to(*args), self.y.to(*args)
        return self


def make(
    name: str,
    *,
    data: Path | None,
    batch: int,
    size: int | None = None,
    steps: int = 600,
    net: nn.Module | None = None,
) -> Task:
    r"""Build a task.

    :param str name: ``"ct"`` (one channel, 128×128, 50 views, DE-Grad) or ``"mri"`` (two channels, 256×256, 8×, DE-Prox).
    :param Path, None data: folder with the real images; generated phantoms where there is none.
    :param int batch: number of images.
    :param int, None size: another image side.
    :param int steps: how long the denoiser is trained, if it is not there yet.
    :param torch.nn.Module net: another denoiser.
    """
    side = size or {"ct": 128, "mri": 256}[name]
    images = _images(name, data, side)[:batch]
    images = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    torch.manual_seed(0)
    if name == "ct":
        angles = torch.linspace(0, 180, 51)[:-1]
        original = dinv.physics.Tomography(angles, side, circle=False, normalize=True, adjoint_via_backprop=True)
        physics = SparseLinearPhysics.from_physics(original, (1, side, side), cache=CACHE / f"tomography-{side}.pt")
        # the normalised operator makes the measurements small against the image: see the CT example
        iteration: FixedPointIteration = DEGrad(net or denoiser(1, data, steps), stepsize=1 / 51, data_weight=50.0)
        return Task(name, physics, images, physics.A(images), iteration, alpha=0.016)
    rng = torch.Generator().manual_seed(0)
    generator = dinv.physics.generator.GaussianMaskGenerator((side, side), acceleration=8, rng=rng)
    physics = dinv.physics.MRI(mask=generator.step()["mask"], img_size=(2, side, side))
    x = torch.cat([images, torch.zeros_like(images)], dim=1)
    y = physics.A(x)
    y = y + 0.05 * torch.randn(y.shape, generator=rng) * (y != 0)
    return Task(name, physics, x, y, DEProx(net or denoiser(2, data, steps), stepsize=1.0), alpha=1.0)


def contracting(name: str, *, data: Path | None, batch: int, size: int | None = None) -> Task:
    r"""A model that ships, whose iteration contracts, at the size of its training: CT 128×128 with 50 views, MRI 256×256, 8×."""
    # of the images of :func:`make` the last: the models that ship were tested on those, and not trained on them
    task = make(name, data=data, batch=1, size=size, net=nn.Identity())
    side = task.x.shape[-1]
    images = _images(name, data, side)[-batch:]
    task.x = images if name == "ct" else torch.cat([images, torch.zeros_like(images)], dim=1)
    with torch.no_grad():
        task.y = task.physics.A(task.x)
    if name == "mri":
        noise = torch.randn(task.y.shape, generator=torch.Generator().manual_seed(1))
        task.y = task.y + 0.05 * noise * (task.y != 0)
    task.iteration = DEQReconstructor.from_pretrained(f"{name}-ei").iteration
    return task


def _images(name: str, data: Path | None, side: int) -> Tensor:
    file = None if data is None else data / FILES[name]
    return load_images(file, side) if file and file.exists() else phantoms(100, side)


def denoiser(channels: int, data: Path | None, steps: int) -> EquilibriumUNet:
    r"""A denoiser of 32-64-128 feature maps, trained here if it has not been: a few minutes.

    Its Jacobian is kept below 0.9: DE-Prox is the denoiser wherever nothing was measured, and without this has no fixed
    point there.
    """
    file = None if data is None else data / FILES["denoiser"]
    real = bool(file and file.exists())
    weights = CACHE / f"denoiser-{channels}-{'natural' if real else 'phantoms'}-{steps}.pt"
    if not weights.exists():
        command = [sys.executable, str(ROOT / "examples/paper/pretrain_denoiser.py"), "--out", str(weights)]
        command += ["--in-channels", str(channels), "--channels", "32", "64", "128"]
        command += ["--steps", str(steps), "--batch-size", "8", *(["--data", str(file)] if real else [])]
        command += ["--contraction", "0.9", "--contraction-steps", str(steps // 3)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    # frozen power iterations: the denoiser of every method, at every evaluation, is the same function
    return EquilibriumUNet(channels, pretrained=weights).eval()
