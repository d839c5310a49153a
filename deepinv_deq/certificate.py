r"""A certificate of a fixed point: whether it contracts, how far it is, and whether other starts lead to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepinv.loss.metric import PSNR
from torch import Tensor, nn

from deepinv_deq import compat
from deepinv_deq.checks import check_finite, check_ground_truth, own_start
from deepinv_deq.implicit.context import as_in_forward
from deepinv_deq.iterations import FixedPointIteration
from deepinv_deq.iterations.checks import unsuitable_layer
from deepinv_deq.iterations.starts import noise_like, state_of
from deepinv_deq.solvers import Solver
from deepinv_deq.solvers.evaluation import relative_to
from deepinv_deq.spectra import spectrum_of_part
from deepinv_deq.states import Layout, norms

_LONGER = 3  # times max_iter, for solves from other starts and to smaller tolerances
_SPREAD = 3.0  # two solves may differ by the sum of their errors, and the estimate is good to a small factor
_LARGEST = 0.05  # relative error or spread up to which two points can be one fixed point


@dataclass(frozen=True)
class Certificate:
    r"""What :meth:`DEQReconstructor.certify` measured, one number per sample: tensors of shape ``(B,)`` unless stated.

    :param torch.Tensor x: the reconstruction, of shape ``(B, C, H, W)``.
    :param torch.Tensor spectral_radius: largest modulus of an eigenvalue of the Jacobian that has to contract, at ``x``. Below 1 the
        fixed point is locally unique and the adjoint equation well-posed.
    :param torch.Tensor rightmost: largest real part of an eigenvalue of this Jacobian. Below 1 the adjoint equation is well-posed, even
        if the radius is 1 or more.
    :param torch.Tensor norm: norm of the same Jacobian from below, in the norm of the preconditioner.
    :param torch.Tensor residual: the solver's criterion at ``x``.
    :param torch.Tensor converged: whether ``residual`` met the tolerance.
    :param torch.Tensor error: estimate of :math:`\|x - x^*\| / \|x^*\|`, the distance to the fixed point. Inf if the radius is 1 or more.
    :param torch.Tensor evaluations: number of evaluations of the iteration that ``x`` took.
    :param float tol: the tolerance.
    :param dict points: images of shape ``(B, C, H, W)``: ``x`` (``"start"``), the image at a tenth of the tolerance (``"tenth"``), and
        those reached from the other starts.
    :param dict spread: for each other start (``"zeros"``, ``"noise"`` and, with ``x_gt``, ``"truth"``), :math:`\|x' - x\| / \|x\|` of
        the point reached from there.
    :param dict psnr: with ``x_gt``, PSNR in dB of each of ``points``.
    :param dict errors: for each other start, the estimated relative error of the point reached from there. Inf if the radius is 1 or more.
    :param dict solved: for each other start, whether the solve met the tolerance.

    With ``Solver(batched=False)``, all samples have the numbers of the joint solve.

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
    rightmost: Tensor
    norm: Tensor
    residual: Tensor
    converged: Tensor
    error: Tensor
    evaluations: Tensor
    tol: float
    points: dict[str, Tensor] = field(default_factory=dict, repr=False)
    spread: dict[str, Tensor] = field(default_factory=dict)
    psnr: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    solved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def unique(self) -> Tensor:
        r"""Whether all measurements of a sample agree with one fixed point that was reached, of shape ``(B,)``.

        The error and every spread must be at most 5 %. A spread must also be at most three times the larger error of its two points,
        or three times the tolerance.
        """
        near = torch.ones_like(self.converged)
        for name, spread in self.spread.items():
            near &= spread <= self._explained(name).clamp_max(_LARGEST)
        return self.converged & (self.spectral_radius < 1) & (self.error <= _LARGEST) & near

    def _explained(self, name: str) -> Tensor:
        r"""The spread that the errors of two solves explain."""
        return _SPREAD * torch.maximum(self.error, self.errors.get(name, self.error)).clamp_min(self.tol)

    def _causes(self) -> list[str]:
        sound, none = self.converged & (self.spectral_radius < 1), torch.zeros_like(self.converged)
        loose, missed, elsewhere = sound & ~(self.error <= _LARGEST), none, none
        for name, spread in self.spread.items():
            near, solved = spread <= self._explained(name), self.solved.get(name, self.converged)
            apart = sound & ~(near & (spread <= _LARGEST))
            missed, elsewhere = missed | (apart & ~solved), elsewhere | (apart & solved & ~near)
            loose = loose | (apart & solved & near)
        causes = {
            "the solver missed its tolerance": ~self.converged,
            "the Jacobian expands": ~(self.spectral_radius < 1),
            "tol is too large to tell whether the points agree": loose,
            "solves from other starts missed the tolerance": missed,
            "other starts lead elsewhere": elsewhere,
        }
        return [cause for cause, holds in causes.items() if bool(holds.any())]

    @property
    def outcome(self) -> str:
        r"""What was measured, in one sentence."""
        good, count = int(self.unique.sum()), self.unique.numel()
        if not count:
            return "There are no samples to certify."
        spread = {name: float(values.max()) for name, values in self.spread.items()}
        worst = max(spread, key=spread.__getitem__)
        measured = (
            f"spectral radius at most {float(self.spectral_radius.max()):.3f}, error at most {float(self.error.max()):.1e}, "
            f"spread over starts at most {spread[worst]:.1e} (from {worst})"
        )
        if good == count:
            return f"All {count} samples reached one fixed point: {measured}."
        return (
            f"{good} of {count} samples reached one fixed point; of the others, {' and '.join(self._causes())}: {measured}. "
            "Train with ContractionLoss, lower its bound, lower tol, or raise max_iter."
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
    :raises ValueError: for a layer that couples samples or changes between evaluations (batch norm or dropout in training mode), NaN or
        Inf in ``y``, an ``x_gt`` of another shape, or ``products`` that is no positive integer.
    """
    if unstable := unsuitable_layer(iteration):
        raise ValueError(f"There is no fixed point to certify: {unstable} model.eval() does that.")
    if not isinstance(products, int) or products < 1:
        raise ValueError(f"products must be an integer of at least 1, got {products}.")
    check_finite(y)
    quiet = replace(solver, on_failure="ignore")
    psnr = PSNR() if metric is None else metric
    with torch.no_grad(), as_in_forward([]), _unchanged(iteration):
        f = iteration.bind(y, physics)
        x0 = own_start(f, iteration, y, physics)
        state, stat = quiet(f, x0)
        reached = {"start": (x := iteration.output(state))}
        check_ground_truth(x_gt, x)
        longer = replace(quiet, max_iter=_LONGER * solver.max_iter)
        tenth, _ = replace(longer, tol=solver.tol / 10)(f, state)
        fine, fine_stat = replace(longer, tol=solver.tol / 30)(f, tenth)
        reached["tenth"] = iteration.output(tenth)
        others = {name: longer(f, state_of(image, x0)) for name, image in _images(x, x_gt).items()}
        reached |= {name: iteration.output(other) for name, (other, _) in others.items()}
        found = spectrum_of_part(f, state, products, batched=solver.batched)
        radius, norm, rightmost = (t.expand(len(x)) for t in found)

    def error(residual: Tensor) -> Tensor:
        return (residual / (1 - radius).clamp_min(1e-12)).to(x.real.dtype)

    contracts, exact = radius < 1, iteration.output(fine)
    return Certificate(
        x=x,
        spectral_radius=radius,
        rightmost=rightmost,
        norm=norm,
        residual=stat.residual.expand(len(x)),
        converged=stat.converged.expand(len(x)),
        error=torch.where(contracts, _distance(x, exact) + error(fine_stat.residual), torch.inf),
        evaluations=stat["nstep"].expand(len(x)),
        tol=solver.tol,
        points=reached,
        spread={name: _distance(reached[name], x) for name in others},
        psnr={} if x_gt is None else {name: psnr(point, x_gt) for name, point in reached.items()},
        errors={name: torch.where(contracts, error(s.residual), torch.inf) for name, (_, s) in others.items()},
        solved={name: s.converged.expand(len(x)) for name, (_, s) in others.items()},
    )


def _images(x: Tensor, x_gt: Tensor | None) -> dict[str, Tensor]:
    r"""Zeros, noise of the size of the reconstruction, and the truth; the solve itself started from the linear reconstruction."""
    noise = noise_like(x, torch.Generator().manual_seed(0))
    return {"zeros": torch.zeros_like(x), "noise": noise} | ({} if x_gt is None else {"truth": x_gt.to(x)})


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    r"""Undo what layers in training mode do to their buffers, such as the power iterations of spectral norm."""
    own = [(m, *item) for m in module.modules() if m.training for item in m.named_buffers(recurse=False)]
    kept = [(m, name, b, b.clone(), compat.version(b)) for m, name, b in own]
    try:
        yield
    finally:
        for m, name, buffer, before, version in kept:
            if getattr(m, name) is not buffer:
                setattr(m, name, buffer)
            if compat.version(buffer) != version:
                buffer.copy_(before)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    layout = Layout(b, batched=True)
    return relative_to(norms(layout.pack(a - b)), norms(layout.pack(b))).to(b.real.dtype)
