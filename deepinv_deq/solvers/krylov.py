r"""One cycle of GMRES: a Krylov space per sample, and the least residual in it.

The device extends the space, for which it needs no solution. The host finds the solutions, whenever it checks convergence. They are small systems of a
few numbers per sample: on an accelerator each operation would be a launch, and on a CPU NumPy's operations cost a fraction of PyTorch's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from deepinv_deq import compat
from deepinv_deq.solvers.arnoldi import Basis
from deepinv_deq.solvers.evaluation import Evaluation, Linear, epsilon
from deepinv_deq.solvers.hessenberg import PIVOT, Found, LeastSquares, Numbers
from deepinv_deq.solvers.problem import Problem
from deepinv_deq.solvers.progress import STALL
from deepinv_deq.states import norms, only_rows, read

# Where the residual stops falling, the null space of a singular system makes ever larger solutions of it.
# Such a solution is accepted only if the residual falls by more than `_SIZE` times the norm of the solution.
_SIZE = 1e-3
_CONDITION = 1e4  # of a system whose residual stopped falling: such a map does not contract
LOST = 0.1  # relative residual of an affine map above which rounding is not what keeps it from its solution


class HasTangent(RuntimeError):
    r"""Forward mode: a product has a tangent, which would be lost on the host."""


class Point(NamedTuple):
    r"""What the host knows of a point: its norm as ``size``, and measures of its :class:`Evaluation`."""

    absolute: Numbers
    relative: Numbers
    rounding: Numbers
    residual: Numbers
    scale: Numbers
    size: Numbers

    @classmethod
    def of(cls, now: Evaluation, x: Tensor) -> Point:
        r"""Read what was measured at ``x``, with one synchronisation."""
        return cls(*read(now.absolute, now.relative, now.rounding, now.residual, now.scale, norms(x)))


class Cycle:
    r"""The Krylov space of the residual ``step`` at ``x``, which grows by one vector with every product.

    :meth:`look` brings the rest up to date: ``absolute`` and ``relative`` measure the solution found so far, by the recurrence;
    ``active`` marks the samples that want more products, ``used`` counts those they had. ``at_floor`` marks samples whose residual is
    below what rounding lets one know of it, ``singular`` those where the space is exhausted, or where the residual stopped falling while
    the solution grew. A large residual below its rounding means that the solution grew without an end, so the sample is singular, too.
    ``ill`` marks samples whose solution proves a large condition number. ``courses`` holds the two measures after each product.
    """

    def __init__(
        self, problem: Problem, product: Linear, x: Tensor, step: Tensor, now: Point, active: Numbers, columns: int
    ):
        self._problem, self._product, self._x, self._epsilon = problem, product, x, epsilon(x.dtype)
        self._beta, self._start = now.residual, now.size
        beta = norms(step)
        first = step / beta[:, None].to(x.dtype)
        first = first if active.all() else only_rows(torch.as_tensor(active, device=x.device), first)
        self._basis = Basis(min(columns, 15) + 1, first, problem.precondition is not None)
        self._cancels = problem.change is None  # a product is a difference to the direction
        self._least = LeastSquares(self._beta, columns, self._epsilon, self._cancels)
        self._weights = np.zeros((len(x), columns))
        self._rest = np.pad(self._beta[:, None], ((0, 0), (0, columns)))
        self._scale = np.where(now.scale > 0, now.scale, 1.0)  # of the residuals of an affine map
        self._extent = torch.zeros_like(beta)  # what the noise is computed from, on the device
        self._unread: list[Tensor] = []
        self._lefts: list[Numbers] = []
        self.courses: list[tuple[Numbers, Numbers]] = []
        self.absolute, self.relative = now.absolute, now.relative
        self._worth = self._first = now.absolute
        self.active, self.used = active, np.zeros_like(self._beta)
        self.at_floor = self.singular = self.ill = np.zeros_like(active)
        self._most = LOST if problem.affine else np.inf

    @property
    def size(self) -> int:
        r"""Number of products of which the host knows."""
        return len(self._lefts)

    def advance(self) -> None:
        r"""One more product. The space grows by it, for samples that are done, too."""
        precondition, direction = self._problem.precondition, self._basis.last
        direction = direction if precondition is None else precondition(direction)
        w = self._product(direction)
        size = norms(w)  # Inf or NaN where an entry is
        reach = torch.ones_like(size) if precondition is None else norms(direction)
        w = only_rows(size < torch.inf, w)
        # as the host computes it from the same numbers
        self._extent = torch.maximum(self._extent, torch.maximum(size, reach) if self._cancels else size)
        length, column = self._basis.append(w, direction, PIVOT * self._epsilon * self._extent)
        self._unread.append(torch.cat([t[:, None] for t in (size, reach, length)] + [column], dim=1))

    def look(self, tol: float) -> None:
        r"""Find the least residuals over the space after each product since the last look, with one synchronisation; with two for a map
        that is not affine, whose criterion needs the points themselves."""
        if compat.forward_mode() and forward_ad.unpack_dual(self._unread[-1]).tangent is not None:
            raise HasTangent("Forward-mode derivatives do not go through the steps of GMRES.")
        tables, self._unread = read(*self._unread), []
        with np.errstate(all="ignore"):  # samples that are done may overflow
            found = [self._least.take(table) for table in tables]
        measures = self._measure(found)
        with np.errstate(all="ignore"):
            for each, (absolute, scale) in zip(found, measures, strict=True):
                self._judge(each, absolute, scale, tol)

    def _measure(self, found: list[Found]) -> list[tuple[Numbers, Numbers]]:
        r"""The residuals in the units of the criterion, and what they are relative to."""
        if self._problem.affine:
            return [(each.left, self._scale) for each in found]
        measures, weights = [], np.zeros((len(found), 2, *self._rest.shape))
        for each, (of_point, of_step) in zip(found, weights, strict=True):
            of_point[:, : each.y.shape[1]], of_step[:, : each.rho.shape[1]] = each.y, each.rho
        for of_point, of_step in torch.as_tensor(weights, device=self._x.device):
            point, step = self._x + self._basis.combine(of_point), self._basis.residual(of_step)
            measures += [norms(step if self._problem.natural is None else self._problem.natural(step)), norms(point)]
        numbers = read(*measures)
        pairs = [(a, np.where(b > 0, b, a)) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
        return [(absolute, np.where(scale > 0, scale, 1.0)) for absolute, scale in pairs]

    def _judge(self, found: Found, absolute: Numbers, scale: Numbers, tol: float) -> None:
        go, left = self.active & found.finite, found.left
        grown = np.sqrt((found.y * found.y).sum(axis=1))
        doubt = found.noise * (grown + self._start)  # rounding of the products with the solution
        relative = absolute / scale
        at_floor = go & (left <= doubt) & (doubt > tol * scale)
        done = go & (relative <= tol) & ~at_floor
        claim = np.hypot(absolute, doubt)
        worth = np.hypot(claim, _SIZE * found.size * grown)
        known = np.where(at_floor, claim, absolute), np.where(at_floor, claim / scale, relative)
        self._latest = found, *known, worth
        self._take(done | (go & (worth < self._worth)))
        self.used = self.used + self.active
        self._lefts.append(left)
        reached = np.sqrt(np.maximum(self._beta**2 - left**2, (0.01 * self._beta) ** 2))
        self.ill = np.where(go, found.gain * grown > _CONDITION * reached, self.ill)  # |A| |y| > 1e4 |A y|
        hopeless = found.length == 0
        if self.size > STALL:
            hopeless = hopeless | (self.stagnates() & (found.size * grown > _CONDITION * self._beta))
        lost = at_floor & (absolute > self._most * scale)  # the rounding of a solution that is as large as its residual
        self.at_floor = self.at_floor | (at_floor & ~lost)
        self.singular = self.singular | lost | (go & hopeless & ~done & ~at_floor)
        self.active = go & ~done & ~at_floor & ~self.singular
        self.courses.append((self.absolute, self.relative))

    def _take(self, rows: Numbers) -> None:
        if not rows.any():
            return
        found, absolute, relative, worth = self._latest
        j = found.y.shape[1]
        self._weights[rows, :j], self._rest[rows, : j + 1] = found.y[rows], found.rho[rows]
        self.absolute, self.relative, self._worth = (
            np.where(rows, new, old)
            for new, old in ((absolute, self.absolute), (relative, self.relative), (worth, self._worth))
        )

    def settle(self) -> None:
        r"""Take the last solution of the samples that want more products, if their residual fell by half and goes on falling."""
        absolute = self._latest[1]
        self._take(self.active & ~self.stagnates() & (absolute < np.minimum(self.absolute, 0.5 * self._first)))

    def stagnates(self) -> Numbers:
        r"""Whether the last products brought the residual down by less than a hundredth."""
        if self.size <= STALL:
            return np.zeros_like(self.active)
        return self._lefts[-1] > 0.99 * self._lefts[-1 - STALL]

    def crawls(self, ill: Numbers, earlier: int) -> Numbers:
        r"""Whether a residual is still large and has nearly stopped falling.

        :param numpy.ndarray ill: samples of large condition numbers: for these, products that do not halve the residual are enough.
        :param int earlier: number of products of earlier cycles.
        """
        part = min(self.size / STALL, 1.0)
        with np.errstate(all="ignore"):
            fell = self._lefts[-1] / (self._beta if self.size <= STALL else self._lefts[-1 - STALL])
        least = np.inf if self.size + earlier <= STALL else 0.95**part
        return (self.relative > self._most) & ((ill & (fell > 0.5)) | (fell > least))

    def solution(self) -> tuple[Tensor, Tensor]:
        r"""The point found, and its residual by the recurrence."""
        weights = np.stack([np.pad(self._weights, ((0, 0), (0, 1))), self._rest])
        of_point, of_step = torch.as_tensor(weights, device=self._x.device)
        return self._x + self._basis.combine(of_point), self._basis.residual(of_step)
