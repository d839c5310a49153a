r"""Fixed-point solvers: ``solver(f, x0) -> (x, stat)``.

:class:`Solver` is the one entry point. It lays a state of any shape out as one real matrix, looks the method up in
TorchDEQ's registry, runs it without an autograd graph, and says honestly how it went.

To add a method, write one function ``fn(func, x0, *, max_iter, tol, history, damping, **_)`` that maps a ``(B, N)``
matrix to ``(x, samples, stat)`` in this module, and name it in its last lines. Methods of the quasi-Newton family only need
a proposal rule: see :class:`deepinv_deq._quasi_newton.Anderson`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torchdeq.solver import _solvers as _registry
from torchdeq.solver import get_solver, register_solver
from torchdeq.solver.stat import SolverStat as _TorchDEQStat

from deepinv_deq._krylov import gmres
from deepinv_deq._maps import FlatMap, SeparableMap, preconditioner
from deepinv_deq._quasi_newton import Anderson, Broyden, Picard, iterate
from deepinv_deq._states import Layout, State, chunks, join, norms, residuals, take, unit_size

_FAILURE = ("warn", "raise", "ignore")
# TorchDEQ's methods of the same names stop batch-wide, at absolute tolerances, with a regularisation that depends on the
# scale: Solver("anderson") runs ours, and TorchDEQ's stay what they are for everybody else.
_PREFIX = "deepinv_deq."
_SYNC_EVERY = 4  # on accelerators: the few evaluations too many cost less than the pipeline that runs dry each time
_REMAINDER = 0.5  # of the constant of an affine map: what leaves more of it has hardly begun to solve
_GROWTH = 10.0  # accelerated residuals are not monotone; a step this much worse than the best point was a bad one


class ConvergenceWarning(UserWarning):
    r"""A fixed-point solve stopped before it reached its tolerance."""


class ConvergenceError(RuntimeError):
    r"""A fixed-point solve stopped before it reached its tolerance, and was asked to raise.

    :param str message: what happened and what to do.
    :param SolverStat stat: the statistic of the solve, kept as attribute ``stat``.
    """

    def __init__(self, message: str, stat: SolverStat | None = None):
        super().__init__(message)
        self.stat = stat


class SolverStat(_TorchDEQStat):
    r"""What happened in a solve: TorchDEQ's statistic with an exact count and a verdict per sample.

    A dictionary with the keys of :class:`torchdeq.solver.stat.SolverStat` (``abs_lowest``, ``rel_lowest``,
    ``abs_trace``, ``rel_trace``, ``nstep``) and four more, which are also attributes:

    - ``evaluations`` (``int``): how often the map was evaluated; for a batch that was solved in chunks, for the chunk that
      took most.
    - ``work`` (``float``): how many evaluations of the whole batch that was in all. It is less than ``evaluations`` where
      samples that were done cost nothing any more.
    - ``converged`` (``bool`` tensor of shape ``(B,)``): whether the sample met its tolerance.
    - ``outcome`` (``str``): one sentence for humans.

    That of an adjoint solve (:class:`ModularIDHook`) has a fifth, ``remainder`` (tensor of shape ``(B,)``): the residual in parts of
    the cotangent, :math:`\|b \, \partial F / \partial x + g - b\| / \|g\|`. Where :math:`b` is much larger than :math:`g`, as for iterations of
    small steps, a small relative residual says little, and this says how much of the equation was solved.

    ``nstep`` is the number of evaluations after which each sample was done. Traces have shape ``(B, n)``: column
    :math:`k` holds the residual of the :math:`k`-th evaluated point; a sample that is done repeats its last value.
    """

    @property
    def evaluations(self) -> int:
        r"""Number of evaluations of the map (for a backward solve: of vector-Jacobian products)."""
        return self["evaluations"]

    @property
    def work(self) -> float:
        r"""What was evaluated, in evaluations of the whole batch."""
        return self["work"]

    @property
    def residual(self) -> Tensor:
        r"""Relative residual :math:`\|f(x) - x\| / \|f(x)\|` of the point that was returned, of shape ``(B,)``."""
        return self["rel_lowest"]

    @property
    def remainder(self) -> Tensor:
        r"""Of an adjoint solve, its residual in parts of the cotangent, of shape ``(B,)``."""
        return self["remainder"]

    @property
    def converged(self) -> Tensor:
        r"""Whether each sample met its tolerance, of shape ``(B,)``."""
        return self["converged"]

    @property
    def outcome(self) -> str:
        r"""What happened, in one sentence."""
        return self["outcome"]


@dataclass(frozen=True)
class Solver:
    r"""A fixed-point method with its settings: ``solver(f, x0)`` returns :math:`x = f(x)` and a statistic.

    Every sample (index of dimension 0) is solved by itself: it stops when its **relative residual**

    .. math::

        \|f(x) - x\|_2 / \|f(x)\|_2 \leq \mathrm{tol},

    is frozen from then on, and depends on no other sample. The point returned is the best one evaluated, and the
    residual in the statistic is that of this very point. A state with at most one dimension is one single sample.

    :param str method: ``"anderson"`` (:footcite:t:`walker2011anderson`), ``"broyden"`` (:footcite:t:`broyden1965class`),
        ``"fixed_point_iter"`` (Picard), ``"gmres"`` (:footcite:t:`saad1986gmres`, for affine maps such as eq. 10 of the
        paper), or any other name in TorchDEQ's registry.
    :param int max_iter: largest number of evaluations of ``f``, the one at ``x0`` included.
    :param float tol: relative residual to reach, no unit.
    :param int, None history: number of past points kept: Anderson's depth (default 5), Broyden's rank (default: all),
        GMRES' restart length (default 30).
    :param float damping: step :math:`\beta` along the residual in Picard and Anderson steps, in :math:`(0, 1]`.
    :param str on_failure: ``"warn"`` (once per solver and cause), ``"raise"`` or ``"ignore"`` where the tolerance is missed.
    :param bool batched: ``False`` treats the whole state as one sample, for maps that couple the samples of a batch.
    :param int, None chunk_size: number of samples that are solved at a time, for maps that can be restricted to samples
        (those of :meth:`FixedPointIteration.bind <deepinv_deq.FixedPointIteration.bind>` can). A sample's result does not
        depend on it; time and memory do. ``None`` is the whole batch on accelerators, and on CPU as many samples as have
        :math:`2^{15}` numbers: what is worked on then stays in the cache.
    :param int, None sync_every: number of evaluations after which the host asks the device whether all samples are done.
        More of them keep an accelerator busy, at up to as many evaluations too many. ``None`` is 4 on accelerators, 1 on CPU.
    :param bool precondition: whether to use the approximate inverse that a map may offer, as :class:`DEGrad` does where the
        physics is nearly a filter: fewer evaluations, the same solution and the same residual to reach.
    :param dict options: further keyword arguments for a function that others registered.

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
    options: Mapping[str, Any] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method not in available_methods():
            raise ValueError(f"Unknown solver method {self.method!r}: must be one of {', '.join(available_methods())}.")
        if not self.tol > 0:
            raise ValueError(f"tol is a relative residual and must be positive, got {self.tol}.")
        if self.max_iter < 1:
            raise ValueError(f"max_iter counts evaluations of f and must be at least 1, got {self.max_iter}.")
        if self.history is not None and self.history < 1:
            raise ValueError(f"history must be at least 1 (or None for the method's default), got {self.history}.")
        for name in ("chunk_size", "sync_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (or None for the default), got {getattr(self, name)}.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}.")
        if self.on_failure not in _FAILURE:
            raise ValueError(f"on_failure must be one of {', '.join(_FAILURE)}, got {self.on_failure!r}.")
        if self.options and _is_ours(self.method):
            raise ValueError(
                f"options are for methods that others registered; {self.method!r} takes its settings as arguments of "
                f"Solver, not {', '.join(self.options)}."
            )
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"options": dict(self.options)}  # a mapping proxy cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"options": MappingProxyType(state["options"])})

    def __hash__(self) -> int:
        settings = self.method, self.max_iter, self.tol, self.history, self.damping, self.on_failure, self.batched
        return hash((*settings, self.chunk_size, self.sync_every, self.precondition))

    @torch.no_grad()
    def __call__(self, f: Callable[[Any], Any], x0: Any) -> tuple[Any, SolverStat]:
        r"""Solve :math:`x = f(x)` from ``x0``, without an autograd graph.

        :param Callable f: the map; takes and returns a state. If it has a method ``diagnose() -> str``, its answer is
            added to the message where the tolerance is missed.
        :param torch.Tensor, tuple[torch.Tensor, ...] x0: initial state, dimension 0 is the batch.
        :return: the fixed point, shaped like ``x0``, and its :class:`SolverStat`.
        :raises ValueError: if ``f`` returns another shape than it was given.
        :raises ConvergenceError: if the tolerance is missed and ``on_failure="raise"``.
        """
        solved = [self._solve(part, start) for part, start in self._parts(f, x0)]
        torch.clear_autocast_cache()  # casts made here carry no graph and must not serve a taped evaluation
        stat = self.joined([stat for _, stat in solved])
        self.report(stat, getattr(f, "diagnose", None))
        return join([x for x, _ in solved]), stat

    def chunks(self, f: Callable[[Any], Any], x: Any) -> list[slice] | None:
        r"""Which samples are solved together.

        :param Callable f: the map.
        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :return: slices of the batch; ``None`` for all samples at once, as where the map cannot be restricted to some.
        """
        rows = chunks(x, self.chunk_size) if self.batched else []
        return rows if len(rows) > 1 and isinstance(f, SeparableMap) and f.separable(x) else None

    def joined(self, stats: Sequence[SolverStat]) -> SolverStat:
        r"""One statistic for the chunks of a batch.

        :param Sequence[SolverStat] stats: statistics of this solver, in the order of the samples.
        :return: the statistic of all samples.
        """
        if len(stats) == 1:
            return stats[0]
        sizes = [len(stat.residual) for stat in stats]
        length = max(stat["rel_trace"].shape[1] for stat in stats)
        joint = {}
        per_sample = ("abs_lowest", "rel_lowest", "nstep", "converged", "remainder")
        for key in (key for key in per_sample if key in stats[0]):
            joint[key] = torch.cat([stat[key] for stat in stats])
        for key in ("abs_trace", "rel_trace"):
            traces = [stat[key] for stat in stats]
            joint[key] = torch.cat([torch.cat([t, t[:, -1:].expand(-1, length - t.shape[1])], dim=1) for t in traces])
        stat = SolverStat(**joint)
        stat["evaluations"] = max(s.evaluations for s in stats)
        stat["work"] = sum(s.work * size for s, size in zip(stats, sizes, strict=True)) / sum(sizes)
        self._judge(stat, stat.residual, stat.converged)
        return stat

    def _parts(self, f: Callable[[Any], Any], x0: State) -> Iterator[tuple[Callable[[Any], Any], State]]:
        chunks = self.chunks(f, x0)
        if chunks is None or not isinstance(f, SeparableMap):
            yield f, x0
        else:
            for rows in chunks:
                yield f.select(rows), take(x0, rows)

    def _solve(self, f: Callable[[Any], Any], x0: State) -> tuple[State, SolverStat]:
        layout = Layout(x0, self.batched)
        flat, start, unit, lost = FlatMap(f, layout), layout.pack(x0), None, None
        flat.use(preconditioner(f, x0) if self.precondition and self.batched else None)
        if hasattr(flat, "offset"):
            # an affine map has no scale of its own: whatever the method, the answer is linear in c
            lost = ~torch.isfinite(flat.offset).all(dim=1, keepdim=True)
            c = flat.offset.masked_fill(lost, 0.0)
            unit = unit_size(c)
            flat.offset, start = c / unit, start / unit
        x, _, info = _lookup(self.method)(flat, start, **self._settings(start.device))
        stat = self._stat(info, flat, x)
        if unit is not None and lost is not None:
            x, stat["abs_lowest"], stat["abs_trace"] = (
                x * unit,
                stat["abs_lowest"] * unit[:, 0],
                stat["abs_trace"] * unit,
            )
            if bool(lost.any()):  # b = l(b) + NaN has the solution NaN: a NaN loss must not look like a finite one
                x = x.masked_fill(lost, torch.nan)
                self._judge(stat, stat.residual.masked_fill(lost[:, 0], torch.inf), stat.converged & ~lost[:, 0])
        return layout.unpack(x), stat

    @torch.no_grad()
    def verify(self, x: Any, fx: Any, offset: Any, stat: SolverStat) -> None:
        r"""Put the measured residual of the solution of an affine map in the place of what its method computed by a recurrence.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: the point.
        :param torch.Tensor, tuple[torch.Tensor, ...] fx: its image.
        :param torch.Tensor, tuple[torch.Tensor, ...] offset: the constant of the map; the statistic gets ``remainder``.
        :param SolverStat stat: statistic of the solve, changed in place.
        :raises ConvergenceError: if the solve claimed to have converged, has not, and ``on_failure="raise"``.
        """
        layout = Layout(x, self.batched)
        flat, c = layout.pack(x), layout.pack(offset)
        stat["abs_lowest"], _ = residuals(flat, layout.pack(fx))
        unit = unit_size(c)
        left = norms((layout.pack(fx) - flat) / unit)
        stat["remainder"] = stat["rel_lowest"] = torch.where(left == 0, left, left / norms(c / unit))
        # the recurrence of a Krylov method drifts by rounding; anything beyond that contradicts it
        honest = stat.residual <= max(2 * self.tol, 1e3 * torch.finfo(flat.dtype).eps)
        if bool((stat.converged & ~honest).any()):
            stat["converged"] = stat.converged & honest
            device = flat.device.type
            cause = (
                f"products in {str(torch.get_autocast_dtype(device)).removeprefix('torch.')} cannot reach {self.tol:.1e}."
                if torch.is_autocast_enabled(device)
                else "the map is not deterministic, or couples the samples of the batch (then use Solver(..., "
                "batched=False))."
            )
            worst = stat.residual.max().item()
            stat["outcome"] = f"{self.method} reported convergence, but the measured residual is {worst:.1e}: {cause}"
            self.report(stat)
        elif self.on_failure != "ignore" and "remainder" not in self._warned:
            unsolved = stat.converged & (stat.remainder > _REMAINDER)
            if bool(unsolved.any()):
                self._warned.add("remainder")
                warnings.warn(
                    f"{self.method} met the tolerance {self.tol:.1e} with {stat.remainder[unsolved].max().item():.0%} of the cotangent "
                    "unaccounted for: the map takes small steps, the tolerance is loose for it, and the gradient is hardly better "
                    "than that of mode='jfb'. Lower tol until hook.stat.remainder is as small as the gradient shall be exact.",
                    ConvergenceWarning,
                    stacklevel=2,
                )

    def _settings(self, device: torch.device) -> dict[str, Any]:
        settings = {"max_iter": self.max_iter, "tol": self.tol}
        if _is_ours(self.method):
            default = 1 if device.type == "cpu" else _SYNC_EVERY
            settings |= {"damping": self.damping, "sync_every": self.sync_every or default}
            return settings | ({} if self.history is None else {"history": self.history})
        # the same settings under the names of TorchDEQ's own solvers
        foreign = {"stop_mode": "rel", "tau": self.damping, "m": self.history or 6, "LBFGS_thres": self.history}
        return settings | foreign | dict(self.options)

    def _stat(self, info: Mapping[str, Any], f: FlatMap, x: Tensor) -> SolverStat:
        stat = SolverStat(**info)
        if "converged" not in info:  # a foreign solver: its statistic need not be that of the point it returned
            fx = f(x)
            stat["abs_lowest"], stat["rel_lowest"] = residuals(x, fx)
            stat["converged"] = stat["rel_lowest"] <= self.tol
        stat["evaluations"], stat["work"] = f.evaluations, f.samples / max(1, len(x))
        self._judge(stat, stat.residual, stat.converged)
        return stat

    def _judge(self, stat: SolverStat, residual: Tensor, converged: Tensor) -> None:
        stat["rel_lowest"], stat["converged"] = residual, converged
        worst = residual.max().item() if residual.numel() else 0.0
        stat["outcome"] = (
            f"{self.method}: {int(converged.sum())} of {converged.numel()} samples reached the relative residual "
            f"{self.tol:.1e} in {stat.evaluations} evaluations (largest residual {worst:.1e})."
        )

    def report(self, stat: SolverStat, diagnose: Callable[[], str] | None = None) -> None:
        r"""Warn or raise, as configured, if a statistic says that the tolerance was missed.

        :param SolverStat stat: statistic of a solve.
        :param Callable, None diagnose: asked for one more sentence about the map.
        :raises ConvergenceError: if a sample missed the tolerance and ``on_failure="raise"``.
        """
        if self.on_failure == "ignore" or bool(stat.converged.all()):
            return
        finite = bool(torch.isfinite(stat.residual).all())
        cause = "tolerance" if finite else "non-finite"
        if self.on_failure == "warn" and cause in self._warned:
            return
        remedy = (
            "Raise max_iter or tol, lower damping, or make the map more contractive."
            if finite
            else "The map or its constant (for a gradient: the cotangent) is NaN or Inf: check weights, input and loss."
        )
        message = " ".join(filter(None, (stat.outcome, diagnose() if diagnose else "", remedy)))
        if self.on_failure == "raise":
            raise ConvergenceError(message, stat)
        self._warned.add(cause)
        warnings.warn(message, ConvergenceWarning, stacklevel=4)  # past torch.no_grad, to who asked for the solve


