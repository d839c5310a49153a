r"""deepinv's optimisation algorithms as fixed-point iterations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from deepinv.optim import FISTA, GD, L2, MD, BaseOptim
from deepinv.optim.optim_iterators import GDIteration, OptimIterator, PGDIteration
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn

from deepinv_deq.iterations.base import measurement
from deepinv_deq.iterations.noise import name_of_sigma
from deepinv_deq.iterations.prox import L2OfAnySize, prox_of_zero
from deepinv_deq.iterations.splitting import MeasurementIteration
from deepinv_deq.iterations.starts import start_of_non_linear
from deepinv_deq.states import State, as_tuple

_ALIASES = {"sigma_denoiser": "g_param", "lambda_reg": "lambda"}  # names of deepinv's constructors


class FromOptim(MeasurementIteration):
    r"""An algorithm of :mod:`deepinv.optim` as an iteration :math:`F`, whose fixed point is the reconstruction.

    The algorithm keeps its prior, data fidelity, parameters and start; what changes is how its fixed point is found and
    differentiated. Any data fidelity will do, and any physics that it can be used with. The network of a
    :class:`deepinv.optim.PnP` or :class:`deepinv.optim.RED` prior is trained.

    :param deepinv.optim.BaseOptim optim: the algorithm, such as ``deepinv.optim.PGD(...)``, ``HQS``, ``ADMM``, ``DRS``, ``GD`` or
        ``PDCP``. Its ``max_iter``, ``early_stop``, ``anderson_acceleration`` and ``DEQ`` have no effect.
    :param Sequence[str] trainable: names of scalar parameters of the algorithm to train, such as ``"stepsize"`` or
        ``"lambda"``, besides those that it trains already (``unfold=True``).

    A learned stepsize stays positive: it is the absolute value of the trained number.

    :raises TypeError: if ``optim`` is no algorithm of deepinv.
    :raises ValueError: if its denoiser needs a noise level and ``optim`` has none, or if a name in ``trainable`` is unknown. Also if
        its step changes from one iteration to the next, so that it has no fixed point: parameters given as lists, FISTA's momentum,
        subsets, backtracking.

    |sep|

    :Example:

    >>> import torch
    >>> import deepinv as dinv
    >>> from deepinv_deq import DEQReconstructor, FromOptim
    >>> pgd = dinv.optim.PGD(prior=dinv.optim.L1Prior(), data_fidelity=dinv.optim.L2(), stepsize=1.0, lambda_reg=0.1)
    >>> model = DEQReconstructor(FromOptim(pgd))
    >>> physics = dinv.physics.Denoising()
    >>> model(torch.rand(1, 1, 8, 8), physics).shape
    torch.Size([1, 1, 8, 8])
    """

    linear = False

    def __init__(self, optim: BaseOptim, *, trainable: Sequence[str] = ()):
        if not isinstance(optim, BaseOptim):
            raise TypeError(f"optim must be an algorithm of deepinv.optim, such as PGD, got {type(optim).__name__}.")
        _refuse_what_has_no_fixed_point(optim)
        given = {name: values[0] for name, values in optim.init_params_algo.items()}
        trainable = tuple(_ALIASES.get(name, name) for name in trainable)
        _refuse_unknown(optim, given, trainable)
        network = getattr(optim.prior[0], "denoiser", None)
        if isinstance(network, nn.Module):
            name_of_sigma(network, given.get("g_param"), "sigma_denoiser")
        stepsize = torch.as_tensor(given.get("stepsize", 1.0)).detach()
        if stepsize.numel() != 1:
            raise ValueError(f"FromOptim needs one stepsize for all pixels, got shape {tuple(stepsize.shape)}.")
        # the prior is the learnable part; the stepsize that is used is among the parameters of the algorithm
        super().__init__(optim.prior[0], stepsize=float(stepsize))
        fidelity = optim.data_fidelity[0]
        self.data_fidelity = L2OfAnySize(fidelity) if type(fidelity) is L2 else fidelity
        self.iterator = copy.copy(optim.fixed_point.iterator)
        self.iterator.has_cost = False  # the cost function is not used
        self._name, self._init, self._output = type(optim).__name__, optim.init_iterate_fn, optim.get_output
        self._options = {k: v for k, v in given.items() if not isinstance(v, Tensor) and k not in trainable}
        self._tensors = _as_parameters({k: v for k, v in given.items() if k not in self._options}, trainable)
        # most of deepinv's steps read the first variable only, and the others would be a second state for nothing
        self._single = type(self.iterator).forward is OptimIterator.forward or isinstance(optim, (GD, MD))

    def networks(self) -> tuple[nn.Module, ...]:
        r"""The network of the prior, if there is one.

        :return: tuple of modules.
        """
        return (network,) if isinstance(network := getattr(self.denoiser, "denoiser", None), nn.Module) else ()

    def numbers(self) -> dict[str, Any]:
        r"""The numbers of the algorithm, by deepinv's names.

        :return: numbers or tensors by name.
        """
        signed = self._options | dict(self._tensors.items())
        # the sign of a learned stepsize means nothing, as in other iterations
        numbers = {k: v.abs() if k.startswith("stepsize") and isinstance(v, Tensor) else v for k, v in signed.items()}
        return {k: v for k, v in numbers.items() if isinstance(v, (int, float, Tensor))}

    def init(self, y: Any, physics: Physics) -> State:
        r"""Where the algorithm starts: its ``custom_init``, else :math:`A^\top y`, or the physics' own ``A_dagger`` if it is not linear.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: first image, or tuple of all variables, without gradient.
        :raises TypeError: if there is none of these.
        """
        owner = getattr(self._init, "__self__", None)
        given = getattr(owner, "custom_init", None)
        with torch.no_grad():
            if given is None and not isinstance(physics, LinearPhysics):
                image = start_of_non_linear(y, physics)
                given = None if image is None else (image, image.clone())
            start = self._init(y, physics, init=given)["est"]
        return start[0] if self._single else tuple(start)

    def forward(self, x: State, physics: Physics, *constants: Tensor) -> State:  # type: ignore[override]
        r"""One iteration of the algorithm.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: its variables.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: the measurements.
        :return: variables of the same shapes.
        """
        y, parameters = measurement(constants, physics), _parameters(self)
        step = self.iterator({"est": as_tuple(x)}, self.data_fidelity, self.denoiser, parameters, y, physics)
        after = step["est"]
        return after[0] if self._single else tuple(after)

    def contractive_part(
        self, x: State, physics: Physics, *constants: Tensor, exact: bool = False
    ) -> tuple[State, Callable[[Any], Any] | None]:
        r"""The part that has to contract: :math:`x - \nabla g(x)` for gradient descent with ``deepinv.optim.L2`` and a linear
        physics, as for :class:`DEGrad`. For other algorithms it is the whole iteration.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: state.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: as in :meth:`forward`.
        :param bool exact: whether :math:`P` is to be exact.
        :return: image of the part, and :math:`P` or ``None``.
        """
        own = _part_of_descent(self, cast(Tensor, x), physics, exact)
        return own or super().contractive_part(x, physics, *constants, exact=exact)

    def natural(self, x: State, physics: Physics) -> Callable[[Any], Any] | None:
        r"""The division by stepsize and weight of the prior for gradient descent, else ``None``.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: state.
        :param deepinv.physics.Physics physics: forward operator.
        :return: a linear map of states, or ``None``; see :meth:`FixedPointIteration.natural`.
        """
        return _units_of_descent(self)

    def safe_stepsize(self, sqnorm: float) -> float:
        r"""A stepsize for which the linear part of the iteration does not diverge.

        :param float sqnorm: :math:`\|A\|^2`.
        :return: the stepsize; infinite for proximal maps of the data term, and for data fidelities other than ``deepinv.optim.L2``.
        """
        return _safe_stepsize(self, sqnorm)

    def output(self, state: State) -> Tensor:
        r"""What the algorithm returns for a state.

        :param torch.Tensor, tuple[torch.Tensor, ...] state: its variables.
        :return: image of shape ``(B, C, H, W)``.
        """
        return self._output({"est": as_tuple(state)})

    def extra_repr(self) -> str:
        r"""The algorithm's name."""
        return self._name


