r"""Whether a map is still that of the forward pass when its gradient is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.solvers import SolverStat
from deepinv_deq.states import Layout, Rows, State, norms

_LARGER = 10.0  # A residual beyond this multiple of that of the forward pass is not rounding.
# Chunks, memory formats and convolution algorithms of accelerators change the rounding of an evaluation.
_ROUNDINGS, _COARSE = 1000.0, 0.1

CHANGED = (
    "The iteration has changed since the forward pass: {what}. Its gradient would be that of another map. Something that it reads was "
    "changed before the backward pass, and no copy was possible, such as a global variable, what a method of a class refers to, what init or constants "
    "stored on the iteration or the physics, or a weight changed by a fused optimiser. Or it is not deterministic, or a part of it starts from its last result, as deepinv's TVPrior does. Call backward() before such changes, or make the value an attribute of the module that reads it."
)

IN_PLACE = (
    "A tensor{which} was changed in place between forward and backward: a tensor of the physics, a weight, a buffer, the measurements or the fixed point. "
    "The gradient would be that of another map. Replace a tensor of the physics instead of changing it (physics.update(...) does), step "
    "optimisers after backward, and clone measurements whose memory is used again."
)


@dataclass(frozen=True)
class Reached:
    r"""What the forward solve measured at the point that it returned.

    :param torch.Tensor residual: :math:`\|F(x) - x\| / \|F(x)\|` of each sample.
    :param torch.dtype precision: the coarsest type that :math:`F` computes in.
    """

    residual: Tensor
    precision: torch.dtype

    @classmethod
    def of(cls, stat: SolverStat) -> Reached:
        r"""What a solve measured.

        Samples that stopped at different evaluations, or missed the tolerance, were measured beside other points of the rest of the batch.
        If the map couples samples, as batch norm does, their residuals are others when all are at their best points.
        """
        residual = stat["plain_residual"]
        largest = _LARGER * residual.amax() if residual.numel() else residual.sum()
        together = stat.converged.all() & (stat["nstep"] == stat["nstep"][:1]).all()
        return cls(torch.where(together, residual, largest), stat["precision"])

    def select(self, rows: Rows | None) -> Reached:
        r"""The same for some samples."""
        return self if rows is None else Reached(self.residual[rows], self.precision)

    @torch.no_grad()
    def check(self, x: State, image: State, steps: bool) -> None:
        r"""Compare the residual of the forward pass with that of an evaluation at the same point.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: the point.
        :param torch.Tensor, tuple[torch.Tensor, ...] image: its image.
        :param bool steps: whether ``image`` is :math:`F(x) - x` instead.
        :raises RuntimeError: if the residual is much larger.
        """
        layout = Layout(x, batched=len(self.residual) != 1)  # one residual: the whole batch was solved as one sample
        point, out = layout.pack(x), layout.pack(image)
        step, size = (out, norms(point + out)) if steps else (out - point, norms(out))
        now, before = norms(step) / size, self.residual.double()
        same = (
            (now <= _LARGER * before + _rounding(self.precision, point.device)) | (size == 0) | ~torch.isfinite(before)
        )
        if not bool(same.all()):
            worst = int(torch.where(same, 0.0, now.nan_to_num(torch.inf)).argmax())
            what = f"at the fixed point its relative residual was {before[worst]:.1e} then, and is {now[worst]:.1e} now"
            raise RuntimeError(CHANGED.format(what=what))


@torch.no_grad()
def refuse_other_image(before: State, image: State, batched: bool) -> None:
    r"""Compare two images of one point under a map.

    :param torch.Tensor, tuple[torch.Tensor, ...] before: image in the forward pass.
    :param torch.Tensor, tuple[torch.Tensor, ...] image: image in the backward pass.
    :param bool batched: whether dimension 0 is the batch.
    :raises RuntimeError: if they differ by more than rounding.
    """
    layout = Layout(before, batched)
    old, new = layout.pack(before), layout.pack(image)
    tensors = (before,) if isinstance(before, Tensor) else before
    rounding = max(_rounding(t.real.dtype, old.device) for t in tensors)
    difference, size = norms(new - old), norms(old)
    same = (difference <= rounding * size) | ~torch.isfinite(size)
    if not bool(same.all()):
        worst = (difference / size).nan_to_num(torch.inf).max().item()
        raise RuntimeError(
            CHANGED.format(what=f"at the fixed point its image has changed by {worst:.1e} relative to its size")
        )


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    r"""The largest relative difference of two evaluations of one map at one point."""
    return min(_ROUNDINGS * compat.unit_roundoff(dtype, device), _COARSE)
