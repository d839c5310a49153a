r"""What one evaluation of a map says of a point, and how far rounding lets one believe it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deepinv_deq.autocast import FINER
from deepinv_deq.states import norms

Linear = Callable[[Tensor], Tensor]


@dataclass
class Evaluation:
    r"""What one evaluation says of a point; all but the first three have one number per sample, in double precision.

    ``image`` is :math:`F(x)`, ``step`` its difference to :math:`x`, and ``change`` is :math:`N (F(x) - x)`; :meth:`Problem.evaluate` puts in
    :math:`x + P (F(x) - x)`, which methods work with. ``absolute`` is the norm of the change, ``relative`` the criterion, ``residual`` is
    :math:`\|F(x) - x\|`, ``size`` is :math:`\|F(x)\|`, and ``scale`` what ``relative`` is relative to. Norms are Inf or NaN where the image
    is not finite.
    """

    image: Tensor
    step: Tensor
    change: Tensor
    absolute: Tensor
    relative: Tensor
    residual: Tensor
    size: Tensor
    scale: Tensor
    estimate: Callable[[Evaluation], Tensor]

    @cached_property
    def rounding(self) -> Tensor:
        r"""An estimate of what the rounding of :math:`F(x)` adds to ``relative``. Few evaluations need it."""
        return self.estimate(self)

    @property
    def plain(self) -> Tensor:
        r"""The residual relative to the image, :math:`\|F(x) - x\| / \|F(x)\|`."""
        return relative_to(self.residual, self.size)


def relative_to(a: Tensor, size: Tensor) -> Tensor:
    r"""Norms relative to others, in double precision; zero is zero, relative to anything."""
    return a / size.clamp_min(torch.finfo(size.dtype).tiny)


class Rounding:
    r"""An estimate of what the rounding of :math:`F(x)` adds to the relative residual, for each sample.

    :param Callable, None natural: the units of the residual, see :meth:`Map.natural <deepinv_deq.maps.Map.natural>`.
    :param bool steps: whether the map computes its residual without a difference that cancels digits.
    :param torch.dtype precision: the coarsest type that the map computes in.
    :param torch.dtype of_state: the coarsest type of the state.
    """

    def __init__(self, natural: Linear | None, steps: bool, precision: torch.dtype, of_state: torch.dtype):
        self._natural, self._steps, self._unit, self._least = natural, steps, unit(precision), unit(of_state)
        self._first: Tensor | None = None
        self._amplification: Tensor | None = None
        self._finer: Tensor | None = None  # samples that autocast does not limit: the map may switch it off

    def note(self, relative: Tensor) -> None:
        r"""Note the relative residual of the first point."""
        self._first = relative if self._first is None else self._first

    def __call__(self, now: Evaluation) -> Tensor:
        r"""The estimate for a point."""
        if self._amplification is None:
            self._amplification = _amplification(self._natural, now.image)
            if self._steps and self._first is not None:
                # without a difference that cancels digits, rounding is that of the terms of the step, of the size of the first one
                self._amplification = torch.minimum(self._amplification, self._first.clamp_min(1.0))
        rounding = self._unit * self._amplification * now.size / now.scale
        if self._unit == self._least:
            return rounding
        finer = now.relative < FINER * rounding
        self._finer = finer if self._finer is None else self._finer | finer
        return torch.where(self._finer, self._least / self._unit * rounding, rounding)

    def take(self, whole: Rounding, rows: Tensor) -> None:
        r"""Take what is known of some samples of a batch."""
        for name in ("_first", "_amplification", "_finer"):
            value = getattr(whole, name)
            setattr(self, name, None if value is None else value[rows])


def unit(dtype: torch.dtype) -> float:
    r"""The relative spacing of the numbers of a type."""
    return torch.finfo(dtype).eps


def _amplification(natural: Linear | None, image: Tensor) -> Tensor:
    r"""By how much the change of units enlarges noise, such as rounding, that has the size of the image everywhere."""
    one = torch.ones(image.shape[0], dtype=torch.float64, device=image.device)
    if natural is None or not image.shape[1]:
        return one
    n = torch.arange(image.shape[1], device=image.device, dtype=torch.float64)
    noise = image * torch.cos(0.7 * n * n).to(image.dtype)  # a chirp has a flat spectrum, and needs no generator
    gain = norms(natural(noise)) / norms(noise)
    return torch.where(torch.isfinite(gain), gain, one)
