r"""The entry of implicit differentiation: a fixed point with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepinv_deq import compat
from deepinv_deq.implicit.adjoint import Adjoint, as_state
from deepinv_deq.implicit.context import outside_of_inference_mode
from deepinv_deq.implicit.forward_mode import Tangent, attach, refuse_reverse, without_tangents
from deepinv_deq.implicit.functions import BareAdjoint, FixedPoint
from deepinv_deq.implicit.graphs import Tensors
from deepinv_deq.implicit.unchanged import Reached
from deepinv_deq.maps import Map, as_map
from deepinv_deq.solvers import Solver, SolverStat
from deepinv_deq.states import as_tuple

_MODES = ("implicit", "jfb")
#: A function that is called after every solve, as ``on_solve(which, stat)``.
OnSolve = Callable[[str, SolverStat], Any]


@runtime_checkable
class DifferentiableMap(Protocol):
    r"""A map that lists the tensors it depends on, so that its fixed point can be differentiated with a single graph."""

    @property
    def inputs(self) -> Tensors:
        r"""Every tensor that requires a gradient and on which the map depends, besides its argument."""

    def __call__(self, x: Any) -> Any:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: its image, of the same shape.
        """

    def rebind(self, inputs: Sequence[Tensor]) -> Callable[[Any], Any]:
        r"""The same map with other tensors in the place of :attr:`inputs`.

        :param Sequence[torch.Tensor] inputs: one tensor for each of :attr:`inputs`.
        :return: a callable.
        """


