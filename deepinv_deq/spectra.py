r"""Norm and spectral radius of the part of a bound iteration that has to contract, by vector-Jacobian products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepinv_deq.autocast import Autocast
from deepinv_deq.states import Layout, State, as_tuple, orthogonalised

_NOISE = 0.3  # relative to a direction that is given
_PIVOT = 32.0  # roundings of a product: a direction that is shorter is noise


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
    part = _Part(f, x, exact=False)
    first = part.random(rng)
    if direction is not None:
        size = root_mean_square(direction)
        along = Layout(direction, batched=True).pack(direction) * torch.where(size > 0, 1 / size, 0.0)[:, None]
        image, others = first.split([along.shape[1], first.shape[1] - along.shape[1]], dim=1)
        first = torch.cat([along.to(first.dtype) + _NOISE * image, others], dim=1)
    basis, h = _arnoldi(part, first, iterations - 1)
    u = basis[:, 0]
    if iterations > 1:
        # if a value is not finite, the last product is not finite either, for any direction
        weights = torch.linalg.svd(torch.nan_to_num(h, 0.0, 0.0, 0.0), full_matrices=False).Vh[:, 0]
        with part.autocast.off():
            u = torch.bmm(weights[:, None].to(u.dtype), basis[:, : iterations - 1])[:, 0]
    pu = part.metric(u)
    norm = _length(u, pu)  # not exactly 1: in a small space the last directions of the basis are rounding errors
    with torch.enable_grad():
        b = part.product(pu, create_graph=True)
        pb = part.metric(b.detach())  # without a graph: the derivative of <b, Pb> is 2 <db, Pb>
        return _dot(b, pb).to(b.dtype) / _length(b.detach(), pb) / norm


def root_mean_square(x: Tensor) -> Tensor:
    r"""Root mean square of each image, of shape ``(B,)``.

    :param torch.Tensor x: images, of shape ``(B, C, H, W)``.
    """
    return x.abs().square().flatten(1).mean(dim=1).sqrt()


def spectrum_of_part(f: Any, state: State, products: int, *, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    r"""Spectral radius, norm and largest real part of an eigenvalue of the contractive part of a bound iteration, by Arnoldi's method.

    The norm is an estimate from below. The radius of a non-normal Jacobian can err either way.

    :param BoundIteration f: a map with a contractive part.
    :param torch.Tensor, tuple[torch.Tensor, ...] state: point.
    :param int products: number of vector-Jacobian products.
    :param bool batched: whether the samples are independent, or the batch is one joint sample.
    :return: radius, norm and largest real part for every sample, of shape ``(B,)``; of shape ``(1,)`` for a joint sample.
    """
    part = _Part(f, state, exact=True, batched=batched)
    start = part.random(torch.Generator().manual_seed(0))
    h = _arnoldi(part, start, products)[1]
    square = torch.nan_to_num(h[:, :products], nan=torch.inf, posinf=torch.finfo(h.dtype).max)
    eigenvalues = torch.linalg.eigvals(square)
    norm = torch.linalg.matrix_norm(square, 2)
    # directions that an exhausted space lacks have no eigenvalue
    idle = (square == 0).all(dim=1) & (square == 0).all(dim=2)
    moved = square - torch.diag_embed(idle * torch.linalg.matrix_norm(square, torch.inf)[:, None])
    rightmost = torch.nan_to_num(torch.linalg.eigvals(moved).real.amax(dim=1), nan=torch.inf)
    return eigenvalues.abs().amax(dim=1).to(start.dtype), norm.to(start.dtype), rightmost.to(start.dtype)


def _arnoldi(part: _Part, w: Tensor, products: int) -> tuple[Tensor, Tensor]:
    r"""Arnoldi's method for vector-Jacobian products, for every sample.

    The basis is orthonormal in the inner product :math:`\langle b, P b \rangle`, in which the Jacobian of a denoiser is nearly
    symmetric, so few products give its largest eigenvalues.

    :param torch.Tensor w: first direction, of shape ``(B, N)``.
    :param int products: number of vector-Jacobian products.
    :return: the basis, of shape ``(B, products + 1, N)``, and the Hessenberg matrix, of shape ``(B, products + 1, products)``.
    """
    basis = w.new_zeros(len(w), products + 1, w.shape[1])  # v_j
    dual = basis if part.preconditioner is None else torch.zeros_like(basis)  # P v_j
    h, eps = w.new_zeros(len(w), products + 1, products, dtype=torch.float64), torch.finfo(w.dtype).eps
    known = h[:, 0, 0]  # square of the length that the new direction has along the others
    for j in range(products + 1):
        pw = part.metric(w)
        square = _dot(w, pw)
        # what is left in a space that is exhausted is rounding, and not orthogonal to it
        length = torch.where(square > (_PIVOT * eps) ** 2 * known, square, 0.0).sqrt()
        scale = torch.where(length > 0, 1 / length, 0.0).to(w.dtype)[:, None]
        basis[:, j] = scale * w
        if dual is not basis:
            dual[:, j] = scale * pw
        if j:
            h[:, j, j - 1] = length
        if j == products:
            break
        w = part.product(dual[:, j])
        w, along = orthogonalised(w, basis[:, : j + 1], dual[:, : j + 1])
        if dual is not basis:
            # P by conjugate gradients is not symmetric to rounding: every pass then leaves a small part of what it removes
            w, rest = orthogonalised(w, basis[:, : j + 1], dual[:, : j + 1])
            along = along + rest
        h[:, : j + 1, j] = along
        known = along.square().sum(dim=1)
    return basis, h


class _Part:
    r"""The part of a map that must contract, at a point: products with its Jacobian, and :math:`P`, of directions ``(B, N)``.

    :param BoundIteration f: a map with a contractive part.
    :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
    :param bool exact: whether the exact :math:`P` is wanted, and not its estimate.
    :param bool batched: whether the samples are independent.

    The map and its products run under the caller's autocast. :math:`P` does not: it has to be linear and symmetric.
    """

    def __init__(self, f: Any, x: State, exact: bool, batched: bool = True):
        self.points = tuple(t.detach().requires_grad_() for t in as_tuple(x))
        state = self.points[0] if isinstance(x, Tensor) else self.points
        self._layout, self.autocast = Layout(state, batched=batched), Autocast(self.points[0].device.type)
        with torch.enable_grad():
            image, self.preconditioner = f.contractive_part(state, exact=exact)
        self._image = as_tuple(image)

    def pack(self, state: State) -> Tensor:
        r"""A state as directions."""
        return self._layout.pack(state)

    def metric(self, b: Tensor) -> Tensor:
        r"""The product with :math:`P`."""
        if self.preconditioner is None:
            return b
        with self.autocast.off():
            return self.pack(self.preconditioner(self._layout.unpack(b)))

    def product(self, b: Tensor, create_graph: bool = False) -> Tensor:
        r"""The vector-Jacobian product."""
        # F may ignore a variable of its state, as that of Douglas-Rachford splitting does
        cotangents = as_tuple(self._layout.unpack(b))
        out = torch.autograd.grad(
            self._image, self.points, cotangents, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return self.pack(out)

    def random(self, rng: torch.Generator) -> Tensor:
        r"""Directions of independent normal numbers."""
        kinds = (torch.complex128 if t.is_complex() else torch.float64 for t in self.points)
        drawn = [torch.randn(t.shape, generator=rng, dtype=d).to(t) for t, d in zip(self.points, kinds, strict=True)]
        return self.pack(tuple(drawn))


def _length(b: Tensor, pb: Tensor) -> Tensor:
    r"""The norm of :math:`P^{1/2} b`, never zero."""
    total = _dot(b, pb).to(b.dtype)
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).double().sum(dim=1)
