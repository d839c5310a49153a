r"""What happened in a solve: the statistic, joined over chunks, judged, and reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchdeq.solver.stat import SolverStat as _TorchDEQStat

from deepinv_deq import compat
from deepinv_deq.autocast import FINER
from deepinv_deq.solvers.evaluation import relative_to
from deepinv_deq.states import Layout, State, norms, read

_DRIFT = 100.0  # roundings by which the recurrence of a Krylov method may differ from the measured residual
_CALLER = 5  # stack level of the code that calls a solver, in warnings
_WORSE = 10.0  # a missed tolerance is warned of again if the residual is this many times as large as before
_PER_SAMPLE = ("abs_lowest", "rel_lowest", "plain_residual", "nstep", "converged", "at_floor", "singular", "coupled")
_SINGULAR = (
    "The linear equation is singular or nearly so in {n} of {of} samples: F does not contract along some direction (1 is an "
    "eigenvalue of its Jacobian, or nearly so). Its fixed point is not unique or hardly determined, and the gradient must not be "
    "trusted. Train with ContractionLoss, use a contracting network (EquilibriumUNet with contraction below 1) or a larger data "
    "weight, or check that F depends on all of its state."
)
_COUPLED = (
    "{n} of {of} samples met the tolerance before the others were done, and miss it at the final point: the map couples the samples of the batch, or is not "
    "deterministic. For a map that couples them, use Solver(..., batched=False)."
)
_TF32 = (
    "On this GPU, PyTorch may compute convolutions in TF32, whose rounding limits the residual: set "
    "torch.backends.cudnn.allow_tf32 = False."
)
_REMEDY = {
    "tolerance": "Raise max_iter or tol, try Solver(damping=0.5), or make the map more contractive (train with ContractionLoss).",
    "non-finite": "The map or its constant (for a gradient: the cotangent) is NaN or Inf: check weights, input and loss.",
    "floor": "",
    "singular": "",
    "coupled": "",
}


class ConvergenceWarning(UserWarning):
    r"""A fixed-point solve stopped before it reached its tolerance."""


class ConvergenceError(RuntimeError):
    r"""A fixed-point solve stopped before it reached its tolerance, with ``on_failure="raise"``.

    :param str message: what happened and what to do.
    :param SolverStat stat: the statistic of the solve, kept as attribute ``stat``.
    """

    def __init__(self, message: str, stat: SolverStat | None = None):
        super().__init__(message)
        self.stat = stat


class SolverStat(_TorchDEQStat):
    r"""Statistic of a solve, per sample: evaluations, residuals, convergence. Its keys are TorchDEQ's.

    A dictionary with the keys of :class:`torchdeq.solver.stat.SolverStat` (``abs_lowest``, ``rel_lowest``, ``abs_trace``,
    ``rel_trace``, ``nstep``), all in the unit of the solver's criterion (see :class:`Solver`), and these. All but ``at_floor``, ``singular`` and ``coupled`` are also attributes:

    - ``evaluations`` (``int``): how often the map was evaluated; for a batch that was solved in chunks, for the chunk that
      took most.
    - ``work`` (``float``): total evaluations of single samples, divided by the batch size. It is less than ``evaluations`` where
      finished samples were dropped.
    - ``converged`` (``bool`` tensor of shape ``(B,)``): whether the sample met its tolerance.
    - ``plain_residual`` (tensor of shape ``(B,)``): :math:`\|F(x) - x\| / \|F(x)\|` of the point that was returned.
    - ``at_floor`` and ``singular`` (``bool`` tensors of shape ``(B,)``): why a sample stopped early: rounding allows no smaller
      residual, or the linear equation is singular or nearly so.
    - ``coupled`` (``bool`` tensor of shape ``(B,)``): whether a sample had met its tolerance, and no longer did when the others had changed.
    - ``outcome`` (``str``): one sentence for humans.

    ``nstep`` is the number of evaluations after which each sample was done. Traces have shape ``(B, n)``: column
    :math:`k` holds the residual of the :math:`k`-th evaluated point; a sample that is done repeats its last value.

    >>> from deepinv_deq import Solver
    >>> x, stat = Solver("fixed_point_iter", tol=1e-3)(lambda x: 0.5 * x + 1, torch.zeros(1, 4))
    >>> stat.evaluations, stat.converged.tolist(), stat["rel_trace"].shape
    (10, [True], torch.Size([1, 10]))
    """

    @property
    def evaluations(self) -> int:
        r"""Number of evaluations of the map (for a backward solve: of vector-Jacobian products)."""
        return self["evaluations"]

    @property
    def work(self) -> float:
        r"""Number of evaluations, in evaluations of the whole batch."""
        return self["work"]

    @property
    def residual(self) -> Tensor:
        r"""The solver's criterion at the point that was returned, of shape ``(B,)``."""
        return self["rel_lowest"]

    @property
    def plain_residual(self) -> Tensor:
        r"""Plain residual :math:`\|F(x) - x\| / \|F(x)\|` of the point that was returned, of shape ``(B,)``."""
        return self["plain_residual"]

    @property
    def remainder(self) -> Tensor:
        r"""Old name of :attr:`residual`, which for an adjoint solve is relative to the cotangent now."""
        warnings.warn("SolverStat.remainder is now SolverStat.residual.", DeprecationWarning, stacklevel=2)
        return self.residual

    @property
    def converged(self) -> Tensor:
        r"""Whether each sample met its tolerance, of shape ``(B,)``."""
        return self["converged"]

    @property
    def outcome(self) -> str:
        r"""What happened, in one sentence."""
        return self["outcome"]

    @classmethod
    def join(cls, stats: Sequence[SolverStat], method: str, tol: float) -> SolverStat:
        r"""One statistic for the chunks of a batch.

        :param Sequence[SolverStat] stats: statistics of one solver, in the order of the samples.
        :param str method: name of the method.
        :param float tol: its tolerance.
        :return: the statistic of all samples.
        """
        if len(stats) == 1:
            return stats[0]
        sizes = [len(stat.residual) for stat in stats]
        length = max(stat["rel_trace"].shape[1] for stat in stats)
        joint = {key: torch.cat([stat[key] for stat in stats]) for key in _PER_SAMPLE}
        for key in ("abs_trace", "rel_trace"):
            traces = [stat[key] for stat in stats]
            joint[key] = torch.cat([torch.cat([t, t[:, -1:].expand(-1, length - t.shape[1])], dim=1) for t in traces])
        stat = cls(**joint, **{key: stats[0][key] for key in ("precision", "precision_of_state")})
        stat["evaluations"] = max(s.evaluations for s in stats)
        stat["work"] = sum(s.work * size for s, size in zip(stats, sizes, strict=True)) / sum(sizes)
        stat.judge(method, tol)
        return stat

    def judge(self, method: str, tol: float) -> None:
        r"""Write the ``outcome``.

        :param str method: name of the method.
        :param float tol: its tolerance.
        """
        masks = self.converged, self["at_floor"], self["singular"], self["coupled"]
        residual, *rows = read(self.residual.double(), *(mask.double() for mask in masks))
        good, at_floor, singular, coupled = (row.sum() for row in rows)
        worst, floor = residual.max(initial=0.0), residual[rows[1] > 0].max(initial=0.0)
        said = [
            f"{method}: {good:.0f} of {len(residual)} samples reached the relative residual {tol:.1e} in "
            f"{self.evaluations} evaluations (largest residual {worst:.1e})."
        ]
        if at_floor:
            dtype = self["precision"]
            dtype = self["precision_of_state"] if floor < FINER * torch.finfo(dtype).eps else dtype
            precision = str(dtype).removeprefix("torch.")
            finer = "use a larger tol" if precision == "float64" else "use float64 or a larger tol"
            said.append(f"{precision} cannot reach {tol:.1e} (floor about {floor:.1e}): {finer}.")
        if singular:
            said.append(_SINGULAR.format(n=int(singular), of=len(residual)))
        if coupled:
            said.append(_COUPLED.format(n=int(coupled), of=len(residual)))
        self["outcome"] = " ".join(said)

    def verify(self, layout: Layout, x: State, fx: State, offset: State, method: str, tol: float) -> float | None:
        r"""Take the measured residual of the solution of an affine map.

        :param Layout layout: of the states.
        :param torch.Tensor, tuple[torch.Tensor, ...] x: the point.
        :param torch.Tensor, tuple[torch.Tensor, ...] fx: its image.
        :param torch.Tensor, tuple[torch.Tensor, ...] offset: the constant of the map.
        :param str method: name of the method.
        :param float tol: its tolerance.
        :return: the largest residual, if a sample that was said to have converged has not; else ``None``.
        """
        point, image, c = (norms(layout.pack(t)) for t in (x, fx, offset))
        absolute = norms(layout.pack(fx) - layout.pack(x))
        scale = torch.where(c > 0, c, point)  # without a constant, the solution is zero
        relative, plain = (relative_to(absolute, size) for size in (scale, image))
        finite = torch.isfinite(relative)
        for key, value in (("abs_lowest", absolute), ("rel_lowest", relative), ("plain_residual", plain)):
            self[key] = torch.where(finite, value, torch.inf).to(layout.dtype)
        drift = (_DRIFT * torch.finfo(layout.dtype).eps * torch.maximum(point, image) / c).nan_to_num(0.0, 0.0)
        honest = ~self.converged | (c == 0) | (relative <= drift.clamp_min(2 * tol))
        self["converged"] = self.converged & honest
        self.judge(method, tol)
        return None if bool(honest.all()) else self.residual.max().item()

    def cause(self) -> str | None:
        r"""Why the tolerance was missed: a key of the remedies, or ``None`` if it was not."""
        missed = ~self.converged
        if not bool(missed.any()):
            return None
        if not bool(torch.isfinite(self.residual).all()):
            return "non-finite"
        if bool(self["singular"].any()):
            return "singular"
        if bool(self["coupled"].any()):
            return "coupled"
        return "floor" if bool((self["at_floor"] | ~missed).all()) else "tolerance"


