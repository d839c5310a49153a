r"""Base class of the iterations :math:`F_\theta(x; y)` for imaging inverse problems.

A new iteration is one subclass of :class:`FixedPointIteration` with one method, ``forward(x, physics, *constants)``. The base class
binds the iteration to a measurement and computes what does not change during a solve once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from deepinv_deq.iterations.bound import BoundIteration
from deepinv_deq.iterations.capture import Capture
from deepinv_deq.iterations.checks import refuse_partial_gradients, refuse_zero, warn_if_unsuitable
from deepinv_deq.iterations.noise import noise_levels
from deepinv_deq.iterations.prox import measurement
from deepinv_deq.iterations.terms import Terms, linear_reconstruction, measurements
from deepinv_deq.states import State, minus, plus

__all__ = ["FixedPointIteration", "linear_reconstruction", "measurement"]

_DIFFERENCE = "_is_difference"  # attribute of a step that is F(x) - x


class FixedPointIteration(Terms):
    r"""Base class of iterations :math:`x \mapsto F_\theta(x; y)` whose fixed point is the reconstruction (eq. 4).

    A subclass implements ``forward(x, physics, *constants)``, a pure function of its arguments and of the module's
    parameters, and may override :meth:`constants`, :meth:`init` and :meth:`preconditioner`.

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module
        that maps images of shape ``(B, C, H, W)`` to the same shape.
    :param float, torch.Tensor stepsize: step :math:`\eta > 0` along the gradient of the data term: one number, or one per channel
        of shape ``(C, 1, 1)``, for signals ``(1, C, 1)``, for volumes ``(1, C, 1, 1, 1)``. The data step is :math:`x - \eta \lambda A^\top (A x - y)`. A stepsize
        :math:`\gamma` along :math:`\nabla \|Ax - y\|^2` (eq. 6) is :math:`\eta = 2 \gamma`.
    :param float, torch.Tensor, None sigma: noise level handed to denoisers that want one, in units of the image. A
        :class:`torch.nn.Parameter` is trained.
    :param bool learn_stepsize: whether :math:`\eta` is trained. It is the absolute value of the trained number, so it stays positive.
    :param float data_weight: weight :math:`\lambda > 0` of the data term, which is then
        :math:`\frac{\lambda}{2} \|Ax - y\|^2`; 1 is the paper's. It balances data and denoiser where the operator is
        normalised and the data are precise.
    :param bool context: whether the denoiser also gets the linear reconstruction (``physics.fbp`` where there is one, else
        :math:`A^\top y`, also if :meth:`init` is overridden), as ``context=``. An :class:`EquilibriumUNet` with ``context_channels``
        always gets it. Only the Jacobian over :math:`x` must contract. A network with context can therefore be more expressive.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.

    |sep|

    :Example:

    Your own iteration: proximal gradient with over-relaxation.

    >>> import torch
    >>> from deepinv.physics import Inpainting
    >>> from deepinv_deq import DEQReconstructor, DEProx
    >>> class Relaxed(DEProx):
    ...     def forward(self, x, physics, *constants):
    ...         return 1.5 * super().forward(x, physics, *constants) - 0.5 * x
    >>> physics = Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8))
    >>> model = DEQReconstructor(Relaxed(torch.nn.Identity()))
    >>> model(physics(torch.ones(1, 1, 8, 8)), physics).shape
    torch.Size([1, 1, 8, 8])
    """

    linear = True  # whether the physics must be linear
    _forward_of_step: Callable[..., Any]  # the forward that belongs to the step of this class

    def __init_subclass__(cls, **kwargs: Any) -> None:
        r"""Keep :meth:`forward` and :meth:`step` consistent where a subclass overrides only one of them."""
        super().__init_subclass__(**kwargs)
        _make_consistent(cls)

    def forward(self, x: Tensor, physics: Physics, *constants: Tensor) -> Tensor:
        r"""Evaluate :math:`F_\theta(x; y)`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: what :meth:`constants` returned for this measurement. With ``context`` the linear
            reconstruction comes last: ``own, context = self.split(constants)`` and ``self.denoise(x, *context)`` work for both.
        :return: image of the same shape as ``x``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(x, physics, *constants).")

    def step(self, x: Any, physics: Physics, *constants: Tensor) -> Any:
        r"""The residual :math:`F_\theta(x; y) - x`. Default: the difference.

        Override it where the difference cancels digits, as for small stepsizes. A subclass that overrides :meth:`forward` but
        not ``step`` gets this default, and one that overrides only ``step`` gets :math:`x +` ``step`` as its :meth:`forward`.
        An iteration with hooks is evaluated by this default, too, because hooks see and may change :meth:`forward` only. With small
        stepsizes a solve then takes more evaluations: put hooks on the denoiser.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: what :meth:`constants` returned for this measurement.
        :return: a state of the same shapes.
        """
        return minus(self.forward(x, physics, *constants), x)

    @property
    def has_own_step(self) -> bool:
        r"""Whether ``step`` has more digits than the difference :math:`F_\theta(x; y) - x`."""
        return not hasattr(type(self).step, _DIFFERENCE)

    def contractive_part(
        self, x: State, physics: Physics, *constants: Tensor, exact: bool = False
    ) -> tuple[State, Callable[[Any], Any] | None]:
        r"""The part of the iteration that has to contract, at ``x``, and the norm in which it has to.

        The fixed point is unique if :math:`\|P^{1/2} J P^{1/2}\| < 1` everywhere, where :math:`J` is the Jacobian of this part.
        Default: the whole iteration, in the Euclidean norm.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: as in :meth:`forward`.
        :param bool exact: whether :math:`P` is to be exact, which may take a linear solve, or a cheap approximation.
        :return: image of the part, and :math:`P` as a linear map of states, ``None`` for the identity.
        """
        return self(x, physics, *constants), None

    def preconditioner(self, x: State, physics: Physics) -> Callable[[Any], Any] | None:
        r"""An approximate inverse of :math:`I - \partial F_\theta / \partial x`, to speed up solves. Default: none.

        It changes neither fixed points nor gradients nor the residual that a solve reaches, only how many evaluations it
        takes.

        :param torch.Tensor x: a state, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :return: a linear, self-adjoint map of states, or ``None``.
        """
        return None

    def natural(self, x: State, physics: Physics) -> Callable[[Any], Any] | None:
        r"""A linear map that turns :meth:`step` into a change of the image whose size does not depend on the stepsize.

        Default: the preconditioner, if there is one.

        :param torch.Tensor x: a state, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :return: a linear map of states; ``None`` where steps are such changes already.
        """
        return self.preconditioner(x, physics)

    def bind(self, y: Any, physics: Physics, *, sigma: Any = None) -> BoundIteration:
        r"""Fix the measurement: returns the map :math:`x \mapsto F_\theta(x; y)`.

        Constants and normalised weights (spectral norm, weight norm) are computed here, once.

        :param torch.Tensor, list[torch.Tensor] y: measurement, of the shape ``physics.A`` returns; a list for a stacked physics.
        :param deepinv.physics.Physics physics: linear forward operator with an adjoint.
        :param float, torch.Tensor, None sigma: noise level for these measurements, instead of that of the iteration: one number,
            one per sample of shape ``(B,)``, or a map of shape ``(B, ...)``. Denoisers without a noise level do not get it.
        :return: a map with the attribute ``inputs``, see :class:`deepinv_deq.DifferentiableMap`.
        :raises TypeError: if ``physics`` is not a linear operator, or if the denoiser is a distributed one that has to be
            wrapped for training, see :class:`deepinv_deq.training.distributed.SynchronisedDenoiser`.
        :raises ValueError: if the shape of ``y`` does not fit ``physics``, or ``sigma`` not the batch.
        """
        y = measurements(y, physics)
        if self.linear and not isinstance(physics, LinearPhysics):
            raise TypeError(
                f"{type(self).__name__} needs a linear operator with an adjoint, which {type(physics).__name__} is not. "
                "Use a deepinv.physics.LinearPhysics, or deepinv_deq.FromOptim with an algorithm and a data fidelity for "
                "non-linear operators."
            )
        if self.training and not self._warned_stochastic:
            self._warned_stochastic = warn_if_unsuitable(self.denoiser)
        refuse_partial_gradients(self.denoiser)
        refuse_zero(self.numbers().get("stepsize"))
        capture = Capture(self, physics, y, noise_levels(sigma, y))
        return BoundIteration(capture, capture.first, capture.constants)


