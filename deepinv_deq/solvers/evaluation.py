r"""One evaluation of a map: image, residual, and an estimate of its rounding error."""

from __future__ import annotations

import copy
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
    r"""What one evaluation says of a point. ``image`` and ``step`` are states; all else has one number per sample, in double precision.

    ``image`` is :math:`F(x)`, and ``step`` its difference to :math:`x`. For methods, :meth:`Problem.evaluate` replaces the two by
    :math:`x + P (F(x) - x)` and :math:`P (F(x) - x)`. ``absolute`` is :math:`\|N (F(x) - x)\|`, ``relative`` the criterion, ``residual`` is
    :math:`\|F(x) - x\|`, ``size`` is :math:`\|F(x)\|`, and ``scale`` what ``relative`` is relative to. They are Inf or NaN where the image is
    not finite.
    """

    image: Tensor
    step: Tensor
    absolute: Tensor
    relative: Tensor
    residual: Tensor
    size: Tensor
    scale: Tensor
    estimate: Callable[[], Tensor]

    @cached_property
    def rounding(self) -> Tensor:
        r"""An estimate of what the rounding of :math:`F(x)` adds to ``relative``. Few evaluations need it."""
        return self.estimate()

    @property
    def plain(self) -> Tensor:
        r"""The residual relative to the image, :math:`\|F(x) - x\| / \|F(x)\|`."""
        return relative_to(self.residual, self.size)


def relative_to(a: Tensor, size: Tensor) -> Tensor:
    r"""Norms relative to others; zero is zero, relative to anything."""
    return torch.where(a == 0, a, a / size)


class Rounding:
    r"""Estimates of what the rounding of :math:`F(x)` adds to the relative residual, for each sample.

    :param torch.Tensor amplification: by how much rounding is larger in the residual than in the image.
    :param torch.dtype precision: the coarsest type that the map computes in.
    :param torch.dtype of_state: the coarsest type of the state.
    """

    def __init__(self, amplification: Tensor, precision: torch.dtype, of_state: torch.dtype):
        self._amplification, self._coarse, self._fine = amplification, epsilon(precision), epsilon(of_state)
        # samples that autocast does not limit: the map may switch it off
        self._finer = torch.zeros_like(amplification, dtype=torch.bool)

    @classmethod
    def at(cls, image: Tensor, natural: Linear | None, first: Tensor | None, *types: torch.dtype) -> Rounding:
        r"""From the first evaluation.

        :param torch.Tensor image: image of the first point.
        :param Callable, None natural: the units of the residual, see :meth:`Map.natural <deepinv_deq.maps.Map.natural>`.
        :param torch.Tensor, None first: relative residual of the first point, where the map computes residuals without a difference that
            cancels digits. Rounding is then that of the terms of the residual, which are of its size.
        :param torch.dtype types: types of the map and of the state.
        """
        gain = _amplification(natural, image)
        return cls(gain if first is None else torch.minimum(gain, first.clamp_min(1.0)), *types)

    def estimate(self, relative: Tensor, size: Tensor, scale: Tensor) -> Tensor:
        r"""The estimate for a point, from three measures of its :class:`Evaluation`."""
        rounding = self._coarse * self._amplification * size / scale
        if self._coarse == self._fine:
            return rounding
        self._finer = self._finer | (relative < FINER * rounding)
        return torch.where(self._finer, self._fine / self._coarse * rounding, rounding)

    def select(self, rows: Tensor) -> Rounding:
        r"""The same of some samples."""
        part = copy.copy(self)
        part._amplification, part._finer = self._amplification[rows], self._finer[rows]
        return part


def epsilon(dtype: torch.dtype) -> float:
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
