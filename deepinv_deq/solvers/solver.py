r"""A fixed-point method with its settings: ``solver(f, x0) -> (x, stat)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import torch

from deepinv_deq.autocast import FINER, Autocast
from deepinv_deq.maps import Map, as_map
from deepinv_deq.solvers.cuda_graphs import graphed
from deepinv_deq.solvers.loop import Settings
from deepinv_deq.solvers.methods import METHODS, available_methods, foreign, run_foreign
from deepinv_deq.solvers.problem import Problem
from deepinv_deq.solvers.stat import SolverStat, report
from deepinv_deq.states import WORTH, Layout, State, chunks, join, take

_FAILURE = ("warn", "raise", "ignore")
_SYNC_EVERY = 4  # on accelerators: a few extra evaluations are cheaper than a host-device synchronisation


class _Options(dict[str, Any]):
    r"""A dictionary that cannot be changed; unlike a mapping proxy it can be pickled and copied."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("The options of a Solver cannot be changed: make another with dataclasses.replace.")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _Options, (dict(self),)


@dataclass(frozen=True)
class Solver:
    r"""A fixed-point method with its settings: ``solver(f, x0)`` returns :math:`x = f(x)` and a statistic.

    Every sample (index of dimension 0) is solved by itself, and depends on no other. It stops, and is frozen from then on, when
    its **relative residual in natural units**

    .. math::

        \|N (f(x) - x)\|_2 / \|x\|_2 \leq \mathrm{tol},

    where :math:`N` is the map's preconditioner, or 1/stepsize (:meth:`Map.natural <deepinv_deq.maps.Map.natural>`). It makes the
    tolerance independent of the stepsize. Without :math:`N`, this is the plain residual. For an affine map
    :math:`b \mapsto \ell(b) + c`, such as the adjoint equation, the criterion is :math:`\|\ell(b) + c - b\|_2 / \|c\|_2`, as is usual
    for GMRES. If the fixed point is zero, the solve stops at the rounding of :math:`f(x_0)`. The point returned is the best one
    evaluated, with its residual in the statistic. A state with at most one dimension is one sample.

    :param str method: ``"anderson"`` (:footcite:t:`walker2011anderson`), ``"broyden"`` (:footcite:t:`broyden1965class`),
        ``"fixed_point_iter"`` (Picard), ``"gmres"`` (:footcite:t:`saad1986gmres`, for affine maps such as eq. 10 of the
        paper), another name in :data:`deepinv_deq.solvers.METHODS`, or one in TorchDEQ's registry.
    :param int max_iter: largest number of evaluations of ``f``, the one at ``x0`` included.
    :param float tol: relative residual to reach, no unit. The distance to the fixed point can be much larger.
    :param int, None history: number of past points kept: Anderson's depth (default 8), Broyden's rank (default: all),
        GMRES' restart length (default 30).
    :param float damping: step :math:`\beta` along the residual in Picard and Anderson steps, in :math:`(0, 1]`. With 1 nothing is damped.
    :param str on_failure: ``"warn"`` (once per solver and cause, and again for residuals ten times as large), ``"raise"`` or
        ``"ignore"`` where the tolerance is missed.
    :param bool batched: ``False`` treats the whole state as one sample, for maps that couple the samples of a batch.
    :param int, None chunk_size: number of samples that are solved at a time, for maps that can be restricted to samples.
        A sample's result does not depend on it; time and memory do. ``None`` is the whole batch on accelerators, and on CPU
        as many samples as have :math:`2^{15}` numbers, which fit the cache. Adjoint solves on CPU take as many as have
        :math:`2^{14}` numbers, because the graphs of all samples of a chunk are in memory at once.
    :param int, None sync_every: number of evaluations after which the host checks whether all samples are done. A larger number
        keeps an accelerator busy, at the cost of up to ``sync_every - 1`` unnecessary evaluations. ``None`` is 4 on
        accelerators, 1 on CPU.
    :param bool precondition: whether to use the preconditioner that a map may offer, as :class:`DEGrad` does where
        :math:`A^\top A` is nearly a convolution: fewer evaluations, the same solution and the same criterion. With ``False`` it is
        measured nevertheless, because the criterion uses it.
    :param bool cuda_graphs: whether evaluations on an NVIDIA GPU are captured in a CUDA graph, which saves the launches of single operations.
        Each solve spends about six evaluations on this. The map must not read numbers of tensors, and what it does besides
        computing, such as printing, is not repeated. Maps under autocast and adjoint solves stay as they are.
    :param dict options: further keyword arguments for a function in TorchDEQ's registry.

    :raises ValueError: at construction, for an unknown method or a setting out of range.
    :raises ConvergenceError: when called, if the tolerance is missed and ``on_failure="raise"``.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deq import Solver
    >>> x, stat = Solver("anderson", tol=1e-6)(torch.cos, torch.zeros(1, 1, dtype=torch.float64))
    >>> round(x.item(), 5), bool(stat.converged)
    (0.73909, True)
    """

    method: str = "anderson"
    _: KW_ONLY
    max_iter: int = 50
    tol: float = 1e-4
    history: int | None = None
    damping: float = 1.0
    on_failure: Literal["warn", "raise", "ignore"] = "warn"
    batched: bool = True
    chunk_size: int | None = None
    sync_every: int | None = None
    precondition: bool = True
    cuda_graphs: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "options", _Options(self.options))
        object.__setattr__(self, "_warned", {})  # no field: it is no setting

    @torch.no_grad()
    def __call__(self, f: Callable[[Any], Any], x0: Any) -> tuple[Any, SolverStat]:
        r"""Solve :math:`x = f(x)` from ``x0``, without an autograd graph.

        :param Callable f: the map; takes and returns a state. A :class:`deepinv_deq.maps.Map` may offer more.
        :param torch.Tensor, tuple[torch.Tensor, ...] x0: initial state, dimension 0 is the batch.
        :return: the fixed point, shaped like ``x0``, and its :class:`SolverStat`.
        :raises ValueError: if ``f`` returns another shape than it was given.
        :raises ConvergenceError: if the tolerance is missed and ``on_failure="raise"``.
        """
        whole = as_map(f)
        solved = [self._solve(part, x0 if rows is None else take(x0, rows)) for rows, part in parts_of(self, whole, x0)]
        torch.clear_autocast_cache()  # casts made here carry no graph and must not serve an evaluation with one
        stat = self.joined([stat for _, stat in solved])
        self.report(stat, whole.diagnose)
        return join([x for x, _ in solved]), stat

    def joined(self, stats: Sequence[SolverStat]) -> SolverStat:
        r"""One statistic for the chunks of a batch.

        :param Sequence[SolverStat] stats: statistics of this solver, in the order of the samples.
        :return: the statistic of all samples.
        """
        return SolverStat.join(stats, self.method, self.tol)

    def report(self, stat: SolverStat, diagnose: Callable[[], str] | None = None) -> None:
        r"""Warn or raise, as configured, if a statistic says that the tolerance was missed.

        :param SolverStat stat: statistic of a solve.
        :param Callable, None diagnose: asked for one more sentence about the map.
        :raises ConvergenceError: if a sample missed the tolerance and ``on_failure="raise"``.
        """
        report(stat, self.on_failure, self._warned, diagnose)  # type: ignore[attr-defined]

    @torch.no_grad()
    def verify(self, x: Any, fx: Any, offset: Any, stat: SolverStat) -> None:
        r"""Replace the residual that a method computed by a recurrence by the measured one, for an affine map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: the point.
        :param torch.Tensor, tuple[torch.Tensor, ...] fx: its image.
        :param torch.Tensor, tuple[torch.Tensor, ...] offset: the constant of the map.
        :param SolverStat stat: statistic of the solve, changed in place.
        :raises ConvergenceError: if the solve claimed to have converged, has not, and ``on_failure="raise"``.
        """
        worst = stat.verify(Layout(x, self.batched), x, fx, offset, self.method, self.tol)
        if worst is not None:
            stat["outcome"] = _contradicted(self, worst, stat["precision"])
            self.report(stat)

    def _solve(self, f: Map, x0: State) -> tuple[State, SolverStat]:
        layout, method = Layout(x0, self.batched), METHODS.get(self.method)
        if f.records and (method is None or method.directions):
            raise ValueError(_no_iterates(self.method, foreign=method is None))
        f = graphed(f, x0) if self.cuda_graphs else f
        start = layout.pack(x0).clone()  # which may be the answer
        precondition = self.precondition and self.batched and method is not None and method.preconditioned
        autocast = Autocast(start.device.type)
        with autocast.off():  # the problem evaluates the map in the caller's setting
            problem = Problem(f, layout, start, precondition, autocast=autocast)
            start = problem.enter(start)
            sync_every = self.sync_every or (1 if start.device.type == "cpu" else _SYNC_EVERY)
            settings = Settings(self.max_iter, self.tol, self.history, self.damping, sync_every)
            if method is None:
                x, info = run_foreign(self.method, problem, start, settings, self.options)
            else:
                x, info = method(start, settings).solve(problem, start, settings)
            x, info = problem.leave(x, info)
        precisions = {"precision": problem.precision, "precision_of_state": problem.precision_of_state}
        stat = SolverStat(**info, **precisions)
        stat["evaluations"], stat["work"] = problem.evaluations, problem.samples / max(1, len(x))
        stat.judge(self.method, self.tol)
        return layout.unpack(x), stat


