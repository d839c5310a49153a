r"""Implicit differentiation of a fixed point (Proposition 1), the only place that knows how it is done.

For :math:`\hat x = F(\hat x)` and a cotangent :math:`g`, the paper's eq. 10 says

.. math::

    g \, \frac{\partial \hat x}{\partial \theta} = b \, \frac{\partial F}{\partial \theta}
    \quad \text{where} \quad b = b \, \frac{\partial F}{\partial x} + g .

Nothing of :math:`F` is taped in the forward pass. The backward pass tapes it once at :math:`\hat x`, solves for
:math:`b` with vector-Jacobian products of that one graph, and frees it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch._functorch import config as compiler  # of torch.compile; it has no public name
from torch.utils.checkpoint import checkpoint

from deepinv_deq._maps import AffineMap, SeparableMap, preconditioner
from deepinv_deq._states import State, as_tuple
from deepinv_deq.solvers import Solver, SolverStat

_MODES = ("implicit", "jfb")
Tensors = tuple[Tensor, ...]


@runtime_checkable
class DifferentiableMap(Protocol):
    r"""A map that can say what it depends on, so that its fixed point is differentiated with one taped evaluation."""

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

    ``f`` may be any callable. If it is a :class:`DifferentiableMap`, as the maps of
    :meth:`FixedPointIteration.bind <deepinv_deq.FixedPointIteration.bind>` are, a pass costs one taped evaluation of
    ``f``, in the backward pass. For any other callable, whose dependencies cannot be seen, it costs two more
    evaluations: a checkpointed one now and its recomputation in the backward pass.

    :param Solver, None solver: solver of the adjoint equation; default ``Solver("gmres", max_iter=50, tol=1e-3)``. The
        cotangent is brought to unit size before and scaled back after, so the gradient is linear in the loss.
    :param str mode: ``"implicit"``, the exact gradient, or ``"jfb"``, Jacobian-free backpropagation
        (:footcite:t:`fung2022jfb`), which takes :math:`b = g`.

    :raises ValueError: for an unknown mode.
    :raises RuntimeError: in the backward pass, if a gradient of second order is asked for where there is none: with ``"jfb"``,
        whose gradients are those of no function, and if ``f`` is no :class:`DifferentiableMap`.

    The attribute ``stat`` holds the :class:`SolverStat` of the last adjoint solve: ``evaluations`` counts
    vector-Jacobian products, and ``residual`` is verified by the last of them. ``remainder`` is the same residual in parts of the
    cotangent, which tells how much of the equation was solved where the map takes small steps; above one half, the solve warns.

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
        self.solver = Solver("gmres", max_iter=50, tol=1e-3) if solver is None else solver
        self.mode = mode
        self.stat: SolverStat | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.solver}, mode={self.mode!r})"

    def __call__(self, f: Callable[[Any], Any], x_star: Any) -> Any:
        r"""Give a fixed point its gradient.

        :param Callable f: the map whose fixed point it is; deterministic.
        :param torch.Tensor, tuple[torch.Tensor, ...] x_star: the fixed point, of any shape.
        :return: a state with the values of ``x_star``; ``x_star`` itself where no gradient is wanted.
        """
        if not torch.is_grad_enabled():
            return x_star
        single = isinstance(x_star, Tensor)
        state = (x_star.detach(),) if single else tuple(x.detach() for x in x_star)
        if isinstance(f, DifferentiableMap):
            if not f.inputs:
                return x_star
            x_hat = _FixedPoint.apply(self, f, single, len(state), *state, *f.inputs)
        else:
            with torch.enable_grad():
                image = checkpoint(lambda *x: as_tuple(f(_state(x, single))), *state, use_reentrant=False)
            if not any(t.requires_grad for t in image):
                return x_star
            x_hat = _Adjoint.apply(self, f, single, len(state), *state, *image)
        return _state(x_hat, single)

    def _implicit_gradient(
        self, f: DifferentiableMap, x_star: Tensors, inputs: Tensors, g: Tensors, single: bool
    ) -> Tensors:
        r"""The product :math:`g \, \partial \hat x / \partial` ``inputs``, by chunks of samples: one graph at a time."""
        total: Tensors = ()
        stats: list[SolverStat] = []
        whole: list[slice | None] = [None]
        for rows in self.solver.chunks(f, _state(x_star, single)) or whole:
            part = f if rows is None else cast(DifferentiableMap, cast(SeparableMap, f).select(rows))
            x, cotangent = (t if rows is None else tuple(s[rows] for s in t) for t in (x_star, g))
            _, grads = self._of_one_graph(part, x, inputs, cotangent, single)
            total = tuple(t + d for t, d in zip(total, grads, strict=True)) if total else grads
            stats += [self.stat] if self.stat else []
        if self.mode == "implicit":
            self.stat = self.solver.joined(stats)
        return total

    def _differentiable_gradient(
        self, f: DifferentiableMap, x_star: Tensors, inputs: Tensors, g: Tensors, single: bool
    ) -> Tensors:
        r"""The same product with a graph: as a function of ``inputs``, on which the fixed point depends, and of ``g``."""
        x_hat = _FixedPoint.apply(self, f, single, len(x_star), *x_star, *inputs)
        adjoint = _AdjointMap(f, x_hat, inputs, g, single)
        with torch.no_grad():
            b, _ = self._of_one_graph(f, x_star, inputs, g, single)
        b = _FixedPoint.apply(self, adjoint, single, len(b), *b, *adjoint.inputs)
        return adjoint.products(b)

    def _of_one_graph(
        self, f: DifferentiableMap, x_star: Tensors, inputs: Tensors, g: Tensors, single: bool
    ) -> tuple[Tensors, Tensors]:
        r"""The solution :math:`b` and the product :math:`b \, \partial F / \partial` ``inputs``, with one taped evaluation."""
        leaves = tuple(t.detach().requires_grad_() for t in (*x_star, *inputs))
        x, inputs = leaves[: len(x_star)], leaves[len(x_star) :]
        inverse = preconditioner(f, _state(x_star, single)) if self.solver.precondition else None
        with torch.enable_grad():
            image = as_tuple(f.rebind(inputs)(_state(x, single)))
        _refuse_hidden_leaves(image, leaves)
        return self._pull_back(image, x, inputs, g, single, inverse)

    def _pull_back(
        self,
        image: Tensors,
        x: Tensors,
        inputs: Tensors,
        g: Tensors,
        single: bool,
        inverse: Callable[[Any], Any] | None = None,
    ) -> tuple[Tensors, Tensors]:
        r"""Solve the adjoint equation on the graph from ``x`` and ``inputs`` to ``image``.

        :return: the solution :math:`b`, and :math:`b \, \partial F / \partial` ``inputs``.
        """
        if self.mode == "jfb":
            return g, _vjp(image, inputs, g)
        step = lambda b: _state(_vjp(image, x, as_tuple(b), keep=True), single)  # noqa: E731
        adjoint = AffineMap(step, _state(g, single), inverse)
        b, self.stat = self.solver(adjoint, _state(tuple(torch.zeros_like(t) for t in g), single))
        b = as_tuple(b)
        # the last product also gives b dF/dx: the true residual of the adjoint equation, for next to nothing
        (*products,) = _vjp(image, (*x, *inputs), b)
        measured = tuple(p + t for p, t in zip(products[: len(x)], g, strict=True))
        # a NaN cotangent has given NaN, as everywhere in PyTorch (GradScaler relies on it): nothing to verify there
        self.solver.verify(_state(b, single), _state(measured, single), adjoint.offset, self.stat)
        return b, tuple(products[len(x) :])


class _AdjointMap:
    r"""The map :math:`b \mapsto b \, \partial F / \partial x + g` of eq. 10 as one that can be differentiated, again and again.

    Its inputs are all that the Jacobian depends on, the fixed point among them, and :math:`g`.
    """

    def __init__(self, f: DifferentiableMap, x: Tensors, inputs: Tensors, g: Tensors, single: bool):
        self._f, self._x, self._of_f, self._g, self._single = f, x, inputs, g, single

    @property
    def inputs(self) -> Tensors:
        return (*self._x, *self._of_f, *self._g)

    def rebind(self, inputs: Sequence[Tensor]) -> _AdjointMap:
        n, m = len(self._x), len(self._x) + len(self._of_f)
        return _AdjointMap(self._f, tuple(inputs[:n]), tuple(inputs[n:m]), tuple(inputs[m:]), self._single)

    def __call__(self, b: Any) -> Any:
        products = self._taped(as_tuple(b), of_x=True)
        return _state(tuple(p + g for p, g in zip(products, self._g, strict=True)), self._single)

    def products(self, b: Tensors) -> Tensors:
        r"""The product :math:`b \, \partial F / \partial` ``inputs``, with a graph."""
        return self._taped(b, of_x=False)

    def _taped(self, b: Tensors, of_x: bool) -> Tensors:
        with torch.enable_grad():
            # views, since partial derivatives are meant: the fixed point depends on the inputs
            x, inputs = (tuple(t.view_as(t) for t in tensors) for tensors in (self._x, self._of_f))
            image = as_tuple(self._f.rebind(inputs)(_state(x, self._single)))
            return _vjp(image, x if of_x else inputs, b, graph=True)


class _FixedPoint(torch.autograd.Function):
    r"""``x_star`` as a function of all inputs of a :class:`DifferentiableMap`: tapes the map once, in backward."""

    @staticmethod
    def forward(ctx: Any, hook: ModularIDHook, f: DifferentiableMap, single: bool, n: int, *tensors: Tensor) -> Tensors:
        ctx.hook, ctx.f, ctx.single, ctx.n = hook, f, single, n
        ctx.autocast = _autocast_settings(tensors[0].device.type)
        ctx.save_for_backward(*tensors)  # which also notices a tensor that is changed in place before backward
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Any, ...]:
        hook, x_star, inputs = ctx.hook, ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        # it is enabled in a backward pass under create_graph=True only
        differentiable = torch.is_grad_enabled() and hook.mode == "implicit"
        gradient = hook._differentiable_gradient if differentiable else hook._implicit_gradient
        with _as_in_forward(ctx.autocast):
            grads = gradient(ctx.f, x_star, inputs, g, ctx.single)
        if not differentiable:
            grads = _refuse_second_order(grads, (*g, *ctx.saved_tensors))
        return (None,) * (4 + ctx.n) + grads


class _Adjoint(torch.autograd.Function):
    r"""Replaces the cotangent :math:`g` of an evaluation :math:`F(x^*)` by the solution :math:`b` of eq. 10."""

    @staticmethod
    def forward(
        ctx: Any, hook: ModularIDHook, f: Callable[[Any], Any], single: bool, n: int, *tensors: Tensor
    ) -> Tensors:
        ctx.hook, ctx.f, ctx.single, ctx.n = hook, f, single, n
        ctx.autocast = _autocast_settings(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Any, ...]:
        outer = (*g, *ctx.saved_tensors)
        if ctx.hook.mode == "jfb":
            return (None,) * (4 + ctx.n) + _refuse_second_order(g, outer)
        x = tuple(t.detach().requires_grad_() for t in ctx.saved_tensors[: ctx.n])
        with _as_in_forward(ctx.autocast):
            with torch.enable_grad():
                image = as_tuple(ctx.f(_state(x, ctx.single)))
            b, _ = ctx.hook._pull_back(image, x, (), g, ctx.single)
        return (None,) * (4 + ctx.n) + _refuse_second_order(b, outer)


class _SecondOrder(torch.autograd.Function):
    r"""Identity whose derivative is an error instead of a wrong value."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> Tensors:
        return tuple(t.clone() for t in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "Second-order gradients were asked for (create_graph=True) where there are none: the gradients of mode='jfb' are "
            "those of no function, and of a callable that is no DifferentiableMap nobody knows what it depends on. Use "
            "mode='implicit', and a map of iteration.bind(y, physics) or another with the methods of DifferentiableMap."
        )


