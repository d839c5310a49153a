r"""Fixed-point templates :math:`F_\theta(x; y)` for imaging inverse problems.

A new template is one subclass of :class:`FixedPointIteration` with one method, ``forward(x, physics, *constants)``. The
base class binds it to a measurement, computes what does not change during a solve once, and knows every tensor on which
the bound map depends, which is all that the solver and the hook need.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from deepinv.models import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepinv_deq.solvers import State


class FixedPointIteration(nn.Module):
    r"""Base class of the maps :math:`x \mapsto F_\theta(x; y)` whose fixed point is the reconstruction (eq. 4).

    A subclass implements ``forward(x, physics, *constants)``, a pure function of its arguments and of the module's
    parameters, and may override :meth:`constants` and :meth:`init`.

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

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        stepsize: float = 1.0,
        sigma: float | Tensor | None = None,
        learn_stepsize: bool = False,
        data_weight: float = 1.0,
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
        self._fits: set[tuple[Any, ...]] = set()
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
            return physics.fbp(y) if hasattr(physics, "fbp") else physics.A_adjoint(y)

    def bind(self, y: Tensor, physics: Physics) -> BoundIteration:
        r"""Fix the measurement: returns the map :math:`x \mapsto F_\theta(x; y)`.

        Constants and normalised weights (spectral norm, weight norm) are computed here, once.

        :param torch.Tensor y: measurement, of the shape ``physics.A`` returns.
        :param deepinv.physics.Physics physics: linear forward operator with an adjoint.
        :return: a map with the attribute ``inputs``, see :class:`deepinv_deq.implicit.DifferentiableMap`.
        :raises TypeError: if ``physics`` is not a linear operator.
        :raises ValueError: if the shape of ``y`` does not fit ``physics``.
        """
        if not isinstance(physics, LinearPhysics):
            raise TypeError(
                f"{type(self).__name__} needs a linear operator with an adjoint, which {type(physics).__name__} is not. "
                "Use a deepinv.physics.LinearPhysics, or override bind and constants for yours."
            )
        self._warn_if_stochastic()
        try:
            constants = self.constants(y, physics)
            self._check_fit(y, physics)
        except (RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"Measurements of shape {_shape(y)} do not fit {type(physics).__name__}: {error}. Check that y comes "
                "from this physics, at its image size, angles, coils or mask, and is on its device."
            ) from error
        return BoundIteration(self, physics, constants, y)

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
        return self.denoise(x - self.stepsize * self.data_gradient(x, physics, *constants))


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
        return x - self.stepsize * (self.data_gradient(x, physics, *constants) + x - self.denoise(x))

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""A stepsize for which the linear part of the iteration does not diverge.

        :param float sqnorm: :math:`\|A\|^2`.
        :return: :math:`\eta`.
        """
        return 1.0 / (float(self.data_weight) * sqnorm + 1.0)


class BoundIteration:
    r"""The map :math:`x \mapsto F_\theta(x; y)` of one measurement: what a solver iterates and a hook differentiates.

    It is made by :meth:`FixedPointIteration.bind`, and keeps the tensors that it found there: a later
    ``physics.update(...)``, which replaces them, does not change what :meth:`rebind` evaluates, and a change in place, as
    by an optimiser, is an error.

    :param FixedPointIteration iteration: the template.
    :param deepinv.physics.Physics physics: forward operator.
    :param tuple[torch.Tensor, ...] constants: what the template computes once per solve.
    :param torch.Tensor y: measurement.
    """

    def __init__(self, iteration: FixedPointIteration, physics: Physics, constants: tuple[Tensor, ...], y: Tensor):
        self._iteration, self._physics, self._constants, self._y = iteration, physics, constants, y
        self._weights = _normalised_weights(iteration, physics)
        self._graded = torch.is_grad_enabled()
        self._slots = _slots(iteration, physics)
        # all but the statistics that layers of the denoiser may keep: those are theirs to change
        guarded = [s.value for s in (*_slots(physics), *self._slots) if s.guarded]
        self._versions = [(t, t._version) for t in guarded if not t.is_inference()]

    def __call__(self, x: State) -> State:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: its image, of the same shape.
        """
        with _cached(self._weights):
            return self._iteration(x, self._physics, *self._constants)

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self._constants, *self._weights.values(), *(slot.value for slot in self._slots)]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        r"""Every tensor that requires a gradient and on which the map depends: constants, weights, physics parameters.

        :raises RuntimeError: if the map was bound under ``torch.no_grad()``, where what it precomputed lost its gradient.
        """
        inputs = tuple(t for t in self._tensors if t.requires_grad)
        if not self._graded and inputs:
            raise RuntimeError(
                "This map was bound under torch.no_grad(): bind it with gradients enabled to train through it."
            )
        return inputs

    def rebind(self, inputs: Sequence[Tensor]) -> Any:
        r"""The same map, of the physics as it was when it was bound, with other tensors in the place of ``inputs``.

        :param Sequence[torch.Tensor] inputs: one tensor for each of :attr:`inputs`.
        :return: a callable.
        :raises RuntimeError: if a tensor of the physics or a weight was changed in place since.
        """
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError(
                "A tensor of the physics or a weight was changed in place between forward and backward, so the gradient "
                "would be that of another map. Replace a tensor of the physics instead (physics.update(...) does), and "
                "step optimisers after backward."
            )
        given = iter(inputs)
        tensors = [next(given) if t.requires_grad else t for t in self._tensors]
        n, m = len(self._constants), len(self._weights)
        constants, weights = tensors[:n], dict(zip(self._weights, tensors[n : n + m], strict=True))

        def evaluate(x: State) -> State:
            with _installed(self._slots, tensors[n + m :]), _cached(weights):
                return self._iteration(x, self._physics, *constants)

        return evaluate

    def diagnose(self) -> str:
        r"""Why a solve of this map may have failed: compares the stepsize with the norm of the operator.

        :return: a sentence with the stepsize that would do, or an empty string.
        """
        eta = float(self._iteration.stepsize)
        try:
            # the power method draws its start: not from the generators that a resumed run must find as they were
            with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
                image = self._physics.A_adjoint(self._y)
                sqnorm = float(self._physics.compute_sqnorm(image, verbose=False))
        except Exception:  # whatever is wrong with this operator, the solve has something to say that matters more
            return ""
        safe = self._iteration.safe_stepsize(sqnorm)
        if eta < 2 * safe:
            return ""
        return (
            f"The stepsize {eta:.3g} diverges for this operator, whose squared norm is {sqnorm:.3g} "
            f"(physics.compute_sqnorm): use stepsize={safe:.2g}."
        )