def parts_of(solver: Solver, f: Map, x: State, numbers: int = WORTH) -> list[tuple[slice | None, Map]]:
    r"""The maps of the samples that are solved together.

    :param Solver solver: the solver.
    :param Map f: the map.
    :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
    :param int numbers: how many numbers are worked on together on CPU, where the solver leaves it open.
    :return: slices of the batch and their maps; ``None`` and ``f`` where it cannot be restricted to some samples.
    """
    parts: list[tuple[slice | None, Map]] = []
    rows = chunks(x, solver.chunk_size, numbers) if solver.batched else []
    for some in rows if len(rows) > 1 else []:
        part = f.select(some)
        if part is None:
            return [(None, f)]
        parts.append((some, part))
    return parts or [(None, f)]


def _no_iterates(method: str, foreign: bool) -> str:
    why = "reports no residual for each evaluation" if foreign else "evaluates the map at directions"
    return (
        f"The PSNR of the iterates cannot be recorded with {method!r}, which {why}: use another method, such as 'anderson', "
        "or compute_metrics=True without x_gt."
    )


def _contradicted(solver: Solver, worst: float, dtype: torch.dtype) -> str:
    cause = "the map is not deterministic, or couples the samples of the batch (then use Solver(..., batched=False))."
    if dtype.itemsize < 4 and worst >= FINER * torch.finfo(dtype).eps:
        cause = f"vector-Jacobian products in {str(dtype).removeprefix('torch.')} cannot reach {solver.tol:.1e}."
    return f"{solver.method} reported convergence, but the measured residual is {worst:.1e}: {cause}"


