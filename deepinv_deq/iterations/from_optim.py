r"""deepinv's optimisation algorithms as fixed-point templates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from deepinv.optim import FISTA, GD, MD, BaseOptim
from deepinv.optim.optim_iterators import OptimIterator
from deepinv.physics import Physics
from torch import Tensor, nn

from deepinv_deq.iterations.base import measurement
from deepinv_deq.iterations.splitting import MeasurementIteration
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

    :raises TypeError: if ``optim`` is no algorithm of deepinv.
    :raises ValueError: if its step changes from one iteration to the next (parameters given as lists, FISTA's momentum,
        subsets, backtracking), so that it has no fixed point, or if a name in ``trainable`` is unknown.

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
        unknown = [name for name in trainable if not isinstance(given.get(name), (int, float, Tensor))]
        if unknown:
            known = ", ".join(name for name, value in given.items() if isinstance(value, (int, float, Tensor)))
            raise ValueError(f"No scalar parameter {', '.join(unknown)}: {type(optim).__name__} has {known}.")
        # the prior is the learnable part; the stepsize that is used is among the parameters of the algorithm
        super().__init__(optim.prior[0], stepsize=float(torch.as_tensor(given.get("stepsize", 1.0)).detach()))
        self.data_fidelity = optim.data_fidelity[0]
        self.iterator = copy.copy(optim.fixed_point.iterator)
        self.iterator.has_cost = False  # nobody asks what an iterate costs
        self._name, self._init, self._output = type(optim).__name__, optim.init_iterate_fn, optim.get_output
        self._options = {k: v for k, v in given.items() if not isinstance(v, Tensor) and k not in trainable}
        self._tensors = nn.ParameterDict()
        for name, value in given.items():
            if name not in self._options:
                parameter = name in trainable or isinstance(value, nn.Parameter)
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                self._tensors[name] = nn.Parameter(tensor.detach().clone(), requires_grad=parameter)
        # most of deepinv's steps read the first variable only, and the others would be a second state for nothing
        self._single = type(self.iterator).forward is OptimIterator.forward or isinstance(optim, (GD, MD))

    def networks(self) -> tuple[nn.Module, ...]:
        r"""The network of the prior, if there is one.

        :return: tuple of modules.
        """
        network = getattr(self.denoiser, "denoiser", None)
        return (network,) if isinstance(network, nn.Module) else ()

    def init(self, y: Any, physics: Physics) -> State:
        r"""Where the algorithm starts: its ``custom_init``, or :math:`A^\top y`.

        :param torch.Tensor y: measurement.
        :param deepinv.physics.Physics physics: forward operator.
        :return: first image, or tuple of all variables, without gradient.
        """
        with torch.no_grad():
            start = self._init(y, physics)["est"]
        return start[0] if self._single else tuple(start)

    def forward(self, x: State, physics: Physics, *constants: Tensor) -> State:  # type: ignore[override]
        r"""One iteration of the algorithm.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: its variables.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor constants: the measurements.
        :return: variables of the same shapes.
        """
        y = measurement(constants, physics)
        parameters = self._options | dict(self._tensors.items())
        step = self.iterator({"est": as_tuple(x)}, self.data_fidelity, self.denoiser, parameters, y, physics)
        after = step["est"]
        return after[0] if self._single else tuple(after)

    def output(self, state: State) -> Tensor:
        r"""What the algorithm returns for a state.

        :param torch.Tensor, tuple[torch.Tensor, ...] state: its variables.
        :return: image of shape ``(B, C, H, W)``.
        """
        return self._output({"est": as_tuple(state)})

    def extra_repr(self) -> str:
        r"""The algorithm's name."""
        return self._name


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
