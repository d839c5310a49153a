r"""GMRES for affine fixed points, every sample its own Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepinv_deq._states import norms, residuals, result, unit_size, where_rows


def gmres(
    func: Any,
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    history: int = 30,
    sync_every: int = 1,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""GMRES (:footcite:t:`saad1986gmres`) for :math:`b = \ell(b) + c`, that is :math:`(I - \ell) b = c`.

    One evaluation of :math:`\ell` per step; no method that sees :math:`\ell` through products alone needs fewer. With an
    approximate inverse of :math:`I - \ell` (``func.precondition``) it is flexible GMRES
    (:footcite:t:`saad1993flexible`), which minimises the same residual.

    :param Callable func: an affine map of ``(B, N)`` matrices; an :class:`AffineMap` saves the evaluation at zero that
        would otherwise give :math:`c`.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations; for a map that is not an :class:`AffineMap`, one of them measures the
        residual of the answer.
    :param float tol: relative residual :math:`\|\ell(b) + c - b\| / \|\ell(b) + c\|` to reach.
    :param int history: number of basis vectors kept before a restart, which bounds the memory.
    :param int sync_every: number of steps after which the host looks whether all samples are done.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    affine = hasattr(func, "linear") and hasattr(func, "offset")
    zero_start = not bool(x0.any())
    evaluations = 0 if affine and zero_start else 1
    if affine:
        linear, image = func.linear, func.offset if zero_start else func(x0)
    else:
        offset = image = func(torch.zeros_like(x0))
        if not zero_start:
            image, evaluations = func(x0), 2
        unit = unit_size(offset)  # at the size of the offset, or the difference would be all rounding
        linear = lambda b: (func(unit * b) - offset) / unit  # noqa: E731
    x, inverse = x0, getattr(func, "precondition", None)
    size = norms(func.offset if affine else offset)
    absolute, relative = _relative(x, image, size)
    floor = torch.finfo(x.dtype).eps * norms(image)  # for a solution at zero, which has no relative accuracy
    traces = [absolute], [relative]
    active, nstep = torch.isfinite(absolute) & (relative > tol), torch.full_like(absolute, evaluations)
    check = 0 if affine else 1  # nobody says that this map is affine: its true residual is the only one to report

    while bool(active.any()) and evaluations + check < max_iter:
        cycle = min(history, max_iter - evaluations - check)
        tried = active
        x, absolute, relative, active, used, taken = _arnoldi_cycle(
            linear, inverse, x, image - x, absolute, relative, active, cycle, tol, floor, traces, sync_every, size
        )
        evaluations += taken
        nstep = nstep + used
        if affine and (evaluations >= max_iter or not bool(active.any())):
            break
        image, evaluations = func(x), evaluations + 1  # the true residual, from which the recurrence starts anew
        nstep = torch.where(tried, nstep + 1, nstep)
        absolute, relative = _relative(x, image, size)
        active = tried & torch.isfinite(absolute) & (relative > tol) & (absolute > floor)

    return result(x, absolute, relative, traces, nstep, (relative <= tol) | (absolute <= floor))


def _relative(x: Tensor, image: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    absolute, _ = residuals(x, image)
    return absolute, torch.where(absolute == 0, absolute, absolute / size)


def _arnoldi_cycle(
    linear: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    residual: Tensor,
    absolute: Tensor,
    relative: Tensor,
    active: Tensor,
    cycle: int,
    tol: float,
    floor: Tensor,
    traces: tuple[list[Tensor], list[Tensor]],
    sync_every: int,
    size: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    r"""One GMRES cycle from ``x``: at most ``cycle`` products, per sample the least residual over the Krylov space.

    :return: the point, its residuals by the recurrence, which samples want more, how many products each one used, and how
        many there were.
    """
    krylov = _Basis(min(cycle, 15) + 1, where_rows(active, residual / norms(residual)[:, None], torch.zeros_like(x)))
    problem = _LeastSquares(norms(residual).double(), cycle)
    weights, x_norm2 = x.new_zeros(len(x), cycle, dtype=torch.float64), norms(x).double() ** 2
    overlap = [(x * krylov.last).sum(dim=1).double()]  # <x, v_j>: with it the norm of the image needs no product
    gains = []  # <x, P v_j>
    used = torch.zeros_like(absolute)
    for j in range(cycle):
        direction = krylov.last if inverse is None else inverse(krylov.last)
        w = direction - linear(direction)
        finite = torch.isfinite(w).all(dim=1)
        w = where_rows(finite & active, w, torch.zeros_like(w))
        length, column = krylov.append(w)
        gains.append((x * direction).sum(dim=1).double() if krylov.extend(direction, inverse) else overlap[-1])
        overlap.append((x * krylov.last).sum(dim=1).double())

        y, rho = problem.append(column, length.double())
        step_abs = rho.norm(dim=1)
        # |x + step + remainder|, the norm of the image
        image_norm2 = x_norm2 + krylov.norm2(y, rho)
        image_norm2 = image_norm2 + 2 * (y * torch.stack(gains, 1)).sum(1) + 2 * (rho * torch.stack(overlap, 1)).sum(1)
        step_rel = torch.where(step_abs == 0, step_abs, step_abs / size)
        update = active & finite
        weights[:, : j + 1] = torch.where(update[:, None], y, weights[:, : j + 1])
        absolute = torch.where(update, step_abs.to(x.dtype), absolute)
        relative = torch.where(update, step_rel.to(x.dtype), relative)
        used = used + active
        # length 0: the space is exhausted, the answer exact
        active = update & (step_rel > tol) & (step_abs > floor) & (length > 0)
        traces[0].append(absolute)
        traces[1].append(relative)
        if (j + 1) % sync_every == 0 and not bool(active.any()):
            break
    return x + krylov.combine(weights), absolute, relative, active, used, len(gains)


class _Basis:
    r"""Orthonormal Krylov vectors ``V``, and the directions ``Z = P V`` that the solution is made of.

    Without a preconditioner the two are one. With it, both are kept (flexible GMRES), with what is needed of their products.
    """

    def __init__(self, size: int, first: Tensor):
        self.count, self.v = 1, first.new_zeros(first.shape[0], size, first.shape[1])
        self.v[:, 0] = first
        self.z: Tensor | None = None
        self.zz, self.zv = first.new_zeros(2, first.shape[0], size, size, dtype=torch.float64)

    @property
    def last(self) -> Tensor:
        return self.v[:, self.count - 1]

    def append(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r"""Take in a vector; returns its length beyond the others, and its components along them, ``(B, count)``."""
        known, column = self.v[:, : self.count], []
        for _ in range(2):  # once more: classical Gram-Schmidt loses orthogonality in single precision
            h = torch.bmm(known, w[:, :, None])
            w = torch.baddbmm(w[:, None], h.transpose(1, 2), known, alpha=-1)[:, 0]
            column.append(h[..., 0].double())
        length = norms(w)
        if self.count == self.v.shape[1]:  # grows, since few solves need all of their budget
            self.v = torch.cat([self.v, torch.zeros_like(self.v)], dim=1)
            self.zz, self.zv = (torch.nn.functional.pad(g, (0, self.count, 0, self.count)) for g in (self.zz, self.zv))
        self.v[:, self.count] = where_rows(length > 0, w / length[:, None], torch.zeros_like(w))
        self.count += 1
        return length, column[0] + column[1]

    def extend(self, direction: Tensor, inverse: Callable[[Tensor], Tensor] | None) -> bool:
        r"""Keep the direction of the vector before the last, if it is not that vector itself."""
        if inverse is None:
            return False
        if self.z is None or self.count - 1 > self.z.shape[1]:
            grown = torch.zeros_like(self.v)
            if self.z is not None:
                grown[:, : self.z.shape[1]] = self.z
            self.z = grown
        j = self.count - 2
        self.z[:, j] = direction
        row = torch.bmm(self.z[:, : j + 1], direction[:, :, None])[..., 0].double()
        self.zz[:, j, : j + 1], self.zz[:, : j + 1, j] = row, row
        self.zv[:, j, : j + 2] = torch.bmm(self.v[:, : j + 2], direction[:, :, None])[..., 0].double()
        self.zv[:, :j, j + 1] = torch.bmm(self.z[:, :j], self.last[:, :, None])[..., 0].double()
        return True

    def norm2(self, y: Tensor, rho: Tensor) -> Tensor:
        r"""Squared norm of ``Z y + V rho``."""
        if self.z is None:
            total = torch.nn.functional.pad(y, (0, 1)) + rho
            return total.square().sum(dim=1)
        j = y.shape[1]
        quadratic = torch.bmm(self.zz[:, :j, :j], y[:, :, None]) + 2 * torch.bmm(
            self.zv[:, :j, : j + 1], rho[:, :, None]
        )
        return (y * quadratic[..., 0]).sum(dim=1) + rho.square().sum(dim=1)

    def combine(self, weights: Tensor) -> Tensor:
        r"""The solution's part in the space: ``Z y``."""
        vectors, j = self.v if self.z is None else self.z, self.count - 1
        return torch.bmm(weights[:, None, :j].to(vectors.dtype), vectors[:, :j])[:, 0]


