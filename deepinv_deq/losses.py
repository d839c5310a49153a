r"""Losses for deep equilibrium models: contraction, and equivariant imaging without interpolated images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepinv.loss import Loss, MOILoss
from deepinv.physics import LinearPhysics, Physics
from deepinv.physics.functional import RampFilter
from deepinv.transform import Rotate
from torch import Tensor, nn

from deepinv_deq.certificate import noise_like, state_of
from deepinv_deq.implicit.context import as_in_forward, usable
from deepinv_deq.metrics import solving_model
from deepinv_deq.spectra import jacobian_norm
from deepinv_deq.states import State, as_tuple, minus, plus, times

_STEPS = 3  # largest number of plain steps before the Jacobian is measured


class ContractionLoss(Loss):
    r"""Penalises the norm of the Jacobian, which must be below 1 for the fixed point to be unique.

    .. math::

        w \, \tfrac{1}{n} \big(\|\hat x\| + \|x - \hat x\|\big)^2 \max\big(\|P^{1/2} J P^{1/2}\|_2 - \mathrm{bound}, 0\big)^2

    :math:`J` is the Jacobian of the contractive part of the iteration (:meth:`FixedPointIteration.contractive_part
    <deepinv_deq.FixedPointIteration.contractive_part>`): that of the denoiser with :math:`P \approx (\lambda A^\top A + I)^{-1}`
    for DE-Grad, that of the whole iteration with :math:`P = I` for the other iterations. The norm is estimated from below in the
    Krylov subspace of a few vector-Jacobian products, only the last of which has a graph. Each call measures one random point per
    sample, on the line between the reconstruction :math:`\hat x` and a second point. The second point is a usual start (zeros, the
    linear reconstruction, noise) after zero to three iterations. A solver reaches the same fixed point from every start only if the
    bound holds wherever the solver goes. The first search directions are this line and noise.

    Add it to the losses of a Trainer: ``Trainer(losses=[SupLoss(), ContractionLoss(bound=0.85)])``. The factor before the maximum,
    in which :math:`n` is the number of pixels, has the unit of a squared error of images, so one weight is right at any scale. The
    weight assumes that the other losses count a squared image error once. If they count it ``w`` times, pass ``0.1*w``. With
    ``mode="jfb"``, multiply by the stepsize, too. The factor is larger far from the reconstruction, because contracting there costs the
    reconstruction little. A smaller bound gives a fixed point that takes fewer evaluations, and a less expressive model.

    :param float bound: largest norm without a penalty, in :math:`(0, 1)`.
    :param float weight: weight :math:`w > 0`, no unit.
    :param int iterations: number of vector-Jacobian products.
    :param torch.Generator, None rng: random numbers of points and directions, on the CPU. Default: a generator with seed 0.

    :raises TypeError: if ``rng`` is not a generator.
    :raises ValueError: for a setting out of range, or a model without a :class:`~deepinv_deq.DEQReconstructor`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Denoising
    >>> from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
    >>> from deepinv_deq.losses import ContractionLoss
    >>> model = DEQReconstructor(DEProx(EquilibriumUNet(channels=(4, 8)), stepsize=0.5))
    >>> y = torch.rand(2, 1, 8, 8)
    >>> ContractionLoss(bound=0.85)(x_net=model(y, Denoising()), y=y, physics=Denoising(), model=model).tolist()
    [0.0, 0.0]
    """

    def __init__(
        self, bound: float = 0.85, *, weight: float = 0.1, iterations: int = 6, rng: torch.Generator | None = None
    ):
        super().__init__()
        if not 0 < bound < 1:
            raise ValueError(f"bound must be in (0, 1): with a norm of 1 an iteration need not contract; got {bound}.")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {weight}.")
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations counts vector-Jacobian products: an integer of at least 1, got {iterations}.")
        if not isinstance(rng, torch.Generator | None):
            raise TypeError(f"rng must be a torch.Generator, got {type(rng).__name__}.")
        self.bound, self.weight, self.iterations = bound, weight, iterations
        self.rng = torch.Generator().manual_seed(0) if rng is None else rng

    def forward(self, x_net: Tensor, y: Any, physics: Physics, model: nn.Module, **kwargs: Any) -> Tensor:
        r"""Compute the penalty of every sample.

        :param torch.Tensor x_net: reconstructions, of shape ``(B, C, H, W)``.
        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.nn.Module model: a :class:`~deepinv_deq.DEQReconstructor`, or a model that wraps one.
        :param kwargs: ignored.
        :return: penalties, of shape ``(B,)``.
        """
        if (deq := solving_model(model)) is None:
            raise ValueError(f"ContractionLoss needs a DEQReconstructor, and {type(model).__name__} holds none.")
        with as_in_forward([]):
            penalty = self._penalty(deq.iteration.bind(y, physics), usable((x_net.detach(),))[0], y)
        return penalty if torch.is_grad_enabled() else penalty.detach()

    def _penalty(self, f: Any, x_hat: Tensor, y: Any) -> Tensor:
        start = f.init(y)
        here, end = state_of(x_hat, start), self._end(f, x_hat, start)
        share, away = torch.rand(len(x_hat), generator=self.rng).to(x_hat.device), as_tuple(minus(end, here))
        part = tuple(times(share, t) for t in away)
        norm = jacobian_norm(f, plus(here, part), iterations=self.iterations, rng=self.rng, direction=away[0])
        size = _root_mean_square(x_hat) + _root_mean_square(part[0])
        return self.weight * size.square() * (norm - self.bound).relu().square()

    @torch.no_grad()
    def _end(self, f: Any, x_hat: Tensor, start: State) -> State:
        r"""Where a solve may have come to: without the steps, solves from noise stall far away."""
        ends = (x_hat, as_tuple(start)[0], torch.zeros_like(x_hat), noise_like(x_hat, self.rng))
        chosen = int(torch.randint(len(ends), (), generator=self.rng))
        state = start if chosen == 1 else state_of(ends[chosen], start)
        natural = f.natural(state) or (lambda step: step)
        for _ in range(int(torch.randint(_STEPS + 1, (), generator=self.rng))):
            state = plus(state, natural(f.step(state)))
        return state


def _root_mean_square(x: Tensor) -> Tensor:
    return x.abs().square().flatten(1).mean(dim=1).sqrt()


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