def _refuse_second_order(grads: Tensors, outer: Tensors) -> tuple[Any, ...]:
    r"""Tie gradients to all they depend on (``outer``: cotangents and inputs) by an error."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    return tuple(_SecondOrder.apply(len(grads), *grads, *outer)) if grads else ()


def _refuse_hidden_leaves(image: Tensors, known: Tensors) -> None:
    r"""Raise if the map turns out to depend on a trainable tensor it did not name: its gradient would be lost."""
    known_ids, seen = {id(t) for t in known}, set[Any]()
    nodes: list[Any] = [t.grad_fn for t in image]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_ids:
            raise RuntimeError(
                f"The iteration depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient but is no "
                "parameter, buffer or attribute of the iteration or the physics, so its gradient would be lost. Make it "
                "an attribute of one of them, or detach it."
            )
        nodes.extend(parent for parent, _ in node.next_functions)


def _vjp(outputs: Tensors, inputs: Tensors, cotangent: Tensors, keep: bool = False, graph: bool = False) -> Tensors:
    r"""Product of a cotangent with the Jacobian of ``outputs`` over ``inputs``; zero where there is no dependence.

    :param bool keep: whether the graph of ``outputs`` serves again.
    :param bool graph: whether the product gets a graph of its own; if so, that of ``outputs`` is kept, too.
    """
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangent, strict=True) if o.requires_grad]
    if not pairs or not inputs:
        return tuple(torch.zeros_like(t) for t in inputs)
    outs, cots = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outs, inputs, cots, retain_graph=keep or graph, create_graph=graph, allow_unused=True)
    return tuple(torch.zeros_like(t) if d is None else d for t, d in zip(inputs, grads, strict=True))


def _state(tensors: Tensors, single: bool) -> State:
    return tensors[0] if single else tuple(tensors)


def _autocast_settings(device: str) -> list[tuple[str, bool, torch.dtype]]:
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in {"cpu", device}]


@contextmanager
def _as_in_forward(settings: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    r"""Evaluate as in the forward pass: a Trainer runs backward outside of its autocast region.

    What ``torch.compile`` makes of a map here is made for many products, by default it gives buffers away in the first; and
    for one batch size each, since gradients of its graphs for any batch size were measured to be wrong (PyTorch 2.14, CPU).
    """
    with ExitStack() as stack:
        for device, enabled, dtype in settings:
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        switches = [(compiler, "donated_buffer")]
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            switches.append((torch._dynamo.config, "automatic_dynamic_shapes"))
        for config, name in switches:
            if getattr(config, name, False):
                stack.enter_context(_switched_off.patch(config, name))
        yield


class _SwitchedOff(threading.local):
    r"""Patches of PyTorch's settings, one of each per thread: PyTorch 2.14 keeps a context variable of every one for ever."""

    def patch(self, config: Any, name: str) -> Any:
        if name not in self.__dict__:
            self.__dict__[name] = config.patch({name: False})
        return self.__dict__[name]


_switched_off = _SwitchedOff()


def fixed_point_nodes(x: Tensor) -> list[Any]:
    r"""The nodes of the graph behind ``x`` in whose backward passes adjoint equations are solved."""
    found, seen, todo = [], set[Any](), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == f"{_FixedPoint.__name__}Backward":
            found.append(node)
        else:
            todo += [parent for parent, _ in node.next_functions]
    return found
