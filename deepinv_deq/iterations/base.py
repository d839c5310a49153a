r"""Base class of the iterations :math:`F_\theta(x; y)` for imaging inverse problems.

A new iteration is one subclass of :class:`FixedPointIteration` with one method, ``forward(x, physics, *constants)``. The base class
binds the iteration to a measurement and computes what does not change during a solve once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import LinearPhysics, Physics, StackedPhysics
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_deq._states import Rows, State, as_tuple
from deepinv_deq.iterations.bound import BoundIteration
from deepinv_deq.iterations.checks import positive, refuse_partial_gradients, takes_sigma, warn_if_unsuitable
from deepinv_deq.iterations.separability import Verdicts


class FixedPointIteration(nn.Module):
    r"""Base class of the maps :math:`x \mapsto F_\theta(x; y)` whose fixed point is the reconstruction (eq. 4).

    A subclass implements ``forward(x, physics, *constants)``, a pure function of its arguments and of the module's
    parameters, and may override :meth:`constants`, :meth:`init` and :meth:`preconditioner`.

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module
        that maps images of shape ``(B, C, H, W)`` to the same shape.
    :param float, torch.Tensor stepsize: step :math:`\eta > 0` along the gradient of the data term: one number, or one per channel
        of shape ``(C, 1, 1)``. The factor 2 of :math:`\nabla \|Ax - y\|^2` is in it (eq. 6).
    :param float, torch.Tensor, None sigma: noise level handed to denoisers that want one, in units of the image. A
        :class:`torch.nn.Parameter` is trained.
    :param bool learn_stepsize: whether :math:`\eta` is trained.
    :param float data_weight: weight :math:`\lambda > 0` of the data term, which is then
        :math:`\frac{\lambda}{2} \|Ax - y\|^2`; 1 is the paper's. It balances data and denoiser where the operator is
        normalised and the data are precise.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.

    |sep|

    :Example:

    Your own template: proximal gradient with over-relaxation.

    >>> import torch
    >>> from deepinv.physics import Inpainting
    >>> from deepinv_deq import DEQReconstructor, DEProx
    >>> class Relaxed(DEProx):
    ...     def forward(self, x, physics, aty):
    ...         return 1.5 * super().forward(x, physics, aty) - 0.5 * x
    >>> physics = Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8))
    >>> model = DEQReconstructor(Relaxed(torch.nn.Identity()))
    >>> model(physics(torch.ones(1, 1, 8, 8)), physics).shape
    torch.Size([1, 1, 8, 8])
    """

    stepsize: Tensor
    data_weight: Tensor
    linear = True  # whether the physics must be linear
    per_channel = True  # whether the stepsize may be one number for each channel

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        stepsize: float | Tensor = 1.0,
        sigma: float | Tensor | None = None,
        learn_stepsize: bool = False,
        data_weight: float = 1.0,
    ):
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a torch.nn.Module, got {type(denoiser).__name__}.")
        eta = positive("stepsize", stepsize)
        if eta.numel() > 1 and not self.per_channel:
            raise ValueError(
                f"{type(self).__name__} needs one stepsize for all channels, got shape {tuple(eta.shape)}."
            )
        weight = positive("data_weight", float(data_weight))
        self.denoiser = denoiser
        if learn_stepsize:
            self.stepsize = nn.Parameter(eta)
        else:
            self.register_buffer("stepsize", eta)
        self.register_buffer("data_weight", weight)
        if isinstance(sigma, Tensor) and not isinstance(sigma, nn.Parameter):
            self.register_buffer("sigma", sigma)
        else:
            self.sigma = sigma
        self._takes_sigma = takes_sigma(denoiser, sigma)
        self._verdicts = Verdicts()
        self._warned_stochastic = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        r"""Keep :meth:`forward` and :meth:`step` consistent where a subclass overrides only one of them."""
        super().__init_subclass__(**kwargs)
        order = {name: next(i for i, c in enumerate(cls.__mro__) if name in c.__dict__) for name in ("forward", "step")}
        if order["forward"] < order["step"]:
            cls.step = FixedPointIteration.step  # type: ignore[method-assign]
        elif order["step"] < order["forward"] and cls.step is not FixedPointIteration.step:
            cls.forward = FixedPointIteration._forward_by_step  # type: ignore[method-assign]

    def _forward_by_step(self, x: Any, physics: Physics, *constants: Tensor) -> Any:
        return plus(x, self.step(x, physics, *constants))

    def forward(self, x: Tensor, physics: Physics, *constants: Tensor) -> Tensor:
        r"""Evaluate :math:`F_\theta(x; y)`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: what :meth:`constants` returned for this measurement.
        :return: image of the same shape as ``x``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(x, physics, *constants).")

    def step(self, x: Any, physics: Physics, *constants: Tensor) -> Any:
        r"""The residual :math:`F_\theta(x; y) - x`. Default: the difference.

        Override it where the difference cancels digits, as for small stepsizes. A subclass that overrides :meth:`forward` but
        not ``step`` gets this default, and one that overrides only ``step`` gets :math:`x +` ``step`` as its :meth:`forward`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: what :meth:`constants` returned for this measurement.
        :return: a state of the same shapes.
        """
        return minus(self.forward(x, physics, *constants), x)

    def constants(self, y: Tensor, physics: Physics) -> tuple[Tensor, ...]:
        r"""What depends on the measurement alone, computed once per solve. Default: :math:`(A^\top y,)`.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: tuple of tensors, handed to :meth:`forward` after ``x`` and ``physics``.
        """
        return (physics.A_adjoint(y),)

    def select_constants(self, constants: tuple[Tensor, ...], rows: Rows) -> tuple[Tensor, ...] | None:
        r"""The constants of some samples. Default: their rows, if :meth:`constants` is that of this package.

        Override it, together with :meth:`constants`, so that solvers may evaluate some samples of a batch only.

        :param tuple[torch.Tensor, ...] constants: what :meth:`constants` returned for the batch.
        :param torch.Tensor, slice rows: which samples.
        :return: the constants; ``None`` where it is not certain which part of them belongs to which sample.
        """
        known = type(self).constants.__module__.startswith("deepinv_deq.") and "constants" not in self.__dict__
        return tuple(c[rows] for c in constants) if known else None

    def init(self, y: Tensor, physics: Physics) -> State:
        r"""Starting point: the fast linear reconstruction, ``physics.fbp`` where there is one, else :math:`A^\top y`.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: image of shape ``(B, C, H, W)``, without gradient.
        """
        with torch.no_grad():
            return physics.fbp(y) if hasattr(physics, "fbp") else physics.A_adjoint(y)

    def output(self, state: State) -> Tensor:
        r"""The reconstruction in a state: the state itself, or the first of several variables.

        :param torch.Tensor, tuple[torch.Tensor, ...] state: a state, such as the fixed point.
        :return: image of shape ``(B, C, H, W)``.
        """
        return state if isinstance(state, Tensor) else state[0]

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

    def networks(self) -> tuple[nn.Module, ...]:
        r"""The modules that may write to their input in place, as networks that begin with ``ReLU(inplace=True)`` do.

        :return: tuple of modules; a bound map gives them copies where necessary. Default: the denoiser.
        """
        return (self.denoiser,)

    def bind(self, y: Tensor, physics: Physics) -> BoundIteration:
        r"""Fix the measurement: returns the map :math:`x \mapsto F_\theta(x; y)`.

        Constants and normalised weights (spectral norm, weight norm) are computed here, once.

        :param torch.Tensor y: measurement, of the shape ``physics.A`` returns.
        :param deepinv.physics.Physics physics: linear forward operator with an adjoint.
        :return: a map with the attribute ``inputs``, see :class:`deepinv_deq.DifferentiableMap`.
        :raises TypeError: if ``physics`` is not a linear operator, or if the denoiser is a distributed one that has to be
            wrapped for training, see :class:`deepinv_deq.distributed.SynchronisedDenoiser`.
        :raises ValueError: if the shape of ``y`` does not fit ``physics``.
        """
        if self.linear and not isinstance(physics, LinearPhysics):
            raise TypeError(
                f"{type(self).__name__} needs a linear operator with an adjoint, which {type(physics).__name__} is not. "
                "Use a deepinv.physics.LinearPhysics, or deepinv_deq.FromOptim with an algorithm and a data fidelity for "
                "non-linear operators."
            )
        if self.training and not self._warned_stochastic:
            self._warned_stochastic = warn_if_unsuitable(self.denoiser)
        refuse_partial_gradients(self.denoiser)
        self._refuse_bad_stepsize()
        return BoundIteration(self, physics, y)

    def denoise(self, x: Tensor) -> Tensor:
        r"""Apply :math:`D_\theta`, with the noise level if it wants one.

        :param torch.Tensor x: image of shape ``(B, C, H, W)``.
        :return: image of the same shape.
        """
        return self.denoiser(x, sigma=self.sigma) if self._takes_sigma else self.denoiser(x)

    def data_gradient(self, x: Tensor, physics: Physics, aty: Tensor) -> Tensor:
        r""":math:`\nabla \ell_{MC}(x) = \lambda A^\top (A x - y)` (eq. 6), with :math:`A^\top y` given.

        :param torch.Tensor x: image of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor aty: :math:`A^\top y`, of the shape of ``x``.
        :return: gradient, of the shape of ``x``.
        """
        return self.data_weight * (physics.A_adjoint_A(x) - aty)

    def data_prox(self, z: Tensor, physics: Physics, *y: Tensor) -> Tensor:
        r""":math:`\operatorname{arg\,min}_x \frac{\eta \lambda}{2} \|A x - y\|^2 + \frac12 \|x - z\|^2`, by the physics' own
        ``prox_l2``: closed where there is a formula, else conjugate gradients to the accuracy of ``physics.tol``, which
        bounds the residual that a solve can reach.

        :param torch.Tensor z: image of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor y: measurement.
        :return: image of the same shape.
        """
        gamma = (self.stepsize * self.data_weight).reshape(())
        return physics.prox_l2(z, measurement(y, physics), gamma=gamma)

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""A stepsize for which the linear part of the iteration does not diverge.

        :param float sqnorm: :math:`\|A\|^2`.
        :return: :math:`\eta`.
        """
        return 1.0 / (float(self.data_weight) * sqnorm)

    def _refuse_bad_stepsize(self) -> None:
        # training may have moved it; NaN is left to the solver, which reports it
        if isinstance(self.stepsize, nn.Parameter) and bool((self.stepsize.detach() <= 0).any()):
            raise ValueError(
                f"The learned stepsize has become {self.stepsize.detach().tolist()}, and must stay positive. Give it a smaller "
                "learning rate, or clamp it after every optimiser step: iteration.stepsize.data.clamp_(min=1e-4)."
            )


def plus(a: State, b: State) -> State:
    r"""Sum of two states."""
    if isinstance(a, Tensor):
        return a + as_tuple(b)[0]
    return tuple(s + t for s, t in zip(a, as_tuple(b), strict=True))


def minus(a: State, b: State) -> State:
    r"""Difference of two states."""
    if isinstance(a, Tensor):
        return a - as_tuple(b)[0]
    return tuple(s - t for s, t in zip(a, as_tuple(b), strict=True))


def measurement(constants: tuple[Tensor, ...], physics: Physics) -> Any:
    r"""Measurements that :func:`as_tuple` took apart."""
    return TensorList(list(constants)) if isinstance(physics, StackedPhysics) else constants[0]
