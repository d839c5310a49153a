r"""The course of a solve: the quality of every point that was evaluated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepinv.loss.metric import PSNR
from torch import Tensor

from deepinv_deq.checks import check_ground_truth
from deepinv_deq.maps import Delegate, Map
from deepinv_deq.states import Rows, State


class Course(Delegate):
    r"""A map that records the PSNR of the points at which it is evaluated, and hands everything else on.

    The solver sees the preconditioner, the restriction to samples and the residual of the map itself, so the solve is the one
    without a record.

    :param Map f: the map.
    :param torch.Tensor, None x_gt: ground truth of shape ``(B, C, H, W)``; without it nothing is recorded.
    :param Callable output: the reconstruction in a state.
    """

    def __init__(self, f: Map, x_gt: Tensor | None, output: Callable[[State], Tensor]):
        super().__init__(f)
        self._x_gt, self._output = x_gt, output
        self._samples: list[list[float]] = [] if x_gt is None else [[] for _ in range(len(x_gt))]
        self._rows = torch.arange(len(self._samples))

    @property
    def records(self) -> bool:  # type: ignore[override]
        return self._x_gt is not None

    def __call__(self, x: State) -> State:
        self._record(x)
        return self._f(x)

    def step(self, x: State) -> State:
        self._record(x)
        return self._f.step(x)

    def select(self, rows: Rows) -> Map | None:
        part = self._f.select(rows)
        if part is None:
            return None
        course = Course(part, None, self._output)
        if self._x_gt is not None:
            course._x_gt, course._samples = self._x_gt[rows], self._samples
            course._rows = self._rows[rows.cpu() if isinstance(rows, Tensor) else rows]
        return course

    def metrics(self, trace: Tensor, batch: int) -> dict[str, list[list[float]]]:
        r"""What deepinv plots: one list per sample, one number per evaluation.

        :param torch.Tensor trace: relative residuals, one row per sample, or one for a batch that was solved as one joint sample.
        :param int batch: number of samples.
        :return: a dictionary with ``"residual"`` and, given ``x_gt``, ``"psnr"``. A sample that is done repeats its last value.
        """
        residuals = trace.expand(batch, -1).tolist()
        out = {"residual": residuals}
        if self._x_gt is not None:
            pairs = zip(self._samples, residuals, strict=True)
            out["psnr"] = [values + values[-1:] * (len(course) - len(values)) for values, course in pairs]
        return out

    def _record(self, x: State) -> None:
        if self._x_gt is None:
            return
        image = self._output(x)
        check_ground_truth(self._x_gt, image)
        values = PSNR()(image, self._x_gt).tolist()
        for row, value in zip(self._rows.tolist(), values, strict=True):
            self._samples[row].append(value)