def _parameters(iteration: FromOptim) -> dict[str, Any]:
    r"""The parameters of a step of the algorithm."""
    parameters = iteration._options | iteration.numbers()
    if iteration.sigma is not None and iteration.networks():  # given for these measurements
        parameters["g_param"] = iteration.sigma
    return parameters


def _refuse_unknown(optim: BaseOptim, given: dict[str, Any], trainable: Sequence[str]) -> None:
    scalars = [name for name, value in given.items() if isinstance(value, (int, float, Tensor))]
    if unknown := [name for name in trainable if name not in scalars]:
        raise ValueError(f"No scalar parameter {', '.join(unknown)}: {type(optim).__name__} has {', '.join(scalars)}.")


def _as_parameters(given: dict[str, Any], trainable: Sequence[str]) -> nn.ParameterDict:
    tensors = nn.ParameterDict()
    for name, value in given.items():
        tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
        trained = name in trainable or isinstance(value, nn.Parameter)
        tensors[name] = nn.Parameter(tensor.detach().clone(), requires_grad=trained)
    return tensors


def _safe_stepsize(iteration: FromOptim, sqnorm: float) -> float:
    if not (
        type(iteration.iterator) in (GDIteration, PGDIteration) and isinstance(iteration.data_fidelity, L2OfAnySize)
    ):
        return math.inf
    return 1.0 / (float(iteration.data_fidelity.norm) * sqnorm + _weight_of_prior(iteration))


