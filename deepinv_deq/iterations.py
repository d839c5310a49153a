r"""Fixed-point templates :math:`F_\theta(x; y)` for imaging inverse problems.

A new template is one subclass of :class:`FixedPointIteration` with one method, ``forward(x, physics, *constants)``. The
base class binds it to a measurement, computes what does not change during a solve once, and knows every tensor on which
the bound map depends, which is all that the solver and the hook need.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from deepinv.distributed.framework import DistributedProcessing
from deepinv.models import Denoiser
from deepinv.physics import LinearPhysics, Physics, StackedPhysics
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_deq._binding import BoundIteration
from deepinv_deq._precondition import inverse_filter, spectrum
from deepinv_deq.states import State, as_tuple


class FixedPointIteration(nn.Module):
    r"""Base class of the maps :math:`x \mapsto F_\theta(x; y)` whose fixed point is the reconstruction (eq. 4).

    A subclass implements ``forward(x, physics, *constants)``, a pure function of its arguments and of the module's
    parameters, and may override :meth:`constants`, :meth:`init` and :meth:`preconditioner`.

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module
        that maps images of shape ``(B, C, H, W)`` to the same shape.
    :param float stepsize: step :math:`\eta > 0` along the gradient of the data term. The factor 2 of
        :math:`\nabla \|Ax - y\|^2` is in it (eq. 6).
    :param float, torch.Tensor, None sigma: noise level handed to denoisers that want one, in units of the image. A
        :class:`torch.nn.Parameter` is trained.
    :param bool learn_stepsize: whether :math:`\eta` is trained.
    :param float data_weight: weight :math:`\lambda > 0` of the data term, which is then
        :math:`\frac{\lambda}{2} \|Ax - y\|^2`; 1 is the paper's. It balances data and denoiser where the operator is
        normalised and the data are precise.
    :param bool context: whether the denoiser also gets the linear reconstruction (:meth:`init`), as ``context=``. An
        :class:`EquilibriumUNet` with ``context_channels`` always gets it. The Jacobian over :math:`x` must be a contraction, that
        over the context need not: such a network reconstructs more at the same contraction.

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

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        stepsize: float = 1.0,
        sigma: float | Tensor | None = None,
        learn_stepsize: bool = False,
        data_weight: float = 1.0,
        context: bool = False,
    ):
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a torch.nn.Module, got {type(denoiser).__name__}.")
        if not stepsize > 0:
            raise ValueError(f"stepsize must be positive, got {stepsize}.")
        if not data_weight > 0:
            raise ValueError(f"data_weight must be positive, got {data_weight}.")
        self.denoiser = denoiser
        eta = torch.tensor(float(stepsize))
        if learn_stepsize:
            self.stepsize = nn.Parameter(eta)
        else:
            self.register_buffer("stepsize", eta)
        self.register_buffer("data_weight", torch.tensor(float(data_weight)))
        if isinstance(sigma, Tensor) and not isinstance(sigma, nn.Parameter):
            self.register_buffer("sigma", sigma)
        else:
            self.sigma = sigma
        self._takes_sigma = _takes_sigma(denoiser, sigma)
        self.context = context or getattr(denoiser, "context_channels", 0) > 0
        self._fits: set[tuple[Any, ...]] = set()
        self._separable: dict[tuple[Any, ...], bool | None] = {}
        self._warned_stochastic = False

    def forward(self, x: Tensor, physics: Physics, *constants: Tensor) -> Tensor:
        r"""Evaluate :math:`F_\theta(x; y)`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: what :meth:`constants` returned for this measurement.
        :return: image of the same shape as ``x``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(x, physics, *constants).")

    def constants(self, y: Tensor, physics: Physics) -> tuple[Tensor, ...]:
        r"""What depends on the measurement alone, computed once per solve. Default: :math:`(A^\top y,)`.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: tuple of tensors, handed to :meth:`forward` after ``x`` and ``physics``.
        """
        return (physics.A_adjoint(y),)

    def init(self, y: Tensor, physics: Physics) -> State:
        r"""Starting point: the fast linear reconstruction, ``physics.fbp`` where there is one, else :math:`A^\top y`.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: image of shape ``(B, C, H, W)``, without gradient.
        """
        with torch.no_grad():
            return linear_reconstruction(y, physics)

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
                "Use a deepinv.physics.LinearPhysics, or override bind and constants for yours."
            )
        self._warn_if_stochastic()
        self._refuse_partial_gradients()
        try:
            constants = self.constants(y, physics)
            if self.context:  # differentiable in y, unlike init
                constants = (*constants, linear_reconstruction(y, physics))
            if isinstance(physics, LinearPhysics):
                self._check_fit(y, physics)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError, but the measurements are not to blame
            raise
        except (RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"Measurements of shape {_shape(y)} do not fit {type(physics).__name__}: {error}. Check that y comes "
                "from this physics, at its image size, angles, coils or mask, and is on its device."
            ) from error
        return BoundIteration(self, physics, constants, y)

    def denoise(self, x: Tensor, *context: Tensor) -> Tensor:
        r"""Apply :math:`D_\theta`, with the noise level and the context if it takes them.

        :param torch.Tensor x: image of shape ``(B, C, H, W)``.
        :param torch.Tensor context: the linear reconstruction, where ``context`` is set.
        :return: image of the same shape.
        """
        options: dict[str, Any] = {"sigma": self.sigma} if self._takes_sigma else {}
        if context:
            options["context"] = context[0]
        return self.denoiser(x, **options)

    def split(self, constants: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        r"""What :meth:`forward` gets besides ``x`` and ``physics``: the constants, and the context of the denoiser.

        :param tuple[torch.Tensor, ...] constants: as :meth:`forward` got them.
        :return: what :meth:`constants` returned, and one or no image.
        """
        return (constants[:-1], constants[-1:]) if self.context else (constants, ())

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
        return physics.prox_l2(z, measurement(y, physics), gamma=self.stepsize * self.data_weight)

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""A stepsize for which the linear part of the iteration does not diverge.

        :param float sqnorm: :math:`\|A\|^2`.
        :return: :math:`\eta`.
        """
        return 1.0 / (float(self.data_weight) * sqnorm)

    def _check_fit(self, y: Any, physics: Physics) -> None:
        key = (id(physics), _shape(y))
        if key in self._fits:
            return
        with torch.no_grad():  # one evaluation of A, once per shape: some operators broadcast a wrong y in silence
            image = physics.A_adjoint(y)
            expected = _shape(physics.A(image))
        if expected != _shape(y):
            raise RuntimeError(f"A maps images of shape {_shape(image)} to measurements of shape {expected}")
        if len(self._fits) >= 64:  # physics that are made anew for every batch must not pile up here
            self._fits.clear()
        self._fits.add(key)

    def _refuse_partial_gradients(self) -> None:
        tiles = self.denoiser
        if torch.is_grad_enabled() and isinstance(tiles, DistributedProcessing) and tiles.ctx.world_size > 1:
            raise TypeError(
                "The gradients of a distributed denoiser are each process' own part. To train, wrap it in "
                "deepinv_deq.distributed.SynchronisedDenoiser; to reconstruct, use torch.no_grad()."
            )

    def _warn_if_stochastic(self) -> None:
        if self._warned_stochastic or not self.training:
            return
        for name, module in self.denoiser.named_modules():
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
            dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
            if batch_norm or dropout:
                effect = "couples the samples of a batch" if batch_norm else "changes from one evaluation to the next"
                warnings.warn(
                    f"{type(module).__name__} '{name}' of the denoiser is in training mode and {effect}, so the fixed "
                    "point is not well defined. Use group norm (EquilibriumUNet) or put the layer in eval mode.",
                    stacklevel=4,
                )
                self._warned_stochastic = True
                return


