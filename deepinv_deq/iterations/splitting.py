r"""Splitting iterations, whose data step is a proximal map: DE-HQS and DE-ADMM."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from deepinv.physics import Physics, StackedPhysics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deq.iterations.base import FixedPointIteration
from deepinv_deq.states import State, as_tuple


class MeasurementIteration(FixedPointIteration):
    r"""Iterations whose steps need the measurements themselves, and not only :math:`A^\top y`."""

    per_channel = False  # the proximal map of the data term has one stepsize

    def constants(self, y: Any, physics: Physics) -> tuple[Tensor, ...]:
        r"""A copy of the measurements.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: tuple of tensors.
        :raises TypeError: for a list of measurements of a physics that is not stacked, such as one over several processes.
        """
        if isinstance(y, (list, tuple, TensorList)) and not isinstance(physics, StackedPhysics):
            raise TypeError(
                f"{type(self).__name__} needs all measurements at hand, and those of {type(physics).__name__} are a "
                f"{type(y).__name__} of {len(y)} parts. Use DEGrad or DEProx, which need their adjoint only."
            )
        return tuple(part.clone() for part in as_tuple(y))  # a loader may use their memory again

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""Infinite: the proximal map of the data term does not expand for any stepsize.

        :param float sqnorm: :math:`\|A\|^2`, not used.
        :return: :math:`\eta`.
        """
        return math.inf


class DEHQS(MeasurementIteration):
    r"""DE-HQS: half-quadratic splitting with a learned proximal map.

    .. math::

        F_\theta(x; y) = D_\theta(\operatorname{prox}_{\eta \lambda f}(x)), \qquad f(x) = \tfrac12 \|A x - y\|^2

    The proximal map of the data term does not expand for any step, where a gradient step would need :math:`\eta < 2/\|A\|^2`.

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: :math:`\eta > 0`.
    :param settings: ``sigma``, ``learn_stepsize``, ``data_weight`` (:math:`\lambda`) and ``context`` of
        :class:`FixedPointIteration <deepinv_deq.FixedPointIteration>`.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Downsampling
    >>> from deepinv_deq import DEHQS, DEQReconstructor, EquilibriumUNet
    >>> physics = Downsampling(img_size=(1, 16, 16), factor=2, filter="gaussian")
    >>> model = DEQReconstructor(DEHQS(EquilibriumUNet(channels=(4, 8)), stepsize=20.0))
    >>> model(physics(torch.rand(1, 1, 16, 16)), physics).shape
    torch.Size([1, 1, 16, 16])
    """

    def forward(self, x: Tensor, physics: Physics, *constants: Tensor) -> Tensor:
        r"""Evaluate :math:`F_\theta(x; y)`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor constants: the measurements.
        :return: image of the same shape as ``x``.
        """
        y, context = self.split(constants)
        return self.denoise(self.data_prox(x, physics, *y), *context)


class DEADMM(MeasurementIteration):
    r"""DE-ADMM: the alternating direction method of multipliers with a learned proximal map.

    The state is a pair: the image and the scaled multiplier.

    .. math::

        z = \operatorname{prox}_{\eta \lambda f}(x - u), \qquad
        F_\theta(x, u; y) = \big(x^+, \; u + z - x^+\big), \qquad x^+ = D_\theta(z + u)

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: :math:`\eta > 0`.
    :param settings: ``sigma``, ``learn_stepsize``, ``data_weight`` (:math:`\lambda`) and ``context`` of
        :class:`FixedPointIteration <deepinv_deq.FixedPointIteration>`.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Inpainting
    >>> from deepinv_deq import DEADMM, DEQReconstructor, EquilibriumUNet
    >>> physics = Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8).tril())
    >>> model = DEQReconstructor(DEADMM(EquilibriumUNet(channels=(4, 8))))
    >>> model(physics(torch.rand(1, 1, 8, 8)), physics).shape
    torch.Size([1, 1, 8, 8])
    """

    def init(self, y: Any, physics: Physics) -> State:
        r"""The fast linear reconstruction, and no multiplier yet.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: two images of shape ``(B, C, H, W)``, without gradient.
        """
        x = cast(Tensor, super().init(y, physics))
        return x, torch.zeros_like(x)

    def forward(  # type: ignore[override]
        self, state: tuple[Tensor, Tensor], physics: Physics, *constants: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Evaluate :math:`F_\theta(x, u; y)`.

        :param tuple[torch.Tensor, torch.Tensor] state: image and multiplier, of shape ``(B, C, H, W)`` each.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor constants: the measurements.
        :return: a pair of the same shapes.
        """
        x, u = state
        y, context = self.split(constants)
        z = self.data_prox(x - u, physics, *y)
        x = self.denoise(z + u, *context)
        return x, u + z - x