def _check(solver: Solver) -> None:
    if solver.method not in available_methods() and foreign(solver.method) is None:
        raise ValueError(f"Unknown solver method {solver.method!r}: must be one of {', '.join(available_methods())}.")
    if not solver.tol > 0:
        raise ValueError(f"tol is a relative residual and must be positive, got {solver.tol}.")
    for name in ("max_iter", "history", "chunk_size", "sync_every"):
        value = getattr(solver, name)
        if value is not None and not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be an integer, got {value!r}.")
    if solver.max_iter < 1:
        raise ValueError(f"max_iter counts evaluations of f and must be at least 1, got {solver.max_iter}.")
    if solver.history is not None and solver.history < 1:
        raise ValueError(f"history must be at least 1 (or None for the method's default), got {solver.history}.")
    for name in ("chunk_size", "sync_every"):
        if getattr(solver, name) is not None and getattr(solver, name) < 1:
            raise ValueError(f"{name} must be at least 1 (or None for the default), got {getattr(solver, name)}.")
    if not 0 < solver.damping <= 1:
        raise ValueError(f"damping must be in (0, 1], got {solver.damping}.")
    if solver.on_failure not in _FAILURE:
        raise ValueError(f"on_failure must be one of {', '.join(_FAILURE)}, got {solver.on_failure!r}.")
    if solver.options and solver.method in METHODS:
        raise ValueError(
            f"options are for functions in TorchDEQ's registry; {solver.method!r} takes its settings as arguments of "
            f"Solver, not {', '.join(solver.options)}."
        )
