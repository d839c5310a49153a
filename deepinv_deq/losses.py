r"""Losses for deep equilibrium models: contraction, and equivariant imaging without interpolated images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepinv.loss import MOILoss
from deepinv.physics import LinearPhysics, Physics
from deepinv.physics.functional import RampFilter
from deepinv.transform import Rotate
from torch import Tensor, nn

from deepinv_deq.contraction import ContractionLoss as ContractionLoss


class TurnedOperatorLoss(MOILoss):
    r"""Equivariant imaging in which the operator is turned, and not the image.

    The measurements :math:`A T_g x` of a turned image are those of the image by an operator that is turned the other way,
    :math:`A_g x`. For an equivariant model,

    .. math::

        \|f(A T_g \hat{x}; A) - T_g \hat{x}\|^2 = \|f(A_g \hat{x}; A_g) - \hat{x}\|^2

    on a continuous domain, but no pixel is interpolated on the right. This is multi-operator imaging
    (:footcite:t:`tachella2022unsupervised`, :class:`deepinv.loss.MOILoss`) with turned versions of the true operator, and with the
    reconstruction :math:`\hat{x}` as a fixed target: no gradient flows through it.

    In the null space of :math:`A`, the target comes from the network, not from data. The measurements :math:`y` themselves are a target
    without that error. Give ``consistency``, an error of measurements :math:`d`, to add :math:`d(A f(A_g \hat{x}; A_g), y)`. Use it
    for measurements without noise only. With noise, :math:`\hat{x}` already contains the noise of :math:`y`. The error of images is
    always the mean squared one: there is no ``metric``.

    :param Sequence[deepinv.physics.Physics] operators: the turned operators :math:`A_g`, of which each call takes one at random.
    :param float weight: weight of the loss.
    :param bool apply_noise: whether the measurements of the turned operators get their noise. Unlike in ``MOILoss``, they get none by default.
    :param torch.nn.Module, None consistency: error of every sample, of shape ``(B,)``, such as :class:`RampFilteredError`.
    :param torch.Generator, None rng: random numbers, on the CPU.

    :raises ValueError: if there are no operators.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Tomography
    >>> from deepinv_deq import DEGrad, DEQReconstructor, EquilibriumUNet
    >>> from deepinv_deq.losses import TurnedOperatorLoss
    >>> angles = torch.arange(4) * 45.0
    >>> turned = [Tomography(angles=angles + turn, img_width=8, normalize=True) for turn in (10.0, 20.0)]
    >>> model = DEQReconstructor(DEGrad(EquilibriumUNet(channels=(4, 8)), stepsize=0.5))
    >>> TurnedOperatorLoss(turned)(torch.rand(1, 1, 8, 8), physics=None, model=model).shape
    torch.Size([1])
    """

    def __init__(
        self,
        operators: Sequence[Physics],
        *,
        weight: float = 1.0,
        apply_noise: bool = False,
        consistency: nn.Module | None = None,
        rng: torch.Generator | None = None,
    ):
        if not operators:
            raise ValueError("TurnedOperatorLoss needs at least one turned operator.")
        super().__init__(physics=list(operators), apply_noise=apply_noise, weight=weight, rng=rng)
        self.consistency = consistency

    def forward(
        self, x_net: Tensor, physics: Physics | None, model: nn.Module, y: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        r"""Compute the loss of every image.

        :param torch.Tensor x_net: reconstructions :math:`\hat{x}`, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics, None physics: the operator :math:`A`; used by ``consistency`` only.
        :param torch.nn.Module model: the model that made them.
        :param torch.Tensor, None y: the measurements; used by ``consistency`` only.
        :param kwargs: ignored.
        :return: loss of shape ``(B,)``.
        :raises ValueError: if ``consistency`` has no operator or no measurements to compare with.
        """
        operator, target = self.next_physics(physics), x_net.detach()
        x = model(operator(target) if self.noise else operator.A(target), operator)
        loss = (x - target).abs().square().flatten(1).mean(dim=1)
        if self.consistency is not None:
            if physics is None or y is None:
                raise ValueError("consistency compares with measurements: call the loss with physics= and y=.")
            loss = loss + self.consistency(physics.A(x), y)
        return self.weight * loss


class RampFilteredError(nn.Module):
    r"""Mean squared error of images, computed from the error of their sinograms.

    By the projection-slice theorem, views sample low frequencies of the image more often than high ones. The ramp filter weighs all
    frequencies equally. A constant, measured with white noise, brings the error to the scale of the image. Use it as ``metric`` of
    :class:`deepinv.loss.MCLoss` or :class:`deepinv.loss.SplittingLoss`.

    :param deepinv.physics.LinearPhysics physics: parallel-beam tomography.
    :param tuple[int, ...] img_size: size of an image, ``(C, H, W)``.
    :param str, torch.device device: device of ``physics``.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Tomography
    >>> from deepinv_deq.losses import RampFilteredError
    >>> physics = Tomography(angles=10, img_width=16, normalize=True)
    >>> error = RampFilteredError(physics, (1, 16, 16))
    >>> error(physics.A(torch.ones(2, 1, 16, 16)), physics.A(torch.zeros(2, 1, 16, 16))).shape
    torch.Size([2])
    """

    def __init__(self, physics: LinearPhysics, img_size: tuple[int, ...], *, device: torch.device | str = "cpu"):
        super().__init__()
        self.ramp, self.scale = RampFilter(), 1.0
        noise = torch.randn(1, *img_size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            self.scale = 1 / float(self(physics.A(noise), torch.zeros((), device=device)).mean())

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        r"""Compute the error of every sample.

        :param torch.Tensor y_hat: sinograms, of shape ``(B, C, detectors, views)``.
        :param torch.Tensor y: sinograms to compare with.
        :return: errors, of shape ``(B,)``.
        """
        error = y_hat - y
        return self.scale * (error * self.ramp(error)).flatten(1).mean(dim=1)


class BicubicRotate(Rotate):
    r"""Rotation with bicubic interpolation. Bilinear interpolation removes detail, and a model trained with it removes detail, too.

    :param kwargs: arguments of :class:`deepinv.transform.Rotate`, without ``interpolation_mode``.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deq.losses import BicubicRotate
    >>> BicubicRotate(n_trans=2)(torch.rand(1, 1, 16, 16)).shape
    torch.Size([2, 1, 16, 16])
    """

    def __init__(self, **kwargs: Any):
        super().__init__(interpolation_mode="bilinear", **kwargs)

    def _transform(self, x: Tensor, theta: Iterable[Any] = (), **kwargs: Any) -> Tensor:
        return torch.cat([self._rotated(x, math.radians(float(angle))) for angle in theta])

    def _rotated(self, x: Tensor, angle: float) -> Tensor:
        ratio = x.shape[-1] / x.shape[-2]  # the axes of affine_grid run from -1 to 1, whatever the shape
        c, s = math.cos(angle), math.sin(angle)
        matrix = x.new_tensor([[c, -s / ratio, 0.0], [s * ratio, c, 0.0]]).expand(len(x), 2, 3)
        grid = nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
        return nn.functional.grid_sample(x, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
