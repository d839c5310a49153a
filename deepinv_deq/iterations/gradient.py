r"""Gradient-based iterations: DE-Grad and DE-Prox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from deepinv_deq.iterations.base import FixedPointIteration
from deepinv_deq.iterations.circulant import CirculantInverse, spectrum
from deepinv_deq.iterations.prox import measurement, prox_by_cg, prox_of_zero
from deepinv_deq.states import State, as_tuple

_FORMULA = ("forward", "step", "data_gradient")  # the methods that the formula of DE-Grad is made of


class DEProx(FixedPointIteration):
    r"""DE-Prox: proximal gradient descent with a learned proximal map (eq. 5-6, :footcite:t:`gilton2021deep`).

    .. math::

        F_\theta(x; y) = D_\theta(x - \eta \lambda A^\top (A x - y))

    For denoising (:math:`A = I`) with :math:`\eta \lambda = 1`, the right-hand side is :math:`D_\theta(y)` for every :math:`x`: a
    solve then takes two evaluations and the implicit gradient is that of a plain network. Use a smaller stepsize if the
    iteration shall do more than that.

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: step :math:`\eta > 0`; the gradient step does not diverge for
        :math:`\eta < 2 / (\lambda \|A\|^2)`.
    :param settings: ``sigma``, ``learn_stepsize``, ``data_weight`` (:math:`\lambda`) and ``context`` of
        :class:`FixedPointIteration <deepinv_deq.FixedPointIteration>`.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Inpainting
    >>> from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
    >>> physics = Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8).tril())
    >>> model = DEQReconstructor(DEProx(EquilibriumUNet(channels=(4, 8))))
    >>> model(physics(torch.rand(2, 1, 8, 8)), physics).shape
    torch.Size([2, 1, 8, 8])
    """

    def forward(self, x: Tensor, physics: Physics, *constants: Tensor) -> Tensor:
        r"""Evaluate :math:`F_\theta(x; y)`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor constants: :math:`A^\top y`.
        :return: image of the same shape as ``x``.
        """
        (aty,), context = self.split(constants)
        return self.denoise(x - self.stepsize * self.data_gradient(x, physics, aty), *context)


class DEGrad(FixedPointIteration):
    r"""DE-Grad: gradient descent on data term plus RED (eq. 11, :footcite:t:`gilton2021deep,romano2017little`).

    .. math::

        F_\theta(x; y) = x - \eta \lambda A^\top (A x - y) - \eta (x - D_\theta(x))

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: step :math:`\eta > 0`; for a firmly non-expansive residual :math:`x - D_\theta(x)` the iteration
        does not diverge for :math:`\eta < 2 / (\lambda \|A\|^2 + 1)`.
    :param settings: ``sigma``, ``learn_stepsize``, ``data_weight`` (:math:`\lambda`) and ``context`` of
        :class:`FixedPointIteration <deepinv_deq.FixedPointIteration>`.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Tomography
    >>> from deepinv_deq import DEGrad, DEQReconstructor, EquilibriumUNet
    >>> physics = Tomography(angles=10, img_width=16, normalize=True)
    >>> model = DEQReconstructor(DEGrad(EquilibriumUNet(channels=(4, 8)), data_weight=50.0, stepsize=1 / 51))
    >>> model(physics(torch.rand(1, 1, 16, 16)), physics).shape
    torch.Size([1, 1, 16, 16])
    """

    def step(self, x: Tensor, physics: Physics, *constants: Tensor) -> Tensor:
        r"""The residual :math:`F_\theta(x; y) - x`, without the cancellation of a small step from :math:`x` to :math:`x`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor constants: what :meth:`constants` returned.
        :return: image of the same shape as ``x``.
        """
        own, context = self.split(constants)
        if self._keeps_measurements(physics):
            gradient = self.data_weight * physics.A_adjoint(physics.A(x) - measurement(own, physics))
        else:
            gradient = self.data_gradient(x, physics, *own)
        return -self.stepsize * (gradient + x - self.denoise(x, *context))

    def constants(self, y: Any, physics: Physics) -> tuple[Tensor, ...]:
        r"""A copy of the measurements; :math:`A^\top y` where the physics has an ``A_adjoint_A`` of its own, or a subclass a ``forward``,
        ``step``, ``data_gradient`` or ``constants``.

        In :math:`A^\top (A x - y)` the error of rounding is one of measurements. In :math:`A^\top A x - A^\top y` it is one of images:
        :math:`\lambda` times as large in what no measurement sees. On CT the residual then stops falling ten times earlier.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: tuple of tensors.
        """
        return (
            tuple(t.clone() for t in as_tuple(y))
            if self._keeps_measurements(physics)
            else super().constants(y, physics)
        )

    def _keeps_measurements(self, physics: Physics) -> bool:
        own = getattr(type(physics), "A_adjoint_A", None) is not LinearPhysics.A_adjoint_A
        # what other constants are must not depend on the physics
        return not self._overrides("constants", *_FORMULA) and not own and "A_adjoint_A" not in physics.__dict__

    def _overrides(self, *names: str) -> bool:
        r"""Whether a subclass, or the object itself, has one of these methods of its own."""
        return any(name in vars(self) or getattr(type(self), name) is not getattr(DEGrad, name) for name in names)

    def contractive_part(
        self, x: State, physics: Physics, *constants: Tensor, exact: bool = False
    ) -> tuple[State, Callable[[Any], Any] | None]:
        r"""The denoiser, whose Jacobian has to stay below :math:`\lambda A^\top A + I`.

        A subclass that overrides ``forward``, ``step`` or ``data_gradient`` gets the whole iteration, in the Euclidean norm.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: as in :meth:`forward`.
        :param bool exact: whether :math:`P` is exact, by ``physics.prox_l2``, or by a few preconditioned steps of conjugate gradients.
        :return: the denoised image, and :math:`P \approx (\lambda A^\top A + I)^{-1}` where :math:`A^\top A` is
            nearly a convolution, or ``exact`` is set.
        """
        if self._overrides(*_FORMULA):
            return super().contractive_part(x, physics, *constants, exact=exact)
        metric: Callable[[Any], Any] | None = None
        if exact:
            metric = prox_of_zero(physics, cast(Tensor, x), self.data_weight)
        elif (response := self._response(x, physics)) is not None:
            inverse, unknown = CirculantInverse(response / self.stepsize.detach()), response.flatten(1)[:, 0].isnan()
            near, unknown = (
                prox_by_cg(physics, self.data_weight.detach(), inverse),
                unknown.reshape(-1, *[1] * (cast(Tensor, x).ndim - 1)),
            )
            metric = lambda r: torch.where(unknown, r, near(r))  # noqa: E731
        return self.denoise(cast(Tensor, x), *self.split(constants)[1]), metric

    def preconditioner(self, x: State, physics: Physics) -> Callable[[Any], Any] | None:
        r"""A circulant approximation of :math:`\frac{1}{\eta} (\lambda A^\top A + I)^{-1}`, where :math:`A^\top A` is nearly a convolution.

        It is :math:`(I - \partial F_\theta / \partial x)^{-1}` for a denoiser that removes everything, and an upper bound
        for one that keeps something.

        :param torch.Tensor x: a state, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :return: a linear, self-adjoint map of states, or ``None`` where :math:`A^\top A` is far from a convolution for
            all samples. Single samples of this kind stay as they are.
        """
        response = self._response(x, physics)
        return None if response is None else CirculantInverse(response)

    def _response(self, x: State, physics: Physics) -> Tensor | None:
        r"""Eigenvalues of :math:`\eta (\lambda A^\top A + I)`; NaN for samples without a circulant approximation."""
        eigenvalues = spectrum(physics, x) if isinstance(x, Tensor) else None
        return None if eigenvalues is None else (self.stepsize * (self.data_weight * eigenvalues + 1)).detach()

    def natural(self, x: State, physics: Physics) -> Callable[[Any], Any] | None:
        r"""The preconditioner, else division by :math:`\eta`, for each sample: applied to :meth:`step`, the result does not depend on
        :math:`\eta`.

        :param torch.Tensor x: a state, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :return: a linear map of states.
        """
        eta, response = self.stepsize.detach(), self._response(x, physics)
        if response is None:
            return lambda r: r / eta
        return CirculantInverse(torch.where(response.isnan(), eta, response))

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""A stepsize for which the linear part of the iteration does not diverge.

        :param float sqnorm: :math:`\|A\|^2`.
        :return: :math:`\eta`.
        """
        return 1.0 / (float(self.data_weight) * sqnorm + 1.0)