class _LeastSquares:
    r"""Least-squares weights ``y`` for :math:`\beta e_1 \approx H y`, per sample, while the Hessenberg matrix ``H`` grows.

    Keeps :math:`Q H = R` by one Givens rotation per column, so a step costs the same few small products at any size.
    """

    def __init__(self, beta: Tensor, columns: int):
        batch, n = beta.shape[0], columns + 1
        self.beta, self.size = beta, 0
        self.q = torch.eye(n, dtype=beta.dtype, device=beta.device).repeat(batch, 1, 1)
        self.r = beta.new_zeros(batch, n, columns)

    def append(self, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        r"""Add a column of ``H``: its entries down to the diagonal, ``(B, j)``, and the one below, ``(B,)``.

        :return: the weights, of shape ``(B, j)``, and the remainder :math:`\beta e_1 - H y`, of shape ``(B, j + 1)``.
        """
        self.size = j = self.size + 1
        q, r = self.q[:, : j + 1, : j + 1], self.r[:, :j, :j]
        rotated = torch.bmm(q[:, :, :j], above[:, :, None])[..., 0]
        a, b = rotated[:, j - 1], below  # the new row of Q is still that of the identity
        length = torch.hypot(a, b)
        # a column of zeros (a frozen sample, a singular map) reaches nothing: an infinite pivot gives it the weight zero,
        # and the swap of two rows hands what is left to reach to the next column
        c, s = torch.where(length > 0, a / length, 0.0), torch.where(length > 0, b / length, 1.0)
        upper, lower = q[:, j - 1].clone(), q[:, j].clone()
        q[:, j - 1] = c[:, None] * upper + s[:, None] * lower
        q[:, j] = c[:, None] * lower - s[:, None] * upper
        r[:, : j - 1, j - 1] = rotated[:, : j - 1]
        r[:, j - 1, j - 1] = torch.where(length > 0, length, torch.inf)
        rhs = self.beta[:, None] * q[:, :, 0]
        y = torch.linalg.solve_triangular(r, rhs[:, :j, None], upper=True)[..., 0].nan_to_num(0.0)
        return y, rhs[:, j, None] * q[:, j]  # what no column reaches: the last direction of Q
