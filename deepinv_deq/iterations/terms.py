r"""The terms that iterations are made of: the denoiser, the data term, and what both need of the measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from deepinv.physics import Physics, StackedPhysics
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_deq.compat import STORES
from deepinv_deq.iterations.checks import positive
from deepinv_deq.iterations.denoising import Denoising
from deepinv_deq.iterations.prox import prox_l2
from deepinv_deq.iterations.separability import Verdicts
from deepinv_deq.states import Rows, State


class Terms(Denoising):
    r"""Denoiser, stepsize, noise level and data weight of an iteration, see
    :class:`FixedPointIteration <deepinv_deq.FixedPointIteration>` for the parameters."""

    stepsize: Tensor
    data_weight: Tensor
    per_channel = True  # whether the stepsize may be one number for each channel
    _private = False  # whether this is a replica inside a bound map

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        stepsize: float | Tensor = 1.0,
        sigma: float | Tensor | None = None,
        learn_stepsize: bool = False,
        data_weight: float = 1.0,
        context: bool = False,
    ):
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a torch.nn.Module, got {type(denoiser).__name__}.")
        super().__init__()
        eta = positive("stepsize", stepsize, "" if self.per_channel else type(self).__name__)
        weight = positive("data_weight", float(data_weight))
        if learn_stepsize:
            self.stepsize = nn.Parameter(eta)
        else:
            self.register_buffer("stepsize", eta)
        self.register_buffer("data_weight", weight)
        self._set_denoiser(denoiser, sigma, context)
        self._verdicts = Verdicts()
        self._warned_stochastic = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Terms:
        r"""Convert the denoiser and the numbers of the iteration, which stay real where a network becomes complex."""
        if recurse:
            for module in self.children():
                module._apply(fn)

        def real(t: Tensor) -> Tensor:
            out = fn(t)
            return out.real.contiguous() if out.is_complex() and not t.is_complex() else out

        return super()._apply(real, recurse=False)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # The stepsize is |parameter|. Bound maps always take abs; users see the parameter itself while it is positive.
        if name == "stepsize" and value is vars(self)[STORES[0]].get(name):
            traced = self._private or torch.compiler.is_compiling()
            value = value.abs() if traced or bool((value.detach() < 0).any()) else value
        return value

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
        r"""Starting point: ``physics.fbp`` where there is one, else :math:`A^\top y`.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: image of shape ``(B, C, H, W)``, without gradient.
        """
        return torch.no_grad()(linear_reconstruction)(y, physics)

    def output(self, state: State) -> Tensor:
        r"""The reconstruction in a state: the state itself, or the first of several variables.

        :param torch.Tensor, tuple[torch.Tensor, ...] state: a state, such as the fixed point.
        :return: image of shape ``(B, C, H, W)``.
        """
        return state if isinstance(state, Tensor) else state[0]

    def numbers(self) -> dict[str, Any]:
        r"""The numbers of the iteration: stepsize, data weight, and noise level (``"g_param"``, as deepinv calls it) if it has one.

        :return: numbers or tensors by name.
        """
        numbers = {"stepsize": self.stepsize, "data_weight": self.data_weight, "g_param": self.sigma}
        return {name: value for name, value in numbers.items() if value is not None}

    def split(self, constants: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        r"""What :meth:`forward` gets besides ``x`` and ``physics``: the constants, and the context of the denoiser.

        :param tuple[torch.Tensor, ...] constants: as :meth:`forward` got them.
        :return: what :meth:`constants` returned, and one or no image.
        """
        return (constants[:-1], constants[-1:]) if self.context else (constants, ())

    def data_gradient(self, x: Tensor, physics: Physics, aty: Tensor) -> Tensor:
        r""":math:`\nabla \ell_{MC}(x) = \lambda A^\top (A x - y)` (eq. 6), with :math:`A^\top y` given.

        :param torch.Tensor x: image of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor aty: :math:`A^\top y`, of the shape of ``x``.
        :return: gradient, of the shape of ``x``.
        """
        return self.data_weight * (physics.A_adjoint_A(x) - aty)

    def data_prox(self, z: Tensor, physics: Physics, *y: Tensor) -> Tensor:
        r""":math:`\operatorname{arg\,min}_x \frac{\eta \lambda}{2} \|A x - y\|^2 + \frac12 \|x - z\|^2`: closed where there is a formula,
        else by ``physics.solver`` until all samples have the accuracy ``physics.tol`` (1e-4). That limits the accuracy of the fixed point too.

        :param torch.Tensor z: image of shape ``(B, C, H, W)``.
        :param deepinv.physics.Physics physics: linear forward operator.
        :param torch.Tensor y: measurement.
        :return: image of the same shape.
        """
        return prox_l2(physics, z, y, gamma=(self.stepsize * self.data_weight).reshape(()))

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""A stepsize for which the linear part of the iteration does not diverge.

        :param float sqnorm: :math:`\|A\|^2`.
        :return: :math:`\eta`.
        """
        return 1.0 / (float(self.data_weight) * sqnorm)


