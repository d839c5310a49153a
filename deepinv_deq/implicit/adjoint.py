r"""The adjoint equation :math:`b = b \, \partial F / \partial x + g` of a fixed point, and the gradient that follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.implicit.graphs import (
    Gradients,
    Tensors,
    as_leaf,
    refuse_hidden_leaves,
    refuse_no_graph,
    vjp,
    zeros_for_none,
)
from deepinv_deq.implicit.unchanged import Reached
from deepinv_deq.maps import AffineMap, Map
from deepinv_deq.solvers import ConvergenceError, Solver, SolverStat
from deepinv_deq.solvers.solver import parts_of
from deepinv_deq.states import NUMBERS_PER_GRAPH, Rows, State, as_tuple, plus


def as_state(tensors: Sequence[Tensor], single: bool) -> State:
    r"""A state of one tensor, or of several."""
    return tensors[0] if single else tuple(tensors)


@dataclass(frozen=True)
class LinearSolves:
    r"""Settings of the linear solves of implicit differentiation, and the function that receives their statistics.

    :param Solver solver: their solver.
    :param bool exact: whether to solve; else the solution is taken to be the constant (Jacobian-free backpropagation).
    :param bool single: whether a state is one tensor.
    :param Callable report: called with the :class:`SolverStat` of every solve.
    """

    solver: Solver
    exact: bool
    single: bool
    report: Callable[[SolverStat], None]

    def solve(self, equation: AffineMap, measure: Callable[[Any], Any]) -> tuple[Tensors, SolverStat]:
        r"""Solve from zero, and verify the residual.

        :param AffineMap equation: the equation.
        :param Callable measure: evaluates the equation at the solution.
        :return: the solution and its statistic.
        :raises ConvergenceError: if the solve misses its tolerance and its solver was told to raise; it is reported first.
        """
        start = as_state([torch.zeros_like(t) for t in as_tuple(equation.offset)], self.single)
        try:
            solution, stat = self.solver(equation, start)
            # a NaN cotangent gives a NaN gradient, as everywhere in PyTorch; GradScaler relies on it
            self.solver.verify(solution, measure(solution), equation.offset, stat)
        except ConvergenceError as error:
            if error.stat is not None:
                self.report(error.stat)
            raise
        return as_tuple(solution), stat


@dataclass(frozen=True)
class Adjoint(LinearSolves):
    r"""Adjoint solves: :math:`b = b \, \partial F / \partial x + g`.

    :param Reached, None reached: what the solve for the fixed point measured, if that is known.
    """

    reached: Reached | None = None

    def without_reached(self) -> Adjoint:
        r"""The settings for derivatives of the adjoint equation itself, whose solution has a residual of its own."""
        return replace(self, reached=None)

    def gradient(self, f: Map, x_star: Tensors, inputs: Tensors, g: Tensors) -> Gradients:
        r"""The product :math:`g \, \partial \hat x / \partial` ``inputs``, by chunks of samples: one graph at a time.

        :param Map f: the map, with ``inputs``.
        :param tuple[torch.Tensor, ...] x_star: its fixed point.
        :param tuple[torch.Tensor, ...] inputs: values of ``f.inputs``.
        :param tuple[torch.Tensor, ...] g: cotangent of the fixed point.
        :return: one gradient for each of ``inputs``; ``None`` where the map does not depend on it.
        :raises ConvergenceError: if the solve misses its tolerance and its solver was told to raise.
        """
        total: Gradients = ()
        stats: list[SolverStat] = []
        joint = (
            self.reached is not None and len(self.reached.residual) != x_star[0].shape[:1].numel()
        )  # solved as one sample
        parts = [(None, f)] if joint else parts_of(self.solver, f, as_state(x_star, self.single), NUMBERS_PER_GRAPH)
        for rows, part in parts:
            x, cotangent = (t if rows is None else tuple(s[rows] for s in t) for t in (x_star, g))
            _, grads, stat = self._of_one_graph(part, x, inputs, cotangent, rows)
            total = tuple(map(_sum, total, grads)) if total else grads
            stats += [] if stat is None else [stat]
        if stats:
            self.report(self.solver.joined(stats))
        return total

    def differentiable_gradient(
        self, f: Map, x_hat: Tensors, inputs: Tensors, g: Tensors, fixed_point: Any
    ) -> Gradients:
        r"""The same product with a graph, as a function of ``inputs`` and of ``g``.

        :param Map f: the map, with ``inputs``.
        :param tuple[torch.Tensor, ...] x_hat: its fixed point, as a function of ``inputs``.
        :param tuple[torch.Tensor, ...] inputs: values of ``f.inputs``.
        :param tuple[torch.Tensor, ...] g: cotangent of the fixed point.
        :param Callable fixed_point: gives the fixed point of a map its gradient.
        :return: one gradient for each of ``inputs``; ``None`` where the map does not depend on it.
        """
        adjoint = AdjointMap(f, x_hat, inputs, g, self.single)
        with torch.no_grad():
            b, _, stat = self._of_one_graph(f, tuple(x.detach() for x in x_hat), inputs, g)
        if stat is not None:
            self.report(stat)
        return adjoint.products(fixed_point(adjoint, b, adjoint.inputs))

    def pull_back(
        self,
        image: Tensors,
        x: Tensors,
        inputs: Tensors,
        g: Tensors,
        inverse: Callable[[Any], Any] | None = None,
        steps: bool = False,
    ) -> tuple[Tensors, Gradients, SolverStat | None]:
        r"""Solve the adjoint equation on the graph from ``x`` and ``inputs`` to ``image``.

        :param tuple[torch.Tensor, ...] image: the image of ``x``, with its graph.
        :param tuple[torch.Tensor, ...] x: the fixed point.
        :param tuple[torch.Tensor, ...] inputs: what else the image depends on.
        :param tuple[torch.Tensor, ...] g: cotangent.
        :param Callable, None inverse: preconditioner.
        :param bool steps: whether ``image`` is the residual :math:`F(x) - x`, and not :math:`F(x)`.
        :return: the solution :math:`b`, the product :math:`b \, \partial F / \partial` ``inputs`` and the statistic.
        """
        if not self.exact:
            return g, vjp(image, inputs, g), None

        def product(b: State) -> State:
            return as_state(zeros_for_none(vjp(image, x, as_tuple(b), keep=True), x), self.single)

        def linear(b: State) -> State:
            return plus(b, product(b)) if steps else product(b)

        products: Gradients = ()

        def measure(b: State) -> State:
            # this last product also gives b dF/dx, and with it the true residual of the adjoint equation
            nonlocal products
            products = vjp(image, (*x, *inputs), as_tuple(b))
            of_x = plus(as_state(zeros_for_none(products[: len(x)], x), self.single), as_state(g, self.single))
            return plus(b, of_x) if steps else of_x

        equation = AffineMap(linear, as_state(g, self.single), inverse, product if steps else None)
        b, stat = self.solve(equation, measure)
        return b, products[len(x) :], stat

    def _of_one_graph(
        self, f: Map, x_star: Tensors, inputs: Tensors, g: Tensors, rows: Rows | None = None
    ) -> tuple[Tensors, Gradients, SolverStat | None]:
        r"""The solution :math:`b`, the gradient and the statistic, with one evaluation that builds a graph."""
        leaves = tuple(map(as_leaf, (*x_star, *inputs)))
        inputs = leaves[len(x_star) :]
        inverse = f.preconditioner(as_state(x_star, self.single)) if self.solver.precondition else None
        with torch.enable_grad():
            # a view, because hooks such as those of torch.utils.flop_counter refuse leaves in torch.autograd.grad
            x = tuple(t.view_as(t) for t in leaves[: len(x_star)])
            bound, state = f.rebind(inputs), as_state(x, self.single)
            steps = bound.has_own_step
            image = as_tuple(bound.step(state) if steps else bound(state))
        refuse_no_graph(image)
        refuse_hidden_leaves(image, leaves)
        if self.reached is not None:
            self.reached.select(rows).check(as_state(x, self.single), as_state(image, self.single), steps)
        return self.pull_back(image, x, inputs, g, inverse, steps)


class AdjointMap(Map):
    r"""The map :math:`b \mapsto b \, \partial F / \partial x + g` of eq. 10, which can be differentiated any number of times.

    Its inputs are the tensors on which the Jacobian depends (the fixed point and the inputs of :math:`F`) and :math:`g`.

    :param Map f: the map :math:`F`.
    :param tuple[torch.Tensor, ...] x: its fixed point.
    :param tuple[torch.Tensor, ...] inputs: values of ``f.inputs``.
    :param tuple[torch.Tensor, ...] g: cotangent.
    :param bool single: whether a state is one tensor.
    """

    def __init__(self, f: Map, x: Tensors, inputs: Tensors, g: Tensors, single: bool):
        self._f, self._x, self._of_f, self._g, self._single = f, x, inputs, g, single
        self.inputs = (*x, *inputs, *g)

    def rebind(self, inputs: Sequence[Tensor]) -> AdjointMap:
        n, m = len(self._x), len(self._x) + len(self._of_f)
        return AdjointMap(self._f, tuple(inputs[:n]), tuple(inputs[n:m]), tuple(inputs[m:]), self._single)

    def __call__(self, b: Any) -> Any:
        products = zeros_for_none(self._product(as_tuple(b), of_x=True), self._x)
        return as_state([p + g for p, g in zip(products, self._g, strict=True)], self._single)

    def products(self, b: Tensors) -> Gradients:
        r"""The product :math:`b \, \partial F / \partial` ``inputs``, with a graph."""
        return self._product(b, of_x=False)

    def _product(self, b: Tensors, of_x: bool) -> Gradients:
        with torch.enable_grad():
            # views, to get partial derivatives: the fixed point itself depends on the inputs
            x, inputs = (tuple(t.view_as(t) for t in tensors) for tensors in (self._x, self._of_f))
            image = as_tuple(self._f.rebind(inputs)(as_state(x, self._single)))
            return vjp(image, x if of_x else inputs, b, graph=True)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
