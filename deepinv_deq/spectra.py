r"""Norm and spectral radius of the part of a bound iteration that has to contract, by vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.states import State, as_tuple

Tensors = tuple[Tensor, ...]
_NOISE = 0.3  # relative to a direction that is given


def jacobian_norm(
    f: Any, x: State, *, iterations: int, rng: torch.Generator, direction: Tensor | None = None
) -> Tensor:
    r"""Estimate :math:`\|P^{1/2} J P^{1/2}\|` from below, for every sample.

    All products but the last build a Krylov subspace. The last product is that of the direction in this subspace that the
    Jacobian amplifies most. A power iteration with the same number of products overlooks single large eigenvalues of either sign.

    :param BoundIteration f: a map with a contractive part.
    :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
    :param int iterations: number of vector-Jacobian products.
    :param torch.Generator rng: random numbers of the first direction.
    :param torch.Tensor, None direction: an image in whose direction the Jacobian may be large; some noise is added to it.
        Default: noise alone.
    :return: norms, of shape ``(B,)``, with the graph of the last product.
    """
    points, image, metric = _part(f, x, exact=False)
    first = _directions(points, rng)
    if direction is not None:
        size = direction.abs().square().flatten(1).mean(dim=1).sqrt()
        unit = _rows(torch.where(size > 0, 1 / size, 0.0), direction) * direction
        first = (unit + _NOISE * first[0], *first[1:])
    basis, h = _arnoldi(points, image, metric, first, iterations - 1)
    u = basis[0]
    if iterations > 1:
        # if a value is not finite, the last product is not finite either, for any direction
        weights = torch.linalg.svd(torch.nan_to_num(h, 0.0, 0.0, 0.0), full_matrices=False).Vh[:, 0].T
        u = tuple(
            torch.stack([_rows(c, t) * t for c, t in zip(weights, ts, strict=False)]).sum(0)
            for ts in zip(*basis, strict=True)
        )
    pu = metric(u)
    norm = _length(u, pu)  # not exactly 1: in a small space the last directions of the basis are rounding errors
    with torch.enable_grad():
        # F may ignore a variable of its state, as that of Douglas-Rachford splitting does
        b = torch.autograd.grad(image, points, pu, create_graph=True, materialize_grads=True)
        return _length(b, metric(b)) / norm


def spectrum_of_part(f: Any, state: State, products: int) -> tuple[Tensor, Tensor]:
    r"""Spectral radius and norm of the contractive part of a bound iteration, by Arnoldi's method for every sample.

    Eigenvalues of the projected matrix lie inside the numerical range: both numbers are estimates from below.

    :param BoundIteration f: a map with a contractive part.
    :param torch.Tensor, tuple[torch.Tensor, ...] state: point.
    :param int products: number of vector-Jacobian products.
    :return: spectral radius and norm, of shape ``(B,)``.
    """
    points, image, metric = _part(f, state, exact=True)
    start = _directions(points, torch.Generator().manual_seed(0))
    h = _arnoldi(points, image, metric, start, products)[1]
    square = torch.nan_to_num(h[:, :products], nan=torch.inf, posinf=torch.finfo(h.dtype).max)
    radius = torch.linalg.eigvals(square).abs().amax(dim=1)
    return radius.to(points[0].real.dtype), torch.linalg.matrix_norm(square, 2).to(points[0].real.dtype)


def _arnoldi(
    points: Tensors, image: Tensors, metric: Callable[[Tensors], Tensors], w: Tensors, products: int
) -> tuple[list[Tensors], Tensor]:
    r"""Arnoldi's method for vector-Jacobian products, for every sample.

    The basis is orthonormal in the inner product :math:`\langle b, P b \rangle`, in which the Jacobian of a denoiser is nearly
    symmetric, so few products give its largest eigenvalues.

    :param tuple[torch.Tensor, ...] w: first direction.
    :param int products: number of vector-Jacobian products.
    :return: the basis of ``products + 1`` directions, and the Hessenberg matrix of shape ``(B, products + 1, products)``.
    """
    basis: list[Tensors] = []  # v_j
    dual: list[Tensors] = []  # P v_j
    h = torch.zeros(len(points[0]), products + 1, products, dtype=torch.float64, device=points[0].device)
    for j in range(products + 1):
        pw = metric(w)
        length = _dot(w, pw).clamp_min(0).sqrt()
        scale = torch.where(length > 0, 1 / length, 0.0)
        basis.append(tuple(_rows(scale, t) * t for t in w))
        dual.append(tuple(_rows(scale, t) * t for t in pw))
        if j:
            h[:, j, j - 1] = length
        if j == products:
            break
        w = torch.autograd.grad(image, points, dual[-1], retain_graph=True, materialize_grads=True)
        for _ in range(2):  # once more, against rounding
            for i, (v, pv) in enumerate(zip(basis, dual, strict=True)):
                c = _dot(w, pv)
                h[:, i, j] += c
                w = tuple(t - _rows(c, t) * u for t, u in zip(w, v, strict=True))
    return basis, h


def _part(f: Any, x: State, exact: bool) -> tuple[Tensors, Tensors, Callable[[Tensors], Tensors]]:
    r"""The point as leaves, the image of the contractive part with its graph, and :math:`P`."""
    points, single = tuple(t.detach().requires_grad_() for t in as_tuple(x)), isinstance(x, Tensor)
    with torch.enable_grad():
        image, metric = f.contractive_part(points[0] if single else points, exact=exact)
    apply = (lambda b: b) if metric is None else lambda b: as_tuple(metric(b[0] if single else b))
    return points, as_tuple(image), apply


def _directions(points: Tensors, rng: torch.Generator) -> Tensors:
    return tuple(torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t) for t in points)


def _length(b: tuple[Tensor, ...], pb: tuple[Tensor, ...]) -> Tensor:
    r"""The norm of :math:`P^{1/2} b`, never zero."""
    total = _dot(b, pb).to(b[0].real.dtype)
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()


def _dot(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(s.conj() * t).real.flatten(1).double().sum(dim=1) for s, t in zip(a, b, strict=True)]).sum(0)


def _rows(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(like.real.dtype).reshape(-1, *[1] * (like.ndim - 1))
