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
    history: int | None = None,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""GMRES (:footcite:t:`saad1986gmres`) for :math:`b = \ell(b) + c`, that is :math:`(I - \ell) b = c`.

    One evaluation of :math:`\ell` per step; no method that sees :math:`\ell` through products alone needs fewer.

    :param Callable func: an affine map of ``(B, N)`` matrices; an :class:`AffineMap` saves the evaluation at zero that
        would otherwise give :math:`c`.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations; for a map that is not an :class:`AffineMap`, one of them measures the
        residual of the answer.
    :param float tol: relative residual :math:`\|\ell(b) + c - b\| / \|\ell(b) + c\|` to reach.
    :param int, None history: number of basis vectors kept before a restart; ``None`` never restarts.
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
    x = x0
    absolute, relative = residuals(x, image)
    floor = torch.finfo(x.dtype).eps * norms(image)  # for a solution at zero, which has no relative accuracy
    traces = [absolute], [relative]
    active, nstep = torch.isfinite(absolute) & (relative > tol), torch.full_like(absolute, evaluations)
    check = 0 if affine else 1  # nobody says that this map is affine: its true residual is the only one to report

    while bool(active.any()) and evaluations + check < max_iter:
        cycle = min(history or max_iter, max_iter - evaluations - check)
        tried = active
        x, absolute, relative, active, used = _arnoldi_cycle(
            linear, x, image - x, absolute, relative, active, cycle, tol, floor, traces
        )
        evaluations += int(used.max())
        nstep = nstep + used
        if affine and (evaluations >= max_iter or not bool(active.any())):
            break
        image, evaluations = func(x), evaluations + 1  # the true residual, from which the recurrence starts anew
        nstep = torch.where(tried, nstep + 1, nstep)
        absolute, relative = residuals(x, image)
        active = tried & torch.isfinite(absolute) & (relative > tol) & (absolute > floor)

    return result(x, absolute, relative, traces, nstep, (relative <= tol) | (absolute <= floor))


def _arnoldi_cycle(
    linear: Callable[[Tensor], Tensor],
    x: Tensor,
    residual: Tensor,
    absolute: Tensor,
    relative: Tensor,
    active: Tensor,
    cycle: int,
    tol: float,
    floor: Tensor,
    traces: tuple[list[Tensor], list[Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""One GMRES cycle from ``x``: at most ``cycle`` products, per sample the least residual over the Krylov space.

    :return: the point, its residuals by the recurrence, which samples want more, and how many products each one took.
    """
    batch, size = x.shape
    beta = norms(residual).double()
    basis = x.new_zeros(batch, min(cycle, 15) + 1, size)  # grows, since few solves need all of their budget
    basis[:, 0] = where_rows(active, residual / norms(residual)[:, None], torch.zeros_like(x))
    overlap = [(x * basis[:, 0]).sum(dim=1).double()]  # <x, v_j>: with it the norm of the image needs no product
    hessenberg = x.new_zeros(batch, cycle + 1, cycle, dtype=torch.float64)
    weights, x_norm2 = x.new_zeros(batch, cycle, dtype=torch.float64), norms(x).double() ** 2
    used = torch.zeros_like(absolute)
    for j in range(cycle):
        known = basis[:, : j + 1]
        w = basis[:, j] - linear(basis[:, j])
        finite = torch.isfinite(w).all(dim=1)
        w = where_rows(finite & active, w, torch.zeros_like(w))
        for _ in range(2):  # once more: classical Gram-Schmidt loses orthogonality in single precision
            h = torch.bmm(known, w[:, :, None])
            w = w - torch.bmm(h.transpose(1, 2), known)[:, 0]
            hessenberg[:, : j + 1, j] += h[..., 0].double()
        length = norms(w)
        hessenberg[:, j + 1, j] = length.double()
        if j + 1 == basis.shape[1]:
            basis = torch.cat([basis, torch.zeros_like(basis)], dim=1)
        basis[:, j + 1] = where_rows(length > 0, w / length[:, None], torch.zeros_like(w))
        overlap.append((x * basis[:, j + 1]).sum(dim=1).double())

        y, rho = _least_squares(hessenberg[:, : j + 2, : j + 1], beta)
        image = torch.cat([y, y.new_zeros(batch, 1)], dim=1) + rho
        image_norm2 = x_norm2 + 2 * (image * torch.stack(overlap, dim=1)).sum(dim=1) + (image * image).sum(dim=1)
        step_abs = rho.norm(dim=1)
        step_rel = torch.where(step_abs == 0, step_abs, step_abs / image_norm2.clamp_min(0).sqrt())
        update = active & finite
        weights[:, : j + 1] = torch.where(update[:, None], y, weights[:, : j + 1])
        absolute = torch.where(update, step_abs.to(x.dtype), absolute)
        relative = torch.where(update, step_rel.to(x.dtype), relative)
        used = used + active
        # length 0: the space is exhausted, the answer exact
        active = update & (step_rel > tol) & (step_abs > floor) & (length > 0)
        traces[0].append(absolute)
        traces[1].append(relative)
        if not bool(active.any()):
            break
    taken = len(overlap) - 1
    step = torch.bmm(weights[:, None, :taken].to(x.dtype), basis[:, :taken])[:, 0]
    return x + step, absolute, relative, active, used


def _least_squares(hessenberg: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    r"""Least-squares weights ``y`` for :math:`\beta e_1 \approx H y`, and the remainder :math:`\beta e_1 - H y`."""
    rhs = hessenberg.new_zeros(hessenberg.shape[0], hessenberg.shape[1], 1)
    rhs[:, 0, 0] = beta
    q, r = torch.linalg.qr(hessenberg)
    # a frozen sample has zero columns: an infinite pivot gives it the weight zero
    pivot = torch.diagonal(r, dim1=1, dim2=2)
    pivot.masked_fill_(pivot == 0, torch.inf)
    y = torch.linalg.solve_triangular(r, q.transpose(1, 2) @ rhs, upper=True).nan_to_num(0.0)
    return y[..., 0], (rhs - hessenberg @ y)[..., 0]