def report(
    stat: SolverStat,
    on_failure: str,
    warned: dict[str, float],
    diagnose: Callable[[], str] | None = None,
) -> None:
    r"""Warn or raise, as configured, if a statistic says that the tolerance was missed.

    :param SolverStat stat: statistic of a solve.
    :param str on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.
    :param dict[str, float] warned: causes that were warned of, with the largest residual then; the present one is added.
    :param Callable, None diagnose: asked for one more sentence about the map.
    :raises ConvergenceError: if a sample missed the tolerance and ``on_failure="raise"``.
    """
    cause = None if on_failure == "ignore" else stat.cause()
    if cause is None:
        return
    worst = stat.residual.max().item()
    if on_failure == "warn" and cause in warned and not worst > _WORSE * warned[cause]:
        return
    rounded = cause in ("tolerance", "floor") and stat["precision"] == torch.float32
    rounded = rounded and compat.rounds_convolutions(stat.residual.device)
    said = stat.outcome, _TF32 if rounded else "", diagnose() if diagnose else "", _REMEDY[cause]
    message = " ".join(filter(None, said))
    if on_failure == "raise":
        raise ConvergenceError(message, stat)
    warned[cause] = worst
    warnings.warn(message, ConvergenceWarning, stacklevel=_CALLER)