class DEProx(FixedPointIteration):
    r"""DE-Prox: proximal gradient descent with a learned proximal map (eq. 5-6, :footcite:t:`gilton2021deep`).

    .. math::

        F_\theta(x; y) = D_\theta(x - \eta A^\top (A x - y))

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: step :math:`\eta > 0`; the gradient step does not diverge for
        :math:`\eta < 2 / (\lambda \|A\|^2)`.
    :param float, torch.Tensor, None sigma: noise level handed to denoisers that want one, in units of the image.
    :param bool learn_stepsize: whether :math:`\eta` is trained.
    :param float data_weight: weight :math:`\lambda > 0` of the data term, which is then
        :math:`\frac{\lambda}{2} \|Ax - y\|^2`; 1 is the paper's. It balances data and denoiser where the operator is
        normalised and the data are precise.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.
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

        F_\theta(x; y) = x - \eta A^\top (A x - y) - \eta (x - D_\theta(x))

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: step :math:`\eta > 0`; for a firmly non-expansive residual :math:`x - D_\theta(x)` the iteration
        does not diverge for :math:`\eta < 2 / (\lambda \|A\|^2 + 1)`.
    :param float, torch.Tensor, None sigma: noise level handed to denoisers that want one, in units of the image.
    :param bool learn_stepsize: whether :math:`\eta` is trained.
    :param float data_weight: weight :math:`\lambda > 0` of the data term, which is then
        :math:`\frac{\lambda}{2} \|Ax - y\|^2`; 1 is the paper's. It balances data and denoiser where the operator is
        normalised and the data are precise.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.
    """

    def forward(self, x: Tensor, physics: Physics, *constants: Tensor) -> Tensor:
        r"""Evaluate :math:`F_\theta(x; y)`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor constants: :math:`A^\top y`.
        :return: image of the same shape as ``x``.
        """
        (aty,), context = self.split(constants)
        return x - self.stepsize * (self.data_gradient(x, physics, aty) + x - self.denoise(x, *context))

    def contractive_part(
        self, x: State, physics: Physics, *constants: Tensor, exact: bool = False
    ) -> tuple[State, Callable[[Any], Any] | None]:
        r"""The denoiser, whose Jacobian has to stay below :math:`\lambda A^\top A + I`.

        :param torch.Tensor x: point, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: as in :meth:`forward`.
        :param bool exact: whether :math:`P` is exact, by ``physics.prox_l2``, or a filter.
        :return: the denoised image, and :math:`P \approx (\lambda A^\top A + I)^{-1}` where the physics is nearly a filter.
        """
        metric: Callable[[Any], Any] | None = None
        if exact:
            with torch.no_grad():
                y = torch.zeros_like(physics.A(x))
            metric = torch.no_grad()(lambda r: cast(Any, physics).prox_l2(r, y, gamma=self.data_weight))
        elif (inverse := self.preconditioner(x, physics)) is not None:
            eta = self.stepsize.detach()
            metric = lambda r: eta * inverse(r)  # noqa: E731
        return self.denoise(cast(Tensor, x), *self.split(constants)[1]), metric

    def preconditioner(self, x: State, physics: Physics) -> Callable[[Any], Any] | None:
        r"""A filter near to :math:`\frac{1}{\eta} (\lambda A^\top A + I)^{-1}`, where the physics is nearly a filter.

        It is :math:`(I - \partial F_\theta / \partial x)^{-1}` for a denoiser that removes everything, and an upper bound
        for one that keeps something.

        :param torch.Tensor x: a state, of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: forward operator.
        :return: a linear, self-adjoint map of states, or ``None`` where :math:`A^\top A` is far from any filter.
        """
        eigenvalues = spectrum(physics, x) if isinstance(x, Tensor) else None
        if eigenvalues is None:
            return None
        response = self.stepsize * (self.data_weight * eigenvalues + 1)
        return inverse_filter(torch.where(response.isnan(), self.stepsize, response).detach())

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""A stepsize for which the linear part of the iteration does not diverge.

        :param float sqnorm: :math:`\|A\|^2`.
        :return: :math:`\eta`.
        """
        return 1.0 / (float(self.data_weight) * sqnorm + 1.0)


class _MeasurementIteration(FixedPointIteration):
    r"""Templates whose steps need the measurements themselves, and not only :math:`A^\top y`."""

    def constants(self, y: Any, physics: Physics) -> tuple[Tensor, ...]:
        r"""The measurements.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: tuple of tensors.
        """
        return as_tuple(y)


class DEHQS(_MeasurementIteration):
    r"""DE-HQS: half-quadratic splitting with a learned proximal map.

    .. math::

        F_\theta(x; y) = D_\theta(\operatorname{prox}_{\eta \lambda f}(x)), \qquad f(x) = \tfrac12 \|A x - y\|^2

    The proximal map of the data term converges for any step, where a gradient step would need :math:`\eta < 2/\|A\|^2`.

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: :math:`\eta > 0`.
    :param float, torch.Tensor, None sigma: noise level handed to denoisers that want one, in units of the image.
    :param bool learn_stepsize: whether :math:`\eta` is trained.
    :param float data_weight: weight :math:`\lambda > 0` of the data term.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.
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


