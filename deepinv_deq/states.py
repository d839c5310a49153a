r"""States of any shape as one real ``(B, N)`` matrix, and the algebra of rows that all solvers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from deepinv_deq.autocast import Autocast
from deepinv_deq.compat import numbers

State = Tensor | tuple[Tensor, ...]
Rows = Tensor | slice
WORTH = 2**15  # numbers: below this size call overhead dominates, and dropping samples does not pay
NUMBERS_PER_GRAPH = WORTH // 2  # on CPU: half the memory of a graph of WORTH, and 1 to 2 % more time at 128x128 pixels


def as_tuple(state: State) -> tuple[Tensor, ...]:
    r"""The tensors of a state."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def chunks(state: State, size: int | None, numbers: int = WORTH) -> list[slice]:
    r"""Slices of the batch of a state.

    :param torch.Tensor, tuple[torch.Tensor, ...] state: the state.
    :param int, None size: number of samples of a slice. ``None``: on CPU as few as have ``numbers`` numbers, else the whole batch.
    :param int numbers: how many numbers are worked on together on CPU.
    """
    tensors = as_tuple(state)
    if not tensors or not isinstance(tensors[0], Tensor) or tensors[0].ndim < 2:
        return []
    batch, total = len(tensors[0]), sum(t.numel() for t in tensors)
    if size is None:
        size = batch if tensors[0].device.type != "cpu" else -(-numbers * batch // max(1, total))
    return [slice(start, start + size) for start in range(0, batch, max(1, size))]


def take(state: State, rows: Rows) -> State:
    r"""Some samples of a state."""
    return state[rows] if isinstance(state, Tensor) else tuple(t[rows] for t in state)


def join(states: Sequence[State]) -> State:
    r"""The inverse of taking slices."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], Tensor):
        return torch.cat(cast(list[Tensor], states))
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def plus(a: State, b: State) -> State:
    r"""Sum of two states, of the kind of ``a``."""
    return a + as_tuple(b)[0] if isinstance(a, Tensor) else tuple(s + t for s, t in zip(a, as_tuple(b), strict=True))


def minus(a: State, b: State) -> State:
    r"""Difference of two states, of the kind of ``a``."""
    return a - as_tuple(b)[0] if isinstance(a, Tensor) else tuple(s - t for s, t in zip(a, as_tuple(b), strict=True))


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
        real = [t.real.dtype for t in tensors]
        self.dtype = torch.float32
        for dtype in real:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def pack(self, state: State) -> Tensor:
        r"""The matrix of a state."""
        tensors = as_tuple(state) if isinstance(state, Iterable) else ()
        if not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"The map must return a state, a tensor or a tuple of tensors, got {type(state).__name__}.")
        if [t.shape for t in tensors] != [t.shape for t in self.like]:
            raise ValueError(
                f"The map must return the shape it is given: {[tuple(t.shape) for t in self.like]} became "
                f"{[tuple(t.shape) for t in tensors]}."
            )
        if [t.is_complex() for t in tensors] != [t.is_complex() for t in self.like]:
            raise TypeError(
                f"The map must return real numbers for real ones, and complex ones for complex ones: {[t.dtype for t in self.like]} "
                f"became {[t.dtype for t in tensors]}. Start from a state of the right type (init)."
            )
        reals = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
        rows = [t.reshape(self.batch, size) for t, size in zip(reals, self.sizes, strict=True)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)).to(self.dtype)

    def unpack(self, flat: Tensor) -> State:
        r"""The state of a matrix."""
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


def orthogonalised(w: Tensor, basis: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    r"""What is left of directions without their components along an orthonormal basis, by classical Gram-Schmidt.

    :param torch.Tensor w: directions, of shape ``(B, N)``.
    :param torch.Tensor basis: of shape ``(B, k, N)``.
    :param torch.Tensor dual: the basis times the matrix of the inner product; ``basis`` itself for the Euclidean one.
    :return: the rest, and the components in double precision, of shape ``(B, k)``.
    """
    rest, components = w[:, None], []
    with Autocast(w.device.type).off():
        for _ in range(2):  # once more: classical Gram-Schmidt loses orthogonality in single precision
            # with columns instead of rows, a batch takes four times as long on CPU
            components.append(torch.bmm(rest, dual.transpose(1, 2)))
            rest = torch.baddbmm(rest, components[-1], basis, alpha=-1)
    return rest[:, 0], (components[0].double() + components[1])[:, 0]


def norms(x: Tensor) -> Tensor:
    r"""Euclidean norm of each row, in double precision; right at any scale that the entries of ``x`` can have."""
    if x.dtype != torch.float64:
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    unit = unit_size(x)
    return torch.linalg.vector_norm(x / unit, dim=1) * unit[:, 0]


def finite_rows(x: Tensor) -> Tensor:
    r"""Whether all entries of each row are finite, of shape ``(B,)``; in two operations on accelerators, where each costs a launch."""
    if not x.shape[1]:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    if on_host(x):  # where the norm takes ten times as long
        return x.abs().amax(dim=1) < torch.inf
    return torch.linalg.vector_norm(x, torch.inf, dim=1) < torch.inf


def on_host(t: Tensor) -> bool:
    r"""Whether reading a number does not wait for a device, and launching an operation costs little."""
    return t.device.type == "cpu"


def read(*tensors: Tensor) -> list[np.ndarray]:
    r"""Numbers on the host, with one synchronisation.

    :param torch.Tensor tensors: in double precision, of shape ``(B,)`` or ``(B, k)``.
    :return: arrays of these shapes.
    """
    table, start, out = torch.cat([t if t.ndim > 1 else t[:, None] for t in tensors], dim=1), 0, []
    try:
        values = table.numpy(force=True)
    except RuntimeError:  # inside of torch.func
        values = np.array(numbers(table.reshape(-1))).reshape(table.shape)
    for t in tensors:
        width = t.shape[1] if t.ndim > 1 else 1
        out.append(values[:, start : start + width].reshape(t.shape))
        start += width
    return out


def unit_size(c: Tensor) -> Tensor:
    r"""A power of two of the size of each row, of shape ``(B, 1)``: dividing by it is exact. 1 for rows of zeros, NaN or Inf."""
    size = c.abs().amax(dim=1, keepdim=True) if c.shape[1] else c.new_ones(c.shape[0], 1)
    # exact, and without torch.ldexp, which computes in float32 in PyTorch 2.4
    unit = (size / (2 * torch.frexp(size).mantissa)).clamp_min(torch.finfo(size.dtype).tiny)
    return torch.where((size > 0) & torch.isfinite(size), unit, 1.0)


def everywhere(mask: Tensor) -> bool:
    r"""Whether a mask is true for all samples. False on accelerators, where the answer would need a synchronisation."""
    return on_host(mask) and bool(mask.all())


def nowhere(mask: Tensor) -> bool:
    r"""Whether the host knows, without waiting for a device, that a mask is true for no sample."""
    return on_host(mask) and not bool(mask.any())


def where_rows(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Rows of ``a`` where ``mask`` is true, else of ``b``; one of the two itself where the host knows that it is the answer."""
    if on_host(mask):  # a selection takes six times as long as a copy
        if bool(mask.all()):
            return a
        if not bool(mask.any()):
            return b
    return torch.where(mask[:, None], a, b)


def only_rows(mask: Tensor, a: Tensor) -> Tensor:
    r"""Rows of ``a`` where ``mask`` is true, else zeros."""
    return a if everywhere(mask) else a.masked_fill(~mask[:, None], 0.0)


def powers_of_two(*tensors: Tensor, usual: bool = False) -> Tensor:
    r"""A power of two of the size of each sample, of shape ``(B,)``; smaller, so that divided samples are large, where there is room.

    :param torch.Tensor tensors: real or complex, with the batch in dimension 0; of other batch sizes, all samples get one unit.
    :param bool usual: whether samples whose largest entry is between 1/16 and 1024 get the unit 1.
    :return: the units; 1 for samples of zeros, NaN or Inf.
    """
    batch, joint = len(tensors[0]), any(len(t) != len(tensors[0]) for t in tensors)
    signed = [t.detach().to(torch.uint8) if t.dtype == torch.bool else t.detach() for t in tensors if t.numel()]
    flat = [t.abs().reshape(1 if joint else batch, -1) for t in signed]
    wide = [t if t.is_floating_point() else t.to(torch.get_default_dtype()) for t in flat]
    if not wide:
        return torch.ones(batch, device=tensors[0].device)
    room = min(_ROOM.get(t.dtype, 0) for t in wide)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in wide) else torch.float32
    sizes = torch.stack([t.amax(dim=1).to(dtype) for t in wide]).amax(dim=0)
    kept = ~torch.isfinite(sizes) | (sizes == 0) | ((sizes >= 2**-4) & (sizes <= 2**10) if usual else False)
    unit = torch.where(kept, 1.0, unit_size(sizes[:, None])[:, 0] / 2**room)
    return unit.clamp_min(2.0**-120).expand(batch)  # whose inverse is a number in single precision, too


# A larger factor loses digits of small cotangents in float32.
_ROOM = {torch.float32: 10, torch.float64: 30}


def times(unit: Tensor, x: Tensor) -> Tensor:
    r"""The samples of a tensor times a number each.

    :param torch.Tensor unit: numbers, of shape ``(B,)``; one and the same for all samples of a tensor of another batch size.
    :param torch.Tensor x: tensor with the batch in dimension 0.
    :return: a tensor of the shape of ``x``.
    """
    unit = unit if len(unit) == len(x) else unit[:1]
    dtype = x.real.dtype if x.is_complex() or x.is_floating_point() else torch.get_default_dtype()
    return x * unit.to(dtype).reshape(-1, *[1] * (x.ndim - 1))
