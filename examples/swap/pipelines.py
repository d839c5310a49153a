r"""
Ten pipelines of deepinv's gallery, with the model swapped
==========================================================

Each function is one pipeline: an operator, a model of deepinv, a loss. ``if swapped:`` holds all that changes for a deep equilibrium
model. The topics are those of deepinv 0.5's examples, at 32×32 pixels and on generated images, so that each trains in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import deepinv as dinv
import torch
from deepinv.loss import EILoss, MCLoss, MOILoss, R2RLoss, SplittingLoss, SupLoss, SureGaussianLoss
from deepinv.models import ArtifactRemoval, DnCNN, UNet
from deepinv.optim import DRS, L2, PGD
from deepinv.optim.prior import PnP
from deepinv.physics import GaussianNoise, Physics
from torch import Tensor, nn

from deepinv_deq import DEHQS, DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, FromOptim
from deepinv_deq.datasets import phantoms
from deepinv_deq.losses import ContractionLoss

SIZE, TRAIN, TEST = 32, 32, 8
WIDTHS = (16, 32)  # feature maps of the U-Nets


@dataclass
class Pipeline:
    r"""What a Trainer needs.

    :param Physics physics: the operator of the measurements, with its noise.
    :param torch.nn.Module model: deepinv's model, or the deep equilibrium model in its place.
    :param list losses: losses of deepinv.
    :param float lr: learning rate of Adam.
    :param list operators: operators of the training images, in turn, where there are several.
    """

    physics: Physics
    model: nn.Module
    losses: list[nn.Module]
    lr: float = 2e-3
    channels: int = 1
    operators: list[Physics] = field(default_factory=list)


def images(n: int, channels: int, seed: int) -> Tensor:
    r"""Random phantoms of shape ``(n, channels, SIZE, SIZE)``: independent ellipses mixed into correlated channels."""
    layers = phantoms(n * channels, SIZE, seed).reshape(n, channels, SIZE, SIZE)
    return layers if channels == 1 else 0.7 * layers.mean(dim=1, keepdim=True) + 0.3 * layers


def unet(channels: int = 1) -> nn.Module:
    r"""deepinv's U-Net, without batch norm, as wide as the network of the deep equilibrium models."""
    return UNet(channels, channels, channels_per_scale=WIDTHS, batch_norm=False)


def network(channels: int = 1) -> nn.Module:
    r"""The network of the deep equilibrium models, untrained."""
    return EquilibriumUNet(channels, channels=WIDTHS)


def noise(sigma: float) -> GaussianNoise:
    return GaussianNoise(sigma, rng=torch.Generator().manual_seed(1))


def mri(seed: int = 0) -> Physics:
    generator = dinv.physics.generator.GaussianMaskGenerator(
        (SIZE, SIZE), acceleration=4, rng=torch.Generator().manual_seed(seed)
    )
    return dinv.physics.MRI(mask=generator.step()["mask"], img_size=(2, SIZE, SIZE), noise_model=noise(0.01))


def inpainting(seed: int = 0, keep: float = 0.5, channels: int = 1) -> Physics:
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, SIZE, SIZE, generator=rng) < keep).float()
    return dinv.physics.Inpainting((channels, SIZE, SIZE), mask=mask, noise_model=noise(0.01))


def supervised_inpainting(swapped: bool) -> Pipeline:
    physics = inpainting()
    model, losses = ArtifactRemoval(unet()), [SupLoss()]
    if swapped:
        model = DEQReconstructor(DEProx(network()))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses)


def unfolded_super_resolution(swapped: bool) -> Pipeline:
    physics = dinv.physics.Downsampling((1, SIZE, SIZE), filter="bicubic", factor=2, noise_model=noise(0.01))
    prior = PnP(DnCNN(1, 1, depth=5, nf=16, pretrained=None))
    model, losses = (
        PGD(prior=prior, data_fidelity=L2(), stepsize=1.0, sigma_denoiser=0.03, max_iter=5, unfold=True),
        [SupLoss()],
    )
    if swapped:
        model = DEQReconstructor(DEHQS(network(), stepsize=20.0))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses)


