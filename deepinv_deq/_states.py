r"""States of any shape as one real ``(B, N)`` matrix, and the little algebra that every method shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]
Rows = Tensor | slice
_WORTH = 2**14  # numbers: below, an evaluation costs what calling it costs, and its samples come for free


@dataclass(frozen=True)
class AffineMap:
    r"""The map :math:`b \mapsto \ell(b) + c`, which lets a Krylov method use its two parts.

    :param Callable linear: the linear part :math:`\ell`.
    :param torch.Tensor, tuple[torch.Tensor, ...] offset: the constant :math:`c`, of the shape of the state.
    :param Callable, None precondition: linear map of states near to :math:`(I - \ell)^{-1}`, which a solver may use.
    """

    linear: Callable[[Any], Any]
    offset: Any
    precondition: Callable[[Any], Any] | None = None

    def __call__(self, b: Any) -> Any:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] b: a state.
        :return: :math:`\ell(b) + c`.
        """
        out = self.linear(b)
        if isinstance(out, tuple):
            return tuple(o + c for o, c in zip(out, self.offset, strict=True))
        return out + self.offset


@runtime_checkable
class SeparableMap(Protocol):
    r"""A map of batches that can be restricted to some samples, so that a solver need not evaluate all of them."""

    def separable(self, x: Any, fx: Any = None) -> bool:
        r"""Whether :meth:`select` is faithful, told by evaluations at the state ``x``, whose image is ``fx`` if known."""

    def select(self, rows: Rows) -> Callable[[Any], Any]:
        r"""The map of the samples ``rows``, in a batch of their own."""


