r"""A fixed-point problem as solvers see it: a map of ``(B, N)`` matrices, counted, measured, and restricted to some samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.autocast import Autocast
from deepinv_deq.maps import AffineMap, Map
from deepinv_deq.solvers.evaluation import Evaluation, Linear, Rounding, epsilon, relative_to
from deepinv_deq.states import WORTH, Layout, finite_rows, norms, unit_size

_CANCELLED = 0.1  # Residuals below this many roundings are noise, because N amplifies cancellation.


class Problem:
    r"""Find :math:`x = F(x)` for each row of a matrix.

    The criterion is :math:`\|N (F(x) - x)\| / \|x\|` with ``f.natural`` as :math:`N`. For an :class:`AffineMap`
    :math:`b \mapsto \ell(b) + c` it is :math:`\|\ell(b) + c - b\| / \|c\|`; its rows are scaled to a constant of unit size, since
    the answer is linear in :math:`c`.

    :param Map f: the map of states.
    :param Layout layout: how states lie in matrices.
    :param torch.Tensor x: the first point, of shape ``(B, N)``.
    :param bool precondition: whether to use the preconditioner of ``f``.
    :param list[int], None count: numbers of evaluations, to be added to.
    :param Autocast, None autocast: setting in which ``f`` is evaluated; default: the setting in force.
    """

    def __init__(
        self,
        f: Map,
        layout: Layout,
        x: Tensor,
        precondition: bool,
        count: list[int] | None = None,
        autocast: Autocast | None = None,
    ):
        self._f, self._layout, self._precondition = f, layout, precondition
        self._count = [0, 0] if count is None else count
        self._autocast = Autocast(x.device.type) if autocast is None else autocast
        around = self._autocast.around
        self.affine = isinstance(f, AffineMap)
        self._steps = not self.affine and f.has_own_step  # the map has a better way to its residual than a difference
        # closures without self: a reference cycle would keep the graph that f holds alive until the garbage collector runs
        state = layout.unpack(x)
        offered = around(f.preconditioner)(state) if precondition else None
        self.precondition = _of_matrices(offered, layout, around)
        self.natural: Linear | None = None
        self.change: Linear | None = None  # of an affine map that knows it better than by a difference
        if isinstance(f, AffineMap):
            self.linear = _counting(around(f.linear), layout, self._count)
            if f.change is not None:
                self.change = _counting(around(f.change), layout, self._count)
            c = layout.pack(f.offset)
            self.lost = ~finite_rows(c)  # b = l(b) + NaN has the solution NaN
            c = c.masked_fill(self.lost[:, None], 0.0)
            self.unit = unit_size(c)
            self.offset = c / self.unit
            self.offset_norm = norms(self.offset)
        else:
            self._evaluate = _counting(around(f.step if self._steps else f), layout, self._count)
            units = offered if precondition and type(f).natural is Map.natural else around(f.natural)(state)
            same = precondition and (units is offered or (units == offered) is True)  # then it is applied once
            self.natural = self.precondition if same else _of_matrices(units, layout, around)
        self._cancels = self.natural is not None and not self._steps
        self._rounding: Rounding | None = None  # known from the first evaluation

    @property
    def evaluations(self) -> int:
        r"""Number of evaluations of the map."""
        return self._count[0]

    @property
    def samples(self) -> int:
        r"""Number of evaluations of single samples."""
        return self._count[1]

    @property
    def precision(self) -> torch.dtype:
        r"""The coarsest floating-point type that the map computes in."""
        return max(self.precision_of_state, self._autocast.dtype or self.precision_of_state, key=epsilon)

    @property
    def precision_of_state(self) -> torch.dtype:
        r"""The coarsest floating-point type of the state."""
        return max([t.real.dtype for t in self._layout.like], key=epsilon)

    def __call__(self, x: Tensor, tau: float = 1.0) -> Tensor:
        r"""The image of ``x``. TorchDEQ's plain iteration passes a damping factor ``tau``."""
        fx = self.image_and_step(x)[0]
        return fx.clone() if tau == 1.0 else tau * fx + (1 - tau) * x  # the map may return memory that it uses again

    def enter(self, x: Tensor) -> Tensor:
        r"""A point in the units that the problem is solved in."""
        return x / self.unit if self.affine else x

    def leave(self, x: Tensor, info: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        r"""The solution and its statistics, in the units of the map. NaN for samples whose constant is not finite."""
        info = dict.fromkeys(("singular", "coupled"), torch.zeros_like(info["converged"])) | info
        if self.affine:
            x = (x * self.unit).masked_fill(self.lost[:, None], torch.nan)
            info["abs_lowest"], info["abs_trace"] = info["abs_lowest"] * self.unit[:, 0], info["abs_trace"] * self.unit
            info["rel_lowest"] = info["rel_lowest"].masked_fill(self.lost, torch.inf)
            info["converged"] = info["converged"] & ~self.lost
        return x, info

    def image_and_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Evaluate the map once: the image of ``x``, and its difference to ``x``."""
        if self.change is not None:
            step = self.change(x) + self.offset
            return x + step, step
        if self.affine:
            image = self.linear(x) + self.offset
            return image, image - x
        out = self._evaluate(x)
        return (x + out, out) if self._steps else (out, out - x)

    def product(self, b: Tensor) -> Tensor:
        r"""The product :math:`(I - \ell) b` of an affine map."""
        return b - self.linear(b) if self.change is None else -self.change(b)

    def evaluate(self, x: Tensor, norm: Tensor | None = None) -> Evaluation:
        r"""Evaluate the map once, and measure the point, whose ``norm`` may be known."""
        now, change = self._measure(x, *self.image_and_step(x), norm)
        if self.precondition is not None:
            now.step = change if self.precondition is self.natural else self.precondition(now.step)
            now.image = x + now.step
        return now

    def measure(self, x: Tensor, image: Tensor, step: Tensor) -> Evaluation:
        r"""Measure a point whose image and whose residual ``step`` are known."""
        return self._measure(x, image, step)[0]

    def _measure(self, x: Tensor, image: Tensor, step: Tensor, norm: Tensor | None = None) -> tuple[Evaluation, Tensor]:
        change = step if self.natural is None else self.natural(step)
        size = norms(image)
        absolute = torch.add(norms(change), size, alpha=0.0)  # NaN where the image is not finite
        residual = absolute if change is step else norms(step)
        scale = self.offset_norm if self.affine else norms(x) if norm is None else norm
        scale = torch.where(scale > 0, scale, absolute)  # at x = 0 any step is a relative change of 1
        relative = relative_to(absolute, scale)
        if self._rounding is None:
            types = self.precision, self.precision_of_state
            self._rounding = Rounding.at(image, self.natural, relative if self._steps else None, *types)
        estimate: Callable[[], Tensor] = partial(self._rounding.estimate, relative, size, scale)
        now = Evaluation(image, step, absolute, relative, residual, size, scale, estimate)
        if self._autocast.dtype is not None or self._cancels:
            rounding = now.rounding  # now, since this notes the samples that autocast does not limit
            now.relative = torch.maximum(relative, _CANCELLED * rounding) if self._cancels else relative
        return now, change

    def subset(self, rows: Tensor, x: Tensor) -> Problem | None:
        r"""The problem of some samples, or ``None`` where that is not possible or not worth it; ``x`` is a point of all."""
        if self.affine or x.numel() < WORTH or self._layout.batch == 1:
            return None
        part = self._autocast.around(self._f.select)(rows)
        if part is None:
            return None
        problem = Problem(part, self._layout.select(rows), x[rows], self._precondition, self._count, self._autocast)
        problem._rounding = None if self._rounding is None else self._rounding.select(rows)
        return problem


def _of_matrices(linear: Callable[[Any], Any] | None, layout: Layout, around: Callable[[Any], Any]) -> Linear | None:
    if linear is None:
        return None
    inside = around(linear)
    return lambda r: layout.pack(inside(layout.unpack(r)))


def _counting(f: Callable[[Any], Any], layout: Layout, count: list[int]) -> Linear:
    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        count[1] += x.shape[0]
        return layout.pack(f(layout.unpack(x)))

    return counted
