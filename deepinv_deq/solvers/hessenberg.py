r"""Least squares with the Hessenberg matrices of Krylov spaces, on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Numbers = np.ndarray  # in double precision; dimension 0 is the batch
PIVOT = 8.0  # roundings of a product: a pivot below is noise


class Found(NamedTuple):
    r"""The least residual over the space after one product. ``gain`` and ``size`` are the largest norms so far, of products and of
    all, ``noise`` the rounding of a product. ``y``, ``rho`` and ``left`` are those of :class:`LeastSquares`."""

    finite: Numbers
    length: Numbers
    gain: Numbers
    size: Numbers
    noise: Numbers
    y: Numbers
    rho: Numbers
    left: Numbers


class LeastSquares:
    r"""Least-squares weights ``y`` for :math:`\beta e_1 \approx H y`, per sample, while the Hessenberg matrix ``H`` grows.

    Keeps :math:`Q` and :math:`R^{-1}` of :math:`Q H = R`. One Givens rotation per column makes them.
    """

    def __init__(self, beta: Numbers, columns: int, epsilon: float, cancels: bool):
        self._epsilon, self._cancels = epsilon, cancels
        # Norm of the linear system, seen from its products. The size includes the directions, from which products are differences.
        self._gain = self._size = np.zeros_like(beta)
        batch, n = beta.shape[0], columns + 1
        self.beta, self.size = beta, 0
        self.q = np.tile(np.eye(n), (batch, 1, 1))
        self.inverse = np.zeros((batch, columns, columns))

    def take(self, table: Numbers) -> Found:
        r"""Take in a product.

        :param numpy.ndarray table: norm of the product, norm of its direction, length beyond the space, and components along the space,
            of shape ``(B, 3 + j)``.
        :return: the least residual over the space with it.
        """
        size, reach, length = table[:, :3].T
        finite = size < np.inf
        self._gain = np.maximum(self._gain, np.where(finite, size, 0.0))
        self._size = np.maximum(self._size, np.where(finite, np.maximum(size, reach), 0.0))
        noise = self._epsilon * (self._size if self._cancels else self._gain)  # rounding of a product
        return Found(finite, length, self._gain, self._size, noise, *self._append(table[:, 3:], length, PIVOT * noise))

    def _append(self, above: Numbers, below: Numbers, noise: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        r"""Add a column of ``H``: its entries down to the diagonal, ``(B, j)``, and the one below, ``(B,)``.

        :return: the weights, of shape ``(B, j)``, what they leave, :math:`\beta e_1 - H y`, of shape ``(B, j + 1)``, and its norm.
        """
        self.size = j = self.size + 1
        q, inverse = self.q[:, : j + 1, : j + 1], self.inverse[:, :j, :j]
        rotated = (q[:, :j, :j] @ above[:, :, None])[..., 0]
        a, b = rotated[:, j - 1], below  # the new row of Q is still that of the identity
        length = np.hypot(a, b)
        # A column of noise (a singular map, a sample that is done) is not used: that of the inverse is zero, and so is its weight.
        # The row swap moves its part of the right-hand side to the next column.
        usable = length > noise
        c, s = np.where(usable, a / length, 0.0)[:, None], np.where(usable, b / length, 1.0)[:, None]
        q[:, j - 1], q[:, j] = c * q[:, j - 1] + s * q[:, j], c * q[:, j] - s * q[:, j - 1]
        column = np.where(usable, 1 / length, 0.0)
        inverse[:, : j - 1, j - 1] = (
            -(inverse[:, : j - 1, : j - 1] @ rotated[:, : j - 1, None])[..., 0] * column[:, None]
        )
        inverse[:, j - 1, j - 1] = column
        rhs = self.beta[:, None] * q[:, :, 0]
        y = (inverse @ rhs[:, :j, None])[..., 0]
        return y, rhs[:, j, None] * q[:, j], np.abs(rhs[:, j])  # The residual lies along the last row of Q.