def chunks(state: State, size: int | None) -> list[slice]:
    r"""Slices of the batch of a state, of ``size`` samples; by default of few enough to be worked on in a CPU's cache."""
    tensors = (state,) if isinstance(state, Tensor) else state
    if not tensors or not isinstance(tensors[0], Tensor) or tensors[0].ndim < 2:
        return []
    batch, numbers = len(tensors[0]), sum(t.numel() for t in tensors)
    if size is None:
        size = batch if tensors[0].device.type != "cpu" else -(-_WORTH * batch // max(1, numbers))
    return [slice(start, start + size) for start in range(0, batch, max(1, size))]


def preconditioner(f: Any, x: State) -> Callable[[Any], Any] | None:
    r"""What a map offers as an approximate inverse of the identity minus its Jacobian, for states like ``x``."""
    if isinstance(f, AffineMap):
        return f.precondition
    offered = getattr(f, "preconditioner", None)
    return None if offered is None else offered(x)


def join(states: Sequence[State]) -> State:
    r"""The inverse of taking slices."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], Tensor):
        return torch.cat(cast(list[Tensor], states))
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def take(state: State, rows: Rows) -> State:
    r"""Some samples of a state."""
    return state[rows] if isinstance(state, Tensor) else tuple(t[rows] for t in state)


class FlatMap:
    r"""A map of states as a map of ``(B, N)`` matrices that counts its evaluations, and what they cost in samples."""

    def __init__(self, f: Callable[[Any], Any], layout: Layout, count: list[int] | None = None):
        self._f, self._layout, self._count = f, layout, [0, 0] if count is None else count
        # no method of self: the cycle would keep the graph that f holds alive until the garbage collector comes
        self._evaluate = _counting(f.linear if isinstance(f, AffineMap) else f, layout, self._count)
        if isinstance(f, AffineMap):
            self.linear, self.offset = self._evaluate, layout.pack(f.offset)
        self.precondition: Callable[[Tensor], Tensor] | None = None

    def use(self, precondition: Callable[[Any], Any] | None) -> None:
        r"""Let solvers use a map of states near to the inverse of the identity minus the Jacobian."""
        layout = self._layout
        self.precondition = precondition and (lambda r: layout.pack(precondition(layout.unpack(r))))

    @property
    def evaluations(self) -> int:
        r"""Calls of the map."""
        return self._count[0]

    @property
    def samples(self) -> int:
        r"""Evaluations of single samples."""
        return self._count[1]

    def __call__(self, x: Tensor, tau: float = 1.0) -> Tensor:  # TorchDEQ's own plain iteration damps by tau
        fx = self._evaluate(x) + self.offset if isinstance(self._f, AffineMap) else self._evaluate(x)
        return fx if tau == 1.0 else tau * fx + (1 - tau) * x

    def subset(self, rows: Tensor, x: Tensor, fx: Tensor) -> FlatMap | None:
        r"""The map of some samples, if it is worth it and possible; ``x`` and its image ``fx`` are those of all samples."""
        f, layout = self._f, self._layout
        if x.numel() < _WORTH or layout.batch == 1 or not isinstance(f, SeparableMap):
            return None
        if not f.separable(layout.unpack(x), layout.unpack(fx)):
            return None
        part, part_layout = f.select(rows), layout.select(rows)
        flat = FlatMap(part, part_layout, self._count)
        flat.use(self.precondition and preconditioner(part, part_layout.unpack(x[rows])))
        return flat


def _counting(f: Callable[[Any], Any], layout: Layout, count: list[int]) -> Callable[[Tensor], Tensor]:
    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        count[1] += x.shape[0]
        return layout.pack(f(layout.unpack(x)))

    return counted


class Layout:
    r"""How a state (a tensor or a tuple of tensors, real or complex) lies in one real ``(B, N)`` matrix."""

    def __init__(self, state: State, batched: bool):
        self.single = isinstance(state, Tensor)
        tensors = (state,) if self.single else tuple(state)
        if not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise ValueError(f"A state must be a tensor or a non-empty tuple of tensors, got {type(state).__name__}.")
        self.like = tensors
        joint = not batched or all(t.ndim <= 1 for t in tensors)
        self.batch = 1 if joint else tensors[0].shape[:1].numel()
        if not joint and any(t.shape[:1] != tensors[0].shape[:1] for t in tensors):
            raise ValueError(
                "All tensors of a state must have the same batch size in dimension 0, got shapes "
                f"{[tuple(t.shape) for t in tensors]}. Use Solver(..., batched=False) for one joint sample."
            )
        # real numbers per sample; told explicitly, because an empty batch gives reshape(-1) nothing to infer them from
        self.sizes = [(t.shape if joint else t.shape[1:]).numel() * (2 if t.is_complex() else 1) for t in tensors]
        # half precision is for the map; the solver's own sums are in single precision at least
        real = [t.real.dtype if t.is_complex() else t.dtype for t in tensors]
        self.dtype = torch.float32
        for dtype in real:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def pack(self, state: State) -> Tensor:
        tensors = (state,) if isinstance(state, Tensor) else tuple(state)
        if [t.shape for t in tensors] != [t.shape for t in self.like]:
            raise ValueError(
                f"The map must return the shape it is given: {[tuple(t.shape) for t in self.like]} became "
                f"{[tuple(t.shape) for t in tensors]}."
            )
        reals = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        rows = [t.reshape(self.batch, size) for t, size in zip(reals, self.sizes, strict=True)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)).to(self.dtype)

    def unpack(self, flat: Tensor) -> State:
        out, start = [], 0
        for t, size in zip(self.like, self.sizes, strict=True):
            rows = flat[:, start : start + size]
            if t.is_complex():
                rows = torch.view_as_complex(rows.to(t.real.dtype).reshape(*t.shape, 2).contiguous())
            out.append(rows.reshape(t.shape).to(t.dtype))
            start += size
        return out[0] if self.single else tuple(out)

    def select(self, rows: Rows) -> Layout:
        r"""The layout of some samples."""
        like = tuple(t[rows] for t in self.like)
        return Layout(like[0] if self.single else like, batched=True)


def result(
    x: Tensor,
    absolute: Tensor,
    relative: Tensor,
    traces: tuple[list[Tensor], list[Tensor]],
    nstep: Tensor,
    converged: Tensor,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""What a registered method returns, in TorchDEQ's form: the point, no samples, and the keys of its statistic."""
    info = {
        "abs_lowest": absolute,
        "rel_lowest": relative,
        "abs_trace": torch.stack(traces[0], dim=1),
        "rel_trace": torch.stack(traces[1], dim=1),
        "nstep": nstep,
        "converged": converged,
    }
    return x, [], info


def norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def residuals(x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor]:
    r"""Absolute and relative residual per sample; Inf where they are not finite, 0 where f(x) = x = 0."""
    absolute, scale = norms(fx - x), norms(fx)
    relative = torch.where(absolute == 0, absolute, absolute / scale)
    bad = ~(torch.isfinite(absolute) & torch.isfinite(scale))
    return absolute.masked_fill(bad, torch.inf), relative.masked_fill(bad, torch.inf)


def unit_size(c: Tensor) -> Tensor:
    r"""A power of two of the size of each row, of shape ``(B, 1)``: dividing by it is exact."""
    size = c.abs().amax(dim=1, keepdim=True) if c.shape[1] else c.new_ones(c.shape[0], 1)
    exponent = torch.frexp(size).exponent
    return torch.where((size > 0) & torch.isfinite(size), torch.ldexp(torch.ones_like(size), exponent), 1.0)


def where_rows(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask[:, None], a, b)