def measurements(y: Any, physics: Any) -> Any:
    r"""Measurements as deepinv wants them: a list for a stacked physics becomes a :class:`deepinv.utils.TensorList`.

    :param torch.Tensor, Sequence[torch.Tensor] y: measurements.
    :param deepinv.physics.Physics physics: forward operator.
    :return: measurements.
    :raises TypeError: for a list with another physics, or if the measurements are no tensors.
    :raises ValueError: if a list has not one part for each part of the physics.
    """
    if not isinstance(y, (list, tuple)):
        if not isinstance(y, (Tensor, TensorList)):
            remedy = " Use torch.from_numpy(y)." if hasattr(y, "__array__") else ""
            raise TypeError(f"The measurements must be a tensor, got {type(y).__name__}.{remedy}")
        return y
    if not isinstance(physics, StackedPhysics):
        raise TypeError(
            f"The measurements of {type(physics).__name__} must be a tensor, got a {type(y).__name__} of {len(y)}: a list is for "
            "deepinv.physics.stack(...). Use torch.cat to make one batch of several tensors."
        )
    parts = len(cast(Any, physics).physics_list)
    if len(y) != parts or not all(isinstance(part, Tensor) for part in y):
        kinds = ", ".join(type(part).__name__ for part in y)
        raise ValueError(
            f"The stacked physics has {parts} parts, but the measurements are [{kinds}]: give one tensor each."
        )
    return TensorList(list(y))


def linear_reconstruction(y: Any, physics: Any) -> Tensor:
    r"""The fast linear reconstruction: filtered back-projection where there is one, else :math:`A^\top y`.

    :param torch.Tensor y: measurement.
    :param deepinv.physics.Physics physics: forward operator.
    :return: image of shape ``(B, C, H, W)``, differentiable in ``y``.
    """
    return physics.fbp(y) if hasattr(physics, "fbp") else physics.A_adjoint(y)


def all_constants(iteration: Any, y: Any, physics: Any) -> tuple[Tensor, ...]:
    r"""The constants of an iteration, and the context of its denoiser: :func:`linear_reconstruction`, differentiable in ``y``.

    :param FixedPointIteration iteration: the iteration.
    :param torch.Tensor y: measurement.
    :param deepinv.physics.Physics physics: forward operator.
    :return: tuple of tensors, handed to the iteration after ``x`` and ``physics``.
    :raises TypeError: if the constants are no tuple of tensors.
    """
    context = (linear_reconstruction(y, physics),) if iteration.context else ()
    own = iteration.constants(y, physics)
    own = tuple(own) if isinstance(own, Iterable) and not isinstance(own, Tensor) else own
    if not isinstance(own, tuple) or not all(isinstance(c, Tensor) for c in own):
        what = [type(c).__name__ for c in own] if isinstance(own, tuple) else type(own).__name__
        raise TypeError(f"{type(iteration).__name__}.constants(y, physics) must return a tuple of tensors, got {what}.")
    return (*own, *context)


def constants_of_rows(iteration: Any, constants: tuple[Tensor, ...], rows: Rows) -> tuple[Tensor, ...] | None:
    r"""What :func:`all_constants` returned, of some samples; ``None`` where it is not certain.

    :param FixedPointIteration iteration: the iteration.
    :param tuple[torch.Tensor, ...] constants: those of the batch.
    :param torch.Tensor, slice rows: which samples.
    :return: the constants.
    """
    own, context = iteration.split(constants)
    own = iteration.select_constants(own, rows)
    return None if own is None else (*own, *(c[rows] for c in context))