# --------------------------------------------------------------------------------------------------------------------
# Where the tensors of modules live, so that a map can be evaluated with others in their place


class _Slot:
    r"""A place where a module keeps a tensor: a parameter, a buffer, or a plain attribute."""

    def __init__(self, store: dict[str, Any], name: str, guarded: bool):
        self.store, self.name, self.value, self.guarded = store, name, store[name], guarded

    def get(self) -> Tensor:
        return self.store[self.name]

    def set(self, value: Tensor) -> None:
        self.store[self.name] = value


def _modules(*roots: nn.Module) -> Iterator[nn.Module]:
    r"""Submodules, without those that only compute a parametrized weight: the weight itself is cached instead."""
    seen: set[int] = set()
    queue = [root for root in roots if isinstance(root, nn.Module)]
    while queue:
        module = queue.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        queue.extend(
            child for name, child in module._modules.items() if child is not None and name != "parametrizations"
        )


def _slots(*roots: nn.Module) -> list[_Slot]:
    return [
        _Slot(store, name, store is module._parameters or isinstance(module, (Physics, FixedPointIteration)))
        for module in _modules(*roots)
        for store in (module._parameters, module._buffers, module.__dict__)
        for name, value in store.items()
        if isinstance(value, Tensor)
    ]


@contextmanager
def _installed(slots: Sequence[_Slot], values: Sequence[Tensor]) -> Iterator[None]:
    previous = [slot.get() for slot in slots]
    try:
        for slot, value in zip(slots, values, strict=True):
            slot.set(value)
        yield
    finally:
        for slot, value in zip(slots, previous, strict=True):
            slot.set(value)


def _normalised_weights(*roots: nn.Module) -> dict[tuple[int, str], Tensor]:
    r"""All parametrized tensors, each computed once: in training mode, spectral norm changes with every access."""
    return {
        (id(module), name): getattr(module, name)
        for module in _modules(*roots)
        if parametrize.is_parametrized(module)
        for name in cast(nn.ModuleDict, module.parametrizations)
    }


@contextmanager
def _cached(weights: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    r"""Use these tensors as the values of parametrized weights, through PyTorch's own cache of them."""
    if not weights:
        yield
        return
    with parametrize.cached():
        outer = dict(parametrize._cache)
        parametrize._cache.update(weights)
        try:
            yield
        finally:
            parametrize._cache.clear()
            parametrize._cache.update(outer)


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