setattr(FixedPointIteration.step, _DIFFERENCE, True)
FixedPointIteration._forward_of_step = FixedPointIteration.forward


def _make_consistent(cls: type[FixedPointIteration]) -> None:
    order = {name: next(i for i, c in enumerate(cls.__mro__) if name in c.__dict__) for name in ("forward", "step")}
    if order["forward"] < order["step"]:
        cls.step = _step_of(cls)  # type: ignore[method-assign]
    elif order["step"] < order["forward"] and not hasattr(cls.step, _DIFFERENCE):
        cls.forward = _forward_of(cls)  # type: ignore[method-assign]
    if "forward" in cls.__dict__:
        cls._forward_of_step = cls.forward


# Each names the method of one class: with self.forward and self.step, a subclass that calls super().step would recurse for ever.
def _step_of(cls: type[FixedPointIteration]) -> Callable[..., Any]:
    def step(self: FixedPointIteration, x: Any, physics: Physics, *constants: Tensor) -> Any:
        return minus(cls.forward(self, x, physics, *constants), x)

    setattr(step, _DIFFERENCE, True)
    step.__doc__ = FixedPointIteration.step.__doc__
    return step


def _forward_of(cls: type[FixedPointIteration]) -> Callable[..., Any]:
    def forward(self: FixedPointIteration, x: Any, physics: Physics, *constants: Tensor) -> Any:
        return plus(x, cls.step(self, x, physics, *constants))

    forward.__doc__ = FixedPointIteration.forward.__doc__
    return forward