class DEADMM(_MeasurementIteration):
    r"""DE-ADMM: the alternating direction method of multipliers with a learned proximal map.

    The state is a pair: the image and the scaled multiplier.

    .. math::

        z = \operatorname{prox}_{\eta \lambda f}(x - u), \qquad
        F_\theta(x, u; y) = \big(x^+, \; u + z - x^+\big), \qquad x^+ = D_\theta(z + u)

    :param torch.nn.Module denoiser: learnable module :math:`D_\theta`, any :class:`deepinv.models.Denoiser` or module.
    :param float stepsize: :math:`\eta > 0`.
    :param float, torch.Tensor, None sigma: noise level handed to denoisers that want one, in units of the image.
    :param bool learn_stepsize: whether :math:`\eta` is trained.
    :param float data_weight: weight :math:`\lambda > 0` of the data term, :math:`f(x) = \frac12 \|A x - y\|^2`.

    :raises TypeError: if ``denoiser`` is not a module.
    :raises ValueError: if ``stepsize`` or ``data_weight`` is not positive, or the denoiser needs a noise level and gets none.
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


def linear_reconstruction(y: Any, physics: Any) -> Tensor:
    r"""The fast linear reconstruction: filtered back-projection where there is one, else :math:`A^\top y`.

    :param torch.Tensor y: measurement.
    :param deepinv.physics.Physics physics: forward operator.
    :return: image of shape ``(B, C, H, W)``, differentiable in ``y``.
    """
    return physics.fbp(y) if hasattr(physics, "fbp") else physics.A_adjoint(y)


def measurement(constants: tuple[Tensor, ...], physics: Physics) -> Any:
    r"""Measurements that :func:`as_tuple` took apart."""
    return TensorList(list(constants)) if isinstance(physics, StackedPhysics) else constants[0]


def _shape(y: Any) -> Any:
    shape = y.shape
    return tuple(shape) if isinstance(shape, torch.Size) else tuple(tuple(s) for s in shape)


def _takes_sigma(denoiser: nn.Module, sigma: Any) -> bool:
    parameters = inspect.signature(denoiser.forward).parameters
    takes = "sigma" in parameters or isinstance(denoiser, Denoiser)
    required = takes and "sigma" in parameters and parameters["sigma"].default is inspect.Parameter.empty
    if required and sigma is None:
        raise ValueError(f"{type(denoiser).__name__} needs a noise level: pass sigma=, in units of the image.")
    return takes and sigma is not None