def equilibrium_deblurring(swapped: bool) -> Pipeline:
    physics = dinv.physics.BlurFFT(
        (1, SIZE, SIZE), filter=dinv.physics.blur.gaussian_blur(1.0), noise_model=noise(0.02)
    )
    prior = PnP(network())
    model, losses = (
        PGD(prior=prior, data_fidelity=L2(), stepsize=1.0, sigma_denoiser=0.03, max_iter=20, DEQ=True),
        [SupLoss()],
    )
    if swapped:
        model = DEQReconstructor(FromOptim(model))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses)


def splitting_inpainting(swapped: bool) -> Pipeline:
    physics = inpainting()
    model, losses = ArtifactRemoval(unet()), [SplittingLoss(split_ratio=0.6, eval_split_input=False)]
    if swapped:
        model = DEQReconstructor(DEProx(network()))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses)


def equivariant_mri(swapped: bool) -> Pipeline:
    physics = mri()
    turn = dinv.transform.Rotate(interpolation_mode="bilinear", rng=torch.Generator().manual_seed(0))
    model, losses = ArtifactRemoval(unet(2)), [MCLoss(), EILoss(turn)]
    if swapped:
        model = DEQReconstructor(DEProx(network(2)))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses, channels=2)


def multi_operator_inpainting(swapped: bool) -> Pipeline:
    operators = [inpainting(seed) for seed in range(8)]
    model, losses = ArtifactRemoval(unet()), [MCLoss(), MOILoss(operators, rng=torch.Generator().manual_seed(0))]
    if swapped:
        model = DEQReconstructor(DEProx(network()))
        losses.append(ContractionLoss())
    return Pipeline(operators[0], model, losses, operators=operators)


def r2r_denoising(swapped: bool) -> Pipeline:
    physics = dinv.physics.Denoising(noise(0.1))
    model, losses = ArtifactRemoval(unet()), [R2RLoss(alpha=0.2, eval_n_samples=4)]
    if swapped:
        model = DEQReconstructor(DEProx(network(), stepsize=0.5))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses)


def sure_denoising(swapped: bool) -> Pipeline:
    physics = dinv.physics.Denoising(noise(0.1))
    model, losses = ArtifactRemoval(unet()), [SureGaussianLoss(0.1, rng=torch.Generator().manual_seed(0))]
    if swapped:
        model = DEQReconstructor(DEProx(network(), stepsize=0.5))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses)


def tomography(swapped: bool) -> Pipeline:
    physics = dinv.physics.Tomography(angles=20, img_width=SIZE, normalize=True, noise_model=noise(0.01))
    model, losses = ArtifactRemoval(unet(), mode="pinv"), [SupLoss()]
    if swapped:
        model = DEQReconstructor(DEGrad(network(), data_weight=50.0, stepsize=1 / 51))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses)


def demosaicing(swapped: bool) -> Pipeline:
    physics = dinv.physics.Demosaicing((3, SIZE, SIZE), noise_model=noise(0.01))
    model, losses = (
        DRS(prior=PnP(unet(3)), data_fidelity=L2(), stepsize=1.0, sigma_denoiser=0.03, max_iter=3, unfold=True),
        [SupLoss()],
    )
    if swapped:
        model = DEQReconstructor(DEProx(network(3)))
        losses.append(ContractionLoss())
    return Pipeline(physics, model, losses, channels=3)


PIPELINES: dict[str, Callable[[bool], Pipeline]] = {
    "Inpainting, artifact removal, supervised": supervised_inpainting,
    "Super-resolution, unfolded PGD, supervised": unfolded_super_resolution,
    "Deblurring, deepinv's DEQ, supervised": equilibrium_deblurring,
    "Inpainting, measurement splitting": splitting_inpainting,
    "MRI, equivariant imaging": equivariant_mri,
    "Inpainting, multi-operator imaging": multi_operator_inpainting,
    "Denoising, R2R": r2r_denoising,
    "Denoising, SURE": sure_denoising,
    "CT, artifact removal after pseudo-inverse, supervised": tomography,
    "Demosaicing, unfolded DRS, supervised": demosaicing,
}
