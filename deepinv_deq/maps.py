r"""Maps as solvers and the hook see them: one class with defaults, and a wrapper for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from deepinv_deq.compat import version
from deepinv_deq.states import Rows, as_tuple, minus, plus

Tensors = tuple[Tensor, ...]


class Map:
    r"""A map :math:`F` of states, with everything that a solver or a hook may use of it.

    A subclass implements ``__call__`` and overrides the other members that it can offer. The defaults are always correct: they
    cost evaluations, not accuracy.
    """

    #: Every tensor that requires a gradient and on which the map depends besides its argument. ``None``: not known.
    inputs: Tensors | None = None
    #: Whether the map records the points at which it is evaluated, so that they must be iterates of the solve.
    records: bool = False

    def __call__(self, x: Any) -> Any:
        r"""Evaluate :math:`F(x)`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :return: a state of the same shapes.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(x).")

    def step(self, x: Any) -> Any:
        r"""The residual :math:`F(x) - x`. Override it where the difference cancels digits, as for small stepsizes.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :return: a state of the same shapes.
        """
        return minus(self(x), x)

    @property
    def has_own_step(self) -> bool:
        r"""Whether ``step`` has more digits than a difference."""
        return type(self).step is not Map.step

    def natural(self, x: Any) -> Callable[[Any], Any] | None:
        r"""Linear map that turns a residual into a change of the state, whatever the stepsize. Default: the preconditioner.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state, for its shapes.
        :return: the map; ``None`` where residuals are such changes already.
        """
        return self.preconditioner(x)

    def preconditioner(self, x: Any) -> Callable[[Any], Any] | None:
        r"""An approximate inverse of :math:`I - \partial F / \partial x`, linear and self-adjoint.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state, for its shapes.
        :return: the map, or ``None``.
        """
        return None

    def rebind(self, inputs: Sequence[Tensor]) -> Map:
        r"""The same map with other tensors in the place of :attr:`inputs`.

        :param Sequence[torch.Tensor] inputs: one tensor for each of :attr:`inputs`.
        :return: a map.
        """
        raise NotImplementedError(f"{type(self).__name__} names inputs, so it must implement rebind(inputs).")

    def select(self, rows: Rows) -> Map | None:
        r"""The same map of some samples, in a batch of their own; its :attr:`inputs` are those of the whole.

        :param torch.Tensor, slice rows: which samples.
        :return: a map of states of these samples; ``None`` where the restriction is not certain to be exact.
        """
        return None

    def diagnose(self) -> str:
        r"""Why a solve of this map may have failed, for the message of a warning.

        :return: a sentence, or an empty string.
        """
        return ""


class _Wrapped(Map):
    r"""Another object as a :class:`Map`: a callable, or one whose class has some of the methods of a map."""

    def __init__(self, f: Callable[[Any], Any]):
        self._f = f

    def _offers(self, name: str) -> bool:
        # an attribute of that name, such as a submodule, is not meant
        return callable(getattr(type(self._f), name, None))

    @property
    def inputs(self) -> Tensors | None:  # type: ignore[override]
        return getattr(self._f, "inputs", None) if self._offers("rebind") else None

    def __call__(self, x: Any) -> Any:
        point = as_tuple(x) if isinstance(x, (Tensor, tuple)) else ()
        before = [version(t) for t in point]
        out = self._f(x)
        if [version(t) for t in point] != before:
            raise RuntimeError(
                f"{getattr(self._f, '__name__', type(self._f).__name__)} wrote to its argument in place, which the solver still uses: give it a copy, "
                "lambda x: f(x.clone()), or use layers without inplace=True."
            )
        return out

    def step(self, x: Any) -> Any:
        return self._f.step(x) if self.has_own_step else super().step(x)  # type: ignore[attr-defined]

    @property
    def has_own_step(self) -> bool:
        # a method of that name alone may mean another thing, such as F(x) itself
        return self._offers("step") and bool(getattr(self._f, "has_own_step", False))

    def rebind(self, inputs: Sequence[Tensor]) -> Map:
        return as_map(self._f.rebind(inputs))  # type: ignore[attr-defined]

    def preconditioner(self, x: Any) -> Callable[[Any], Any] | None:
        return self._f.preconditioner(x) if self._offers("preconditioner") else None  # type: ignore[attr-defined]

    def select(self, rows: Rows) -> Map | None:
        # an object with the old method ``separable`` restricts itself only after that method said so: solve it whole
        if self._offers("separable") or not self._offers("select"):
            return None
        part = self._f.select(rows)  # type: ignore[attr-defined]
        return None if part is None else as_map(part)

    def diagnose(self) -> str:
        return self._f.diagnose() if self._offers("diagnose") else ""  # type: ignore[attr-defined]


class _WithNatural(_Wrapped):
    r"""A class of its own, because a solver applies the preconditioner once per evaluation where ``natural`` is the default."""

    def natural(self, x: Any) -> Callable[[Any], Any] | None:
        return self._f.natural(x)  # type: ignore[attr-defined]


def as_map(f: Callable[[Any], Any]) -> Map:
    r"""The one place where a user's callable becomes a :class:`Map`.

    :param Callable f: a map, an object with some of its methods, or any function of a state. The method ``step`` of such an object is
        used if its attribute ``has_own_step`` is true.
    :return: ``f`` itself if it is a :class:`Map`.
    """
    if isinstance(f, Map):
        return f
    return _WithNatural(f) if callable(getattr(type(f), "natural", None)) else _Wrapped(f)


class Delegate(Map):
    r"""A map that hands everything but its evaluation on to another map."""

    def __init__(self, f: Map):
        self._f = f

    @property
    def has_own_step(self) -> bool:
        return self._f.has_own_step

    def natural(self, x: Any) -> Callable[[Any], Any] | None:
        return self._f.natural(x)

    def preconditioner(self, x: Any) -> Callable[[Any], Any] | None:
        return self._f.preconditioner(x)

    def select(self, rows: Rows) -> Map | None:
        return self._f.select(rows)

    def diagnose(self) -> str:
        return self._f.diagnose()


class AffineMap(Map):
    r"""The map :math:`b \mapsto \ell(b) + c`, which lets a Krylov method use its two parts.

    :param Callable linear: the linear part :math:`\ell`.
    :param torch.Tensor, tuple[torch.Tensor, ...] offset: the constant :math:`c`, of the shape of the state.
    :param Callable, None precondition: linear map of states near to :math:`(I - \ell)^{-1}`.
    :param Callable, None change: the map :math:`b \mapsto \ell(b) - b`, where it is known to more digits than a difference has.
    """

    def __init__(
        self,
        linear: Callable[[Any], Any],
        offset: Any,
        precondition: Callable[[Any], Any] | None = None,
        change: Callable[[Any], Any] | None = None,
    ) -> None:
        self.linear, self.offset, self._precondition, self.change = linear, offset, precondition, change

    def __call__(self, b: Any) -> Any:
        return plus(self.linear(b), self.offset)

    def preconditioner(self, x: Any) -> Callable[[Any], Any] | None:
        return self._precondition