def _weight_of_prior(iteration: FromOptim) -> float:
    r"""The weight of the prior of gradient descent; 0 for other algorithms, and for one number per pixel."""
    weight = torch.as_tensor(iteration.numbers().get("lambda", 1.0)).detach()
    return float(weight) if type(iteration.iterator) is GDIteration and weight.numel() == 1 else 0.0


def _units_of_descent(iteration: FromOptim) -> Callable[[Any], Any] | None:
    if type(iteration.iterator) is not GDIteration:
        return None
    weight = _weight_of_prior(iteration)
    unit = float(iteration.numbers()["stepsize"]) * (weight if weight > 0 else 1.0)
    return lambda r: r / unit


def _part_of_descent(
    iteration: FromOptim, x: Tensor, physics: Physics, exact: bool
) -> tuple[State, Callable[[Any], Any] | None] | None:
    weight, fidelity = _weight_of_prior(iteration), iteration.data_fidelity
    if not (weight > 0 and isinstance(fidelity, L2OfAnySize) and isinstance(physics, LinearPhysics)):
        return None
    part = x - cast(Any, iteration.denoiser).grad(x, _parameters(iteration)["g_param"])
    return part, prox_of_zero(physics, x, float(fidelity.norm) / weight) if exact else None


def _refuse_what_has_no_fixed_point(optim: BaseOptim) -> None:
    name, what = type(optim).__name__, ""
    lists = [key for key, values in optim.init_params_algo.items() if len(values) > 1]
    if lists:
        what = f"its {', '.join(lists)} given as lists: give one value"
    elif len(optim.prior) > 1 or len(optim.data_fidelity) > 1:
        what = "several priors or data fidelities: give one of each"
    elif optim.backtracking:
        what = "backtracking: give a stepsize that needs none"
    elif isinstance(optim, FISTA):
        what = "a momentum that depends on the iteration: use PGD, which the solver accelerates"
    elif type(optim).forward is not BaseOptim.forward:
        what = "a loop of its own, over subsets or with normalisers"
    if what:
        raise ValueError(f"{name} does not repeat one and the same step, so it has no fixed point: it has {what}.")
