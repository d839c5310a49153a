r"""A certificate of a fixed point: whether it contracts, how far it is, and whether other starts lead to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepinv.loss.metric import PSNR
from torch import Tensor, nn

from deepinv_deq import compat
from deepinv_deq.checks import own_start
from deepinv_deq.iterations import FixedPointIteration
from deepinv_deq.solvers import Solver
from deepinv_deq.spectra import spectrum_of_part
from deepinv_deq.states import State, norms

_LONGER = 3  # times max_iter, for solves from other starts and to smaller tolerances
_SPREAD = 3.0  # two solves may differ by the sum of their errors, and the estimate is good to a small factor


@dataclass(frozen=True)
class Certificate:
    r"""What :meth:`DEQReconstructor.certify` measured, one number per sample: tensors of shape ``(B,)`` unless stated.

    :param torch.Tensor x: the reconstruction, of shape ``(B, C, H, W)``.
    :param torch.Tensor spectral_radius: largest modulus of an eigenvalue of the Jacobian that has to contract, at ``x``. Below 1 the
        fixed point is locally unique and the adjoint equation well-posed.
    :param torch.Tensor norm: norm of the same Jacobian from below, in the norm of the preconditioner.
    :param torch.Tensor residual: the solver's criterion at ``x``.
    :param torch.Tensor converged: whether ``residual`` met the tolerance.
    :param torch.Tensor error: estimate of :math:`\|x - x^*\| / \|x^*\|`, the distance to the fixed point.
    :param torch.Tensor evaluations: number of evaluations of the iteration that ``x`` took.
    :param float tol: the tolerance.
    :param dict points: images of shape ``(B, C, H, W)``: ``x`` (``"start"``), the image at a tenth of the tolerance (``"tenth"``), and
        those reached from the other starts.
    :param dict spread: for each other start, :math:`\|x' - x\| / \|x\|` of the point reached from there.
    :param dict psnr: with ``x_gt``, PSNR in dB of each of ``points``.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Inpainting
    >>> from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
    >>> model = DEQReconstructor(DEProx(EquilibriumUNet(channels=(4, 8)), stepsize=0.5)).eval()
    >>> physics = Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8).tril())
    >>> certificate = model.certify(physics(torch.ones(1, 1, 8, 8)), physics)
    >>> round(certificate.spectral_radius.item(), 2), certificate.unique.tolist()
    (0.9, [True])
    """

    x: Tensor
    spectral_radius: Tensor
    norm: Tensor
    residual: Tensor
    converged: Tensor
    error: Tensor
    evaluations: Tensor
    tol: float
    points: dict[str, Tensor] = field(default_factory=dict, repr=False)
    spread: dict[str, Tensor] = field(default_factory=dict)
    psnr: dict[str, Tensor] = field(default_factory=dict)

    @property
    def unique(self) -> Tensor:
        r"""Whether all measurements of a sample agree with one fixed point that was reached, of shape ``(B,)``."""
        allowed = self.tol / (1 - self.spectral_radius).clamp_min(1e-12)
        spread = torch.stack(list(self.spread.values())).amax(dim=0)
        near = spread <= _SPREAD * torch.maximum(self.error, allowed)
        return self.converged & (self.spectral_radius < 1) & near & torch.isfinite(self.error)

    @property
    def outcome(self) -> str:
        r"""What was measured, in one sentence."""
        good, count = int(self.unique.sum()), self.unique.numel()
        spread = {name: float(values.max()) for name, values in self.spread.items()}
        worst = max(spread, key=spread.__getitem__)
        measured = (
            f"spectral radius at most {float(self.spectral_radius.max()):.3f}, error at most {float(self.error.max()):.1e}, "
            f"spread over starts at most {spread[worst]:.1e} (from {worst})"
        )
        if good == count:
            return f"All {count} samples reached one fixed point: {measured}."
        causes = [
            cause
            for cause, holds in (
                ("the solver missed its tolerance", ~self.converged),
                ("the Jacobian expands", ~(self.spectral_radius < 1)),
                ("other starts lead elsewhere", self.converged & (self.spectral_radius < 1) & ~self.unique),
            )
            if bool(holds.any())
        ]
        return (
            f"{good} of {count} samples reached one fixed point; of the others, {' and '.join(causes)}: {measured}. "
            "Train with ContractionLoss, lower its bound, or lower tol."
        )


def certify(
    iteration: FixedPointIteration,
    solver: Solver,
    y: Any,
    physics: Any,
    *,
    x_gt: Tensor | None = None,
    products: int = 30,
    metric: nn.Module | None = None,
) -> Certificate:
    r"""Certify the fixed point of an iteration, see :meth:`DEQReconstructor.certify`.

    :param FixedPointIteration iteration: the iteration.
    :param Solver solver: how its fixed point is found.
    :param torch.Tensor y: measurements.
    :param deepinv.physics.Physics physics: forward operator.
    :param torch.Tensor, None x_gt: ground truth of shape ``(B, C, H, W)``; it becomes one more start, and PSNRs are given.
    :param int products: number of vector-Jacobian products for the spectral radius.
    :param torch.nn.Module, None metric: metric of the PSNRs, default :class:`deepinv.loss.metric.PSNR`.
    :return: the certificate.
    :raises ValueError: if a layer couples the samples or changes between evaluations (batch norm or dropout in training mode), or
        ``products`` is less than 1.
    """
    _refuse_unstable(iteration)
    if products < 1:
        raise ValueError(f"products must be at least 1, got {products}.")
    quiet = replace(solver, on_failure="ignore")
    psnr = PSNR() if metric is None else metric
    with torch.no_grad():
        f = iteration.bind(y, physics)
        x0 = own_start(f, iteration, y, physics)
        state, stat = quiet(f, x0)
        x = iteration.output(state)
        reached = {"start": x}
        longer = replace(quiet, max_iter=_LONGER * solver.max_iter)
        tenth, _ = replace(longer, tol=solver.tol / 10)(f, state)
        fine, fine_stat = replace(longer, tol=solver.tol / 30)(f, tenth)
        reached["tenth"] = iteration.output(tenth)
        for name, image in _starts(x, x0, iteration, x_gt).items():
            reached[name] = iteration.output(longer(f, image)[0])
    radius, norm = spectrum_of_part(f, state, products)
    exact = iteration.output(fine)
    tail = fine_stat.residual / (1 - radius).clamp_min(1e-12)
    error = torch.where(radius < 1, _distance(x, exact) + tail.to(x.dtype), torch.inf)
    return Certificate(
        x=x,
        spectral_radius=radius,
        norm=norm,
        residual=stat.residual,
        converged=stat.converged,
        error=error,
        evaluations=stat["nstep"],
        tol=solver.tol,
        points=reached,
        spread={name: _distance(point, x) for name, point in reached.items() if name not in ("start", "tenth")},
        psnr={} if x_gt is None else {name: psnr(point, x_gt) for name, point in reached.items()},
    )


def _starts(x: Tensor, x0: State, iteration: FixedPointIteration, x_gt: Tensor | None) -> dict[str, State]:
    r"""Other starts: zeros, noise of the size of the reconstruction, and the truth; the solve itself started from the
    linear reconstruction. Further variables of a state start where they do by default."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * x.abs().amax()
    images = {"zeros": torch.zeros_like(x), "noise": noise} | ({} if x_gt is None else {"truth": x_gt.to(x)})
    if isinstance(x0, Tensor):
        return dict(images)
    return {name: (image, *x0[1:]) for name, image in images.items()}


def _distance(a: Tensor, b: Tensor) -> Tensor:
    gap, size = norms(_rows(a - b)), norms(_rows(b))
    return torch.where(gap == 0, gap, gap / size.clamp_min(torch.finfo(size.dtype).tiny)).to(b.real.dtype)


def _rows(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).flatten(1)


def _refuse_unstable(iteration: nn.Module) -> None:
    norms, dropouts = compat.layers_that_change()
    for name, module in iteration.named_modules():
        if module.training and isinstance(module, (*norms, *dropouts)):
            raise ValueError(
                f"{type(module).__name__} '{name}' is in training mode, so there is no fixed point to certify: call model.eval()."
            )