class ModularIDHook:
    r"""Attach the implicit gradient to a fixed point: ``x_hat = hook(f, x_star)`` (Proposition 1, Fig. 2).

    The result has the value of ``x_star`` and the gradient of the fixed point with respect to everything ``f`` depends
    on: parameters, measurements, physics. It may be used in any loss, any number of times; every pass is independent.
    The gradient has gradients of its own (``create_graph=True``), of any order: the adjoint equation is a fixed point, too.
    In forward mode (:mod:`torch.autograd.forward_ad`, :func:`torch.func.jvp`, :func:`torch.func.jacfwd`) the result has the
    tangent of the fixed point, of first order.

    ``f`` may be any callable. If it is a :class:`DifferentiableMap`, as the maps of
    :meth:`FixedPointIteration.bind <deepinv_deq.FixedPointIteration.bind>` are, a pass costs one evaluation of ``f`` with a
    graph, in the backward pass. Any other callable costs two more evaluations, one forward and one backward, because its inputs are
    unknown.

    :param Solver, None solver: solver of the adjoint equation; default ``Solver("gmres", max_iter=50, tol=1e-3)``. The
        cotangent is brought to unit size before and scaled back after, so the gradient is linear in the loss.
    :param str mode: ``"implicit"``, the exact gradient, or ``"jfb"``, Jacobian-free backpropagation
        (:footcite:t:`fung2022jfb`), which takes :math:`b = g`.

    :raises ValueError: for an unknown mode.
    :raises RuntimeError: in the backward pass, if a gradient of second order is asked for where there is none: with ``"jfb"``,
        whose result is not the gradient of any function, and if ``f`` is no :class:`DifferentiableMap`.

    The attribute ``stat`` holds the :class:`SolverStat` of the last adjoint solve: ``evaluations`` counts
    vector-Jacobian products, and ``residual`` is verified by the last of them.

    |sep|

    :Example:

    The fixed point of :math:`x = a \cos x` and its derivative with respect to :math:`a`:

    >>> import torch
    >>> from deepinv_deq import ModularIDHook, Solver
    >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> f = lambda x: a * torch.cos(x)
    >>> x_star, stat = Solver("anderson", tol=1e-12)(f, torch.zeros(1, 1, dtype=torch.float64))
    >>> ModularIDHook(Solver("gmres", tol=1e-12))(f, x_star).sum().backward()
    >>> exact = torch.cos(x_star) / (1 + 0.5 * torch.sin(x_star))
    >>> bool(torch.isclose(a.grad, exact.squeeze()))
    True
    """

    def __init__(self, solver: Solver | None = None, *, mode: Literal["implicit", "jfb"] = "implicit"):
        if mode not in _MODES:
            raise ValueError(f"Unknown mode {mode!r}: must be one of {', '.join(_MODES)}.")
        if not isinstance(solver, (Solver, type(None))):
            raise TypeError(f"solver must be a Solver, got {solver!r}: write ModularIDHook(Solver({solver!r})).")
        self.solver = Solver("gmres", max_iter=50, tol=1e-3) if solver is None else solver
        self.mode = mode
        self.stat: SolverStat | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.solver}, mode={self.mode!r})"

    def __call__(
        self, f: Callable[[Any], Any], x_star: Any, *, on_solve: OnSolve | None = None, stat: SolverStat | None = None
    ) -> Any:
        r"""Give a fixed point its gradient.

        :param Callable f: the map whose fixed point it is; deterministic.
        :param torch.Tensor, tuple[torch.Tensor, ...] x_star: the fixed point, of any shape.
        :param Callable, None on_solve: called as ``on_solve("backward", stat)`` after every adjoint solve, in the thread of the
            backward pass, and as ``on_solve("tangent", stat)`` after the solve of forward mode.
        :param SolverStat, None stat: statistic of the solve that found ``x_star``. With it, the backward pass checks that ``f`` has the same
            residual there, and raises if ``f`` was changed in between.
        :return: a state with the values of ``x_star``; ``x_star`` itself where no gradient is wanted.
        :raises RuntimeError: inside of :func:`torch.func.grad`, :func:`torch.func.vjp` or :func:`torch.func.jacrev`, which have no implicit gradient here.
        """
        forward_mode = compat.forward_mode()
        if not (forward_mode or torch.is_grad_enabled()):
            return x_star
        f, single, tangent = as_map(f), isinstance(x_star, Tensor), None
        state = without_tangents(as_tuple(x_star)) if forward_mode else as_tuple(x_star)
        exact = self.mode == "implicit"
        if forward_mode:
            tangent = Tangent(self.solver, exact, single, lambda stat: on_solve and on_solve("tangent", stat)).of(
                f, state
            )
        x_hat = state
        if torch.is_grad_enabled():
            reached = None if stat is None else Reached.of(stat)
            x_hat = self._with_gradient(f, state, Adjoint(self.solver, exact, single, _Report(self, on_solve), reached))
        if tangent is not None:
            x_hat = attach(x_hat, tangent, graph=x_hat is not state)
        return x_star if x_hat is state else as_state(x_hat, single)

    def _with_gradient(self, f: Map, state: Tensors, adjoint: Adjoint) -> Tensors:
        r"""The fixed point in the graph; ``state`` itself where nothing requires a gradient."""
        x_star = tuple(x.detach() for x in state)
        function: type[torch.autograd.Function]
        if f.inputs is None:
            with torch.enable_grad():
                image = checkpoint(
                    lambda *x: as_tuple(f(as_state(x, adjoint.single))),
                    *x_star,
                    use_reentrant=False,
                    context_fn=lambda: (nullcontext(), outside_of_inference_mode()),
                )
            function, depends = BareAdjoint, any(t.requires_grad for t in image)
        else:
            image = without_tangents(f.inputs) if compat.forward_mode() else f.inputs
            function, depends = FixedPoint, bool(image)
        if not depends:
            return state
        if transforms := compat.transforms():
            return refuse_reverse(x_star, image, transforms)
        return function.apply(adjoint, f, len(x_star), *x_star, *image)


class _Report:
    r"""Stores the statistic of an adjoint solve on the hook, and calls ``on_solve``."""

    def __init__(self, hook: ModularIDHook, on_solve: OnSolve | None):
        self._hook, self._on_solve = hook, on_solve

    def __call__(self, stat: SolverStat) -> None:
        self._hook.stat = stat
        if self._on_solve is not None:
            self._on_solve("backward", stat)