def available_methods() -> list[str]:
    r"""Names that :class:`Solver` accepts, in alphabetical order.

    :return: list of method names, those registered with TorchDEQ by others included.
    """
    return sorted({name.removeprefix(_PREFIX) for name in _registry})


def _is_ours(method: str) -> bool:
    return _PREFIX + method in _registry


def _lookup(method: str) -> Callable[..., Any]:
    return get_solver(_PREFIX + method if _is_ours(method) else method)


def fixed_point_iter(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    damping: float = 1.0,
    sync_every: int = 1,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Picard iteration :math:`x \leftarrow x + \beta (f(x) - x)`.

    :param Callable func: map of a ``(B, N)`` matrix to one of the same shape.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations.
    :param float tol: relative residual to reach.
    :param float damping: step :math:`\beta`.
    :param int sync_every: number of evaluations after which the host looks whether all samples are done.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    # transient growth is no reason to reject a plain step: there is no history to blame
    if isinstance(func, FlatMap):
        func.use(None)  # who asks for the plain iteration shall have it
    rule = Picard(damping)
    return iterate(rule, func, x0, max_iter=max_iter, tol=tol, growth=torch.inf, sync_every=sync_every)


def anderson(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    history: int = 5,
    damping: float = 1.0,
    sync_every: int = 1,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Safeguarded Anderson acceleration (:footcite:t:`walker2011anderson`) with scale-free regularisation.

    :param Callable func: map of a ``(B, N)`` matrix to one of the same shape.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations.
    :param float tol: relative residual to reach.
    :param int history: number of points mixed.
    :param float damping: step :math:`\beta` along the mixed residual.
    :param int sync_every: number of evaluations after which the host looks whether all samples are done.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    rule = Anderson(x0, min(history, max_iter), damping)
    return iterate(rule, func, x0, max_iter=max_iter, tol=tol, growth=_GROWTH, sync_every=sync_every)


def broyden(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    history: int | None = None,
    sync_every: int = 1,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Safeguarded Broyden's method (:footcite:t:`broyden1965class`) for :math:`f(x) - x = 0`.

    :param Callable func: map of a ``(B, N)`` matrix to one of the same shape.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations.
    :param float tol: relative residual to reach.
    :param int, None history: rank of the inverse before it starts anew; ``None`` keeps all.
    :param int sync_every: number of evaluations after which the host looks whether all samples are done.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    rule = Broyden(x0, min(history or max_iter, max_iter))
    return iterate(rule, func, x0, max_iter=max_iter, tol=tol, growth=_GROWTH, sync_every=sync_every)


for _function in (anderson, broyden, fixed_point_iter, gmres):
    register_solver(_PREFIX + _function.__name__, _function)
