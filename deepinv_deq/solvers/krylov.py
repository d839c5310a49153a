r"""One cycle of GMRES: a Krylov space per sample, and the least residual in it."""

from __future__ import annotations

import torch
from torch import Tensor

from deepinv_deq.solvers.problem import Evaluation, Linear, Problem
from deepinv_deq.solvers.progress import STALL
from deepinv_deq.states import everywhere, finite_rows, norms, only_rows, orthogonalised

_PIVOT = 8.0  # roundings of a product: a pivot below is noise
# Where the residual stops falling, the null space of a singular system makes ever larger solutions of it.
# Such a solution is accepted only if the residual falls by more than `_SIZE` times the norm of the solution.
_SIZE = 1e-3
_CONDITION = 1e4  # of a system whose residual stopped falling: such a map does not contract
LOST = 0.1  # relative residual of an affine map above which rounding is not what keeps it from its solution


class Cycle:
    r"""The Krylov space of the residual ``step`` at ``x``, which grows by one vector with every product.

    ``absolute`` and ``relative`` measure the solution found so far, by the recurrence; ``active`` marks the samples that want
    more products, ``used`` counts those they had. ``at_floor`` marks samples whose residual is below what rounding lets one
    know of it, ``singular`` those where the space is exhausted, or where the residual stopped falling while the solution grew.
    A large residual below its rounding means that the solution grew without an end, so the sample is singular, too.
    ``ill`` marks samples whose solution proves a large condition number.
    """

    def __init__(
        self, problem: Problem, product: Linear, x: Tensor, step: Tensor, now: Evaluation, active: Tensor, columns: int
    ):
        self._problem, self._product, self._x, self._floating = problem, product, x, torch.finfo(x.dtype)
        self._beta, self._start = norms(step), norms(x)
        first = only_rows(active, step / self._beta[:, None].to(x.dtype))
        self._basis = _Basis(min(columns, 15) + 1, first, problem.precondition is not None)
        self._least = _LeastSquares(self._beta, columns)
        self._weights = x.new_zeros(len(x), columns, dtype=torch.float64)
        self._rest = torch.nn.functional.pad(self._beta[:, None], (0, columns))
        scale = problem.offset_norm if problem.affine else self._beta
        scale = torch.where(scale > 0, scale, self._beta)  # of the residual of an affine map
        self._scale = torch.where(scale > 0, scale, 1.0)
        self._square, self._least_square = self._beta.square(), (0.01 * self._beta).square()
        # Norm of the linear system, seen from its products. The size includes the directions, from which products are differences.
        self._gain = self._size = torch.zeros_like(self._beta)
        self._cancels = problem.change is None  # a product is a difference to the direction
        self._lefts: list[Tensor] = []
        self.absolute, self.relative = now.absolute, now.relative
        self._worth = self._first = now.absolute
        self.active, self.used = active, torch.zeros_like(self._beta)
        self.at_floor, self.singular, self.ill = torch.zeros_like(active).repeat(3, 1)
        self._most = LOST if problem.affine else torch.inf

    @property
    def size(self) -> int:
        r"""Number of products so far."""
        return len(self._lefts)

    def advance(self, tol: float) -> None:
        r"""One more product, and the least residual over the space with it."""
        direction = (
            self._basis.last if self._problem.precondition is None else self._problem.precondition(self._basis.last)
        )
        w = self._product(direction)
        go = self.active & finite_rows(w)
        w = only_rows(go, w)
        size = norms(w)  # 0 where the sample does not go on
        largest = torch.maximum(size, torch.where(go, norms(direction), 0.0))
        self._gain, self._size = torch.maximum(self._gain, size), torch.maximum(self._size, largest)
        noise = self._floating.eps * (self._size if self._cancels else self._gain)  # rounding of a product
        pivot = _PIVOT * noise
        length, column = self._basis.append(w, direction, pivot)
        y, rho, left = self._least.append(column, length, pivot)
        grown = y.norm(dim=1)
        doubt = noise * (grown + self._start)  # rounding of the products with the solution
        absolute, scale = self._measure(left, y, rho)
        relative = absolute / scale
        at_floor = go & (left <= doubt) & (doubt > tol * scale)
        done = go & (relative <= tol) & ~at_floor
        claim = torch.hypot(absolute, doubt)
        worth = torch.hypot(claim, _SIZE * self._size * grown)
        known = torch.where(at_floor, claim, absolute), torch.where(at_floor, claim / scale, relative)
        self._latest = y, rho, *known, worth
        self._take(done | (go & (worth < self._worth)))
        self.used = self.used + self.active
        self._lefts.append(left)
        reached = (self._square - left.square()).clamp_min(self._least_square).sqrt()
        self.ill = self._gain * grown > _CONDITION * reached  # |A| |y| > 1e4 |A y|
        hopeless = length == 0
        if self.size > STALL:
            hopeless = hopeless | (self.stagnates() & (self._size * grown > _CONDITION * self._beta))
        lost = at_floor & (absolute > self._most * scale)  # the rounding of a solution that is as large as its residual
        self.at_floor = self.at_floor | (at_floor & ~lost)
        self.singular = self.singular | lost | (go & hopeless & ~done & ~at_floor)
        self.active = go & ~done & ~at_floor & ~self.singular

    def _take(self, rows: Tensor) -> None:
        y, rho, absolute, relative, worth = self._latest
        j = y.shape[1]
        if everywhere(rows):
            self._weights[:, :j], self._rest[:, : j + 1] = y, rho
            self.absolute, self.relative, self._worth = absolute, relative, worth
            return
        self._weights[:, :j] = torch.where(rows[:, None], y, self._weights[:, :j])
        self._rest[:, : j + 1] = torch.where(rows[:, None], rho, self._rest[:, : j + 1])
        self.absolute, self.relative = (
            torch.where(rows, absolute, self.absolute),
            torch.where(rows, relative, self.relative),
        )
        self._worth = torch.where(rows, worth, self._worth)

    def settle(self) -> None:
        r"""Take the last solution of the samples that want more products, if their residual fell by half and goes on falling."""
        left = self._latest[2]
        self._take(self.active & ~self.stagnates() & (left < torch.minimum(self.absolute, 0.5 * self._first)))

    def stagnates(self) -> Tensor:
        r"""Whether the last products brought the residual down by less than a hundredth."""
        if self.size <= STALL:
            return torch.zeros_like(self.active)
        return self._lefts[-1] > 0.99 * self._lefts[-1 - STALL]

    def crawls(self, ill: Tensor, earlier: int) -> Tensor:
        r"""Whether a residual is still large and has nearly stopped falling.

        :param torch.Tensor ill: samples of large condition numbers: for these, products that do not halve the residual are enough.
        :param int earlier: number of products of earlier cycles.
        """
        part = min(self.size / STALL, 1.0)
        fell = self._lefts[-1] / (self._beta if self.size <= STALL else self._lefts[-1 - STALL])
        least = torch.inf if self.size + earlier <= STALL else 0.95**part
        return (self.relative > self._most) & ((ill & (fell > 0.5)) | (fell > least))

    def solution(self) -> tuple[Tensor, Tensor]:
        r"""The point found, and its residual by the recurrence."""
        return self._x + self._basis.combine(self._weights[:, : self.size]), self._basis.residual(self._rest)

    def _measure(self, left: Tensor, y: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        r"""The residual in the units of the criterion, and what it is relative to."""
        if self._problem.affine:
            return left, self._scale
        point, step = self._x + self._basis.combine(y), self._basis.residual(rho)
        absolute = norms(step if self._problem.natural is None else self._problem.natural(step))
        scale = norms(point)
        scale = torch.where(scale > 0, scale, absolute)
        return absolute, torch.where(scale > 0, scale, 1.0)


class _Basis:
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
        length = torch.where(length > noise, length, 0.0)
        if self._count == self._v.shape[1]:  # grows, since few solves need all of their budget
            self._v, self._z = _doubled(self._v), None if self._z is None else _doubled(self._z)
        if self._z is not None:
            self._z[:, self._count - 1] = direction
        self._v[:, self._count] = only_rows(length > 0, w / length[:, None].to(w.dtype))
        self._count += 1
        return length, column

    def combine(self, y: Tensor) -> Tensor:
        r"""The solution's part in the space: ``Z y``."""
        return self._sum(self._v if self._z is None else self._z, y)

    def residual(self, rho: Tensor) -> Tensor:
        r"""What is left of the first residual: ``V rho``."""
        return self._sum(self._v, rho[:, : self._count])

    def _sum(self, vectors: Tensor, weights: Tensor) -> Tensor:
        return torch.bmm(weights[:, None].to(vectors.dtype), vectors[:, : weights.shape[1]])[:, 0]


def _doubled(vectors: Tensor) -> Tensor:
    r"""The same vectors, and as much room for further ones."""
    more = vectors.new_empty(vectors.shape[0], 2 * vectors.shape[1], vectors.shape[2])
    more[:, : vectors.shape[1]] = vectors
    return more


class _LeastSquares:
    r"""Least-squares weights ``y`` for :math:`\beta e_1 \approx H y`, per sample, while the Hessenberg matrix ``H`` grows.

    Keeps :math:`Q H = R` by one Givens rotation per column, so a step costs the same few small products at any size.
    """

    def __init__(self, beta: Tensor, columns: int):
        batch, n = beta.shape[0], columns + 1
        self.beta, self.size = beta, 0
        self.q = torch.eye(n, dtype=beta.dtype, device=beta.device).repeat(batch, 1, 1)
        self.r = beta.new_zeros(batch, n, columns)

    def append(self, above: Tensor, below: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Add a column of ``H``: its entries down to the diagonal, ``(B, j)``, and the one below, ``(B,)``.

        :return: the weights, of shape ``(B, j)``, what they leave, :math:`\beta e_1 - H y`, of shape ``(B, j + 1)``, and its norm.
        """
        self.size = j = self.size + 1
        q, r = self.q[:, : j + 1, : j + 1], self.r[:, :j, :j]
        rotated = torch.bmm(q[:, :, :j], above[:, :, None])[..., 0]
        a, b = rotated[:, j - 1], below  # the new row of Q is still that of the identity
        length = torch.hypot(a, b)
        # A column of noise (a frozen sample, a singular map) is not used. An infinite pivot sets the weight of this column to zero.
        # The row swap moves its part of the right-hand side to the next column.
        usable = length > noise
        c, s = torch.where(usable, a / length, 0.0), torch.where(usable, b / length, 1.0)
        rotation = torch.stack([c, s, -s, c], dim=1).view(-1, 2, 2)
        q[:, j - 1 :] = torch.bmm(rotation, q[:, j - 1 :])
        r[:, : j - 1, j - 1] = rotated[:, : j - 1]
        r[:, j - 1, j - 1] = torch.where(usable, length, torch.inf)
        rhs = self.beta[:, None] * q[:, :, 0]
        y = torch.linalg.solve_triangular(r, rhs[:, :j, None], upper=True)[..., 0].nan_to_num(0.0)
        return y, rhs[:, j, None] * q[:, j], rhs[:, j].abs()  # The residual lies along the last row of Q.
