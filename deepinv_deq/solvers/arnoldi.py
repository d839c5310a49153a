r"""The Krylov space of each sample, on its device."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_deq.states import norms, only_rows, orthogonalised


class Basis:
    r"""Orthonormal Krylov vectors ``V``, and the directions ``Z = P V`` that the solution is made of.

    Without a preconditioner the two are one. With it, both are kept (flexible GMRES).
    """

    def __init__(self, size: int, first: Tensor, preconditioned: bool):
        self._count, self._v = 1, first.new_empty(first.shape[0], size, first.shape[1])
        self._v[:, 0] = first
        self._z = torch.empty_like(self._v) if preconditioned else None

    @property
    def last(self) -> Tensor:
        r"""The newest vector."""
        return self._v[:, self._count - 1]

    def append(self, w: Tensor, direction: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""Take in the product ``w`` with a direction.

        :return: the length of ``w`` beyond the others, 0 where that is less than ``noise``, and its components along them,
            of shape ``(B, count)``.
        """
        known = self._v[:, : self._count]
        w, column = orthogonalised(w, known, known)
        length = norms(w)
        usable = length > noise
        if self._count == self._v.shape[1]:  # grows, since few solves need all of their budget
            self._v, self._z = _doubled(self._v), None if self._z is None else _doubled(self._z)
        if self._z is not None:
            self._z[:, self._count - 1] = direction
        self._v[:, self._count] = only_rows(usable, w / length[:, None].to(w.dtype))
        self._count += 1
        return torch.where(usable, length, 0.0), column

    def combine(self, y: Tensor) -> Tensor:
        r"""The solution's part in the space: ``Z y``, where ``y`` may have further zeros."""
        return _sum(self._v if self._z is None else self._z, y, self._count - 1)

    def residual(self, rho: Tensor) -> Tensor:
        r"""What is left of the first residual: ``V rho``, where ``rho`` may have further zeros."""
        return _sum(self._v, rho, self._count)


def _sum(vectors: Tensor, weights: Tensor, count: int) -> Tensor:
    return torch.bmm(weights[:, None, :count].to(vectors.dtype), vectors[:, :count])[:, 0]


def _doubled(vectors: Tensor) -> Tensor:
    r"""The same vectors, and as much room for further ones."""
    more = vectors.new_empty(vectors.shape[0], 2 * vectors.shape[1], vectors.shape[2])
    more[:, : vectors.shape[1]] = vectors
    return more
