r"""Fixed-point solvers: ``solver(f, x0) -> (x, stat)``.

:class:`Solver` is the one entry point. It lays a state of any shape out as one real matrix, looks the method up in
TorchDEQ's registry, runs it without an autograd graph, and says honestly how it went.

To add a method, write one function ``fn(func, x0, *, max_iter, tol, history, damping, **_)`` that maps a ``(B, N)``
matrix to ``(x, samples, stat)``, and register it with :func:`torchdeq.solver.register_solver`. Methods of the
quasi-Newton family only need a proposal rule: see :class:`_Anderson` and :func:`_iterate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torchdeq.solver import _solvers as _registry
from torchdeq.solver import get_solver, register_solver
from torchdeq.solver.stat import SolverStat as _TorchDEQStat

State = Tensor | tuple[Tensor, ...]
_FAILURE = ("warn", "raise", "ignore")
# TorchDEQ's own method of the same name is wrong, batch-wide or scale-dependent (shared/FACTS.md), so
# ``Solver("anderson")`` runs ours; TorchDEQ's stays available to everybody else under its plain name.
_PREFIX = "deepinv_deq."
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
    ``abs_trace``, ``rel_trace``, ``nstep``) and three more, which are also attributes:

    - ``evaluations`` (``int``): how often the map was evaluated.
    - ``converged`` (``bool`` tensor of shape ``(B,)``): whether the sample met its tolerance.
    - ``outcome`` (``str``): one sentence for humans.

    ``nstep`` is the number of evaluations after which each sample was done. Traces have shape ``(B, n)``: column
    :math:`k` holds the residual of the :math:`k`-th evaluated point; a sample that is done repeats its last value.
    """

    @property
    def evaluations(self) -> int:
        r"""Number of evaluations of the map (for a backward solve: of vector-Jacobian products)."""
        return self["evaluations"]

    @property
    def residual(self) -> Tensor:
        r"""Relative residual :math:`\|f(x) - x\| / \|f(x)\|` of the point that was returned, of shape ``(B,)``."""
        return self["rel_lowest"]

    @property
    def converged(self) -> Tensor:
        r"""Whether each sample met its tolerance, of shape ``(B,)``."""
        return self["converged"]

    @property
    def outcome(self) -> str:
        r"""What happened, in one sentence."""
        return self["outcome"]


@dataclass(frozen=True)
class AffineMap:
    r"""The map :math:`b \mapsto \ell(b) + c`, which lets a Krylov method use its two parts.

    :param Callable linear: the linear part :math:`\ell`.
    :param torch.Tensor, tuple[torch.Tensor, ...] offset: the constant :math:`c`, of the shape of the state.
    """

    linear: Callable[[Any], Any]
    offset: Any

    def __call__(self, b: Any) -> Any:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] b: a state.
        :return: :math:`\ell(b) + c`.
        """
        out = self.linear(b)
        if isinstance(out, tuple):
            return tuple(o + c for o, c in zip(out, self.offset, strict=True))
        return out + self.offset


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
        GMRES' restart length (default: no restart).
    :param float damping: step :math:`\beta` along the residual in Picard and Anderson steps, in :math:`(0, 1]`.
    :param str on_failure: ``"warn"`` (once per solver and cause), ``"raise"`` or ``"ignore"`` where the tolerance is missed.
    :param bool batched: ``False`` treats the whole state as one sample, for maps that couple the samples of a batch.
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
        return hash((self.method, self.max_iter, self.tol, self.history, self.damping, self.on_failure, self.batched))

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
        layout = _Layout(x0, self.batched)
        flat, start, unit, lost = layout.flatten(f), layout.pack(x0), None, None
        if isinstance(flat, AffineMap):  # it has no scale of its own: whatever the method, the answer is linear in c
            lost = ~torch.isfinite(flat.offset).all(dim=1, keepdim=True)
            c = flat.offset.masked_fill(lost, 0.0)
            unit = _unit(c)
            flat, start = AffineMap(flat.linear, c / unit), start / unit
        counted = _Counted(flat)
        x, _, info = _lookup(self.method)(counted, start, **self._settings())
        stat = self._stat(info, counted, x)
        if unit is not None and lost is not None:
            x, stat["abs_lowest"], stat["abs_trace"] = (
                x * unit,
                stat["abs_lowest"] * unit[:, 0],
                stat["abs_trace"] * unit,
            )
            if bool(lost.any()):  # b = l(b) + NaN has the solution NaN: a NaN loss must not look like a finite one
                x = x.masked_fill(lost, torch.nan)
                self._judge(stat, stat.residual.masked_fill(lost[:, 0], torch.inf), stat.converged & ~lost[:, 0])
        self.report(stat, getattr(f, "diagnose", None))
        torch.clear_autocast_cache()  # casts made here carry no graph and must not serve a taped evaluation
        return layout.unpack(x), stat

    @torch.no_grad()
    def verify(self, x: Any, fx: Any, stat: SolverStat) -> None:
        r"""Put the measured residual of a returned point in the place of the one its method computed by a recurrence.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: the point.
        :param torch.Tensor, tuple[torch.Tensor, ...] fx: its image.
        :param SolverStat stat: statistic of the solve, changed in place.
        :raises ConvergenceError: if the solve claimed to have converged, has not, and ``on_failure="raise"``.
        """
        layout = _Layout(x, self.batched)
        flat = layout.pack(x)
        stat["abs_lowest"], stat["rel_lowest"] = _residual(flat, layout.pack(fx))
        # the recurrence of a Krylov method drifts by rounding; anything beyond that contradicts it
        honest = stat.residual <= max(2 * self.tol, 1e3 * torch.finfo(flat.dtype).eps)
        if bool((stat.converged & ~honest).any()):
            stat["converged"] = stat.converged & honest
            stat["outcome"] = (
                f"{self.method} reported convergence, but the measured residual is {stat.residual.max().item():.1e}: the "
                "map is not deterministic, or couples the samples of the batch (then use Solver(..., batched=False))."
            )
            self.report(stat)

    def _settings(self) -> dict[str, Any]:
        settings = {"max_iter": self.max_iter, "tol": self.tol}
        if _is_ours(self.method):
            return settings | {"damping": self.damping} | ({} if self.history is None else {"history": self.history})
        # the same settings under the names of TorchDEQ's own solvers
        foreign = {"stop_mode": "rel", "tau": self.damping, "m": self.history or 6, "LBFGS_thres": self.history}
        return settings | foreign | dict(self.options)

    def _stat(self, info: Mapping[str, Any], f: _Counted, x: Tensor) -> SolverStat:
        stat = SolverStat(**info)
        if "converged" not in info:  # a foreign solver: its statistic need not be that of the point it returned
            fx = f(x)
            stat["abs_lowest"], stat["rel_lowest"] = _residual(x, fx)
            stat["converged"] = stat["rel_lowest"] <= self.tol
        stat["evaluations"] = f.evaluations
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


# --------------------------------------------------------------------------------------------------------------------
# States of any shape as one real (B, N) matrix


class _Counted:
    r"""A map that counts its evaluations; ``tau`` is how TorchDEQ's own plain iteration damps."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self._f, self._count = f, [0]
        if isinstance(f, AffineMap):
            # no method of self: the cycle would keep the graph that f holds alive until the garbage collector comes
            self.offset, self.linear = f.offset, _counting(f.linear, self._count)

    @property
    def evaluations(self) -> int:
        return self._count[0]

    def __call__(self, x: Tensor, tau: float = 1.0) -> Tensor:
        fx = _counting(self._f, self._count)(x)
        return fx if tau == 1.0 else tau * fx + (1 - tau) * x


def _counting(f: Callable[[Tensor], Tensor], count: list[int]) -> Callable[[Tensor], Tensor]:
    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        return f(x)

    return counted


class _Layout:
    r"""How a state (a tensor or a tuple of tensors, real or complex) lies in one real ``(B, N)`` matrix."""

    def __init__(self, state: State, batched: bool):
        self.single = isinstance(state, Tensor)
        tensors = (state,) if self.single else tuple(state)
        if not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise ValueError(f"A state must be a tensor or a non-empty tuple of tensors, got {type(state).__name__}.")
        self.like = tensors
        joint = not batched or all(t.ndim <= 1 for t in tensors)
        self.batch = 1 if joint else tensors[0].shape[:1].numel()
        if not joint and any(t.shape[:1] != tensors[0].shape[:1] for t in tensors):
            raise ValueError(
                "All tensors of a state must have the same batch size in dimension 0, got shapes "
                f"{[tuple(t.shape) for t in tensors]}. Use Solver(..., batched=False) for one joint sample."
            )
        # real numbers per sample; told explicitly, because an empty batch gives reshape(-1) nothing to infer them from
        self.sizes = [(t.shape if joint else t.shape[1:]).numel() * (2 if t.is_complex() else 1) for t in tensors]
        # half precision is for the map; the solver's own sums are in single precision at least
        real = [t.real.dtype if t.is_complex() else t.dtype for t in tensors]
        self.dtype = torch.float32
        for dtype in real:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def pack(self, state: State) -> Tensor:
        tensors = (state,) if isinstance(state, Tensor) else tuple(state)
        if [t.shape for t in tensors] != [t.shape for t in self.like]:
            raise ValueError(
                f"The map must return the shape it is given: {[tuple(t.shape) for t in self.like]} became "
                f"{[tuple(t.shape) for t in tensors]}."
            )
        reals = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        rows = [t.reshape(self.batch, size) for t, size in zip(reals, self.sizes, strict=True)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)).to(self.dtype)

    def unpack(self, flat: Tensor) -> State:
        out, start = [], 0
        for t, size in zip(self.like, self.sizes, strict=True):
            rows = flat[:, start : start + size]
            if t.is_complex():
                rows = torch.view_as_complex(rows.to(t.real.dtype).reshape(*t.shape, 2).contiguous())
            out.append(rows.reshape(t.shape).to(t.dtype))
            start += size
        return out[0] if self.single else tuple(out)

    def flatten(self, f: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
        if isinstance(f, AffineMap):
            return AffineMap(lambda b: self.pack(f.linear(self.unpack(b))), self.pack(f.offset))
        return lambda x: self.pack(f(self.unpack(x)))


# --------------------------------------------------------------------------------------------------------------------
# Nonlinear methods: one safeguarded loop, one proposal rule each


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def _residual(x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor]:
    r"""Absolute and relative residual per sample; Inf where they are not finite, 0 where f(x) = x = 0."""
    absolute, scale = _norm(fx - x), _norm(fx)
    relative = torch.where(absolute == 0, absolute, absolute / scale)
    bad = ~(torch.isfinite(absolute) & torch.isfinite(scale))
    return absolute.masked_fill(bad, torch.inf), relative.masked_fill(bad, torch.inf)


def _unit(c: Tensor) -> Tensor:
    r"""A power of two of the size of each row, of shape ``(B, 1)``: dividing by it is exact."""
    size = c.abs().amax(dim=1, keepdim=True) if c.shape[1] else c.new_ones(c.shape[0], 1)
    exponent = torch.frexp(size).exponent
    return torch.where((size > 0) & torch.isfinite(size), torch.ldexp(torch.ones_like(size), exponent), 1.0)


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask[:, None], a, b)


def _iterate(
    propose: Callable[[Tensor, Tensor, Tensor], Tensor],
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int,
    tol: float,
    growth: float,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Run ``x <- propose(x, f(x), restart)`` for each sample until its relative residual is below ``tol``.

    A point whose residual is more than ``growth`` times the best one (or not finite) is rejected: the rule is told to
    forget its history for that sample (``restart``), and the next point is a damped step from the best one. Every
    rejection in a row doubles what is accepted, lest the transient growth of a non-normal map traps the solve.

    :param Callable propose: next point from the present one, its image, and the mask of samples to restart from there.
    :param float growth: largest accepted ratio of a point's residual to the best one so far.
    """
    eps = torch.finfo(x0.dtype).eps
    x, best_x, best_fx = x0, x0, x0
    best = x0.new_full((x0.shape[0],), torch.inf)
    best_rel, rejections, nstep = best.clone(), torch.zeros_like(best), torch.zeros_like(best)
    active = torch.ones_like(best, dtype=torch.bool)
    abs_trace, rel_trace, floor = [], [], torch.zeros_like(best)

    for k in range(1, max_iter + 1):
        fx = func(x)
        absolute, relative = _residual(x, fx)
        if k == 1:  # a fixed point at zero has no relative accuracy: rounding of the first image is all one can ask for
            floor = eps * _norm(fx).nan_to_num(0.0, 0.0)
        done = (relative <= tol) | (absolute <= floor)
        better = active & ((absolute < best) | done)
        restart = active & ~better & ~((absolute <= growth * 2**rejections * best) & torch.isfinite(absolute))
        best_x, best_fx = _where(better, x, best_x), _where(better, fx, best_fx)
        best, best_rel = torch.where(better, absolute, best), torch.where(better, relative, best_rel)
        nstep = torch.where(active, float(k), nstep)
        active = active & ~done & torch.isfinite(best)
        abs_trace.append(torch.where(active | better, absolute, best))
        rel_trace.append(torch.where(active | better, relative, best_rel))
        if k == max_iter or not active.any():
            break
        rejections = torch.where(better, torch.zeros_like(best), rejections + restart)
        fallback = best_x + (0.5**rejections)[:, None] * (best_fx - best_x)
        rejected = restart | ~active
        x_next = propose(_where(rejected, best_x, x), _where(rejected, best_fx, fx), restart)
        x = _where(active, _where(restart | ~torch.isfinite(x_next).all(dim=1), fallback, x_next), best_x)

    info = {
        "abs_lowest": best,
        "rel_lowest": best_rel,
        "abs_trace": torch.stack(abs_trace, dim=1),
        "rel_trace": torch.stack(rel_trace, dim=1),
        "nstep": nstep,
        "converged": (best_rel <= tol) | (best <= floor),
    }
    return best_x, [], info


class _Anderson:
    r"""Anderson mixing of the last ``history`` points (type II), for every sample its own.

    The weights minimise :math:`\|\sum_i \alpha_i g_i\|` with :math:`\sum_i \alpha_i = 1`, where :math:`g_i = f(x_i) -
    x_i`. The Gram matrix is scaled to a unit diagonal before it is regularised, so neither the size of the residual nor
    its fall over the history changes the weights; one row of it is new per step.
    """

    def __init__(self, x0: Tensor, history: int, damping: float):
        batch, size = x0.shape
        self.images, self.residuals = x0.new_zeros(2, batch, history, size)
        self.gram = x0.new_zeros(batch, history, history, dtype=torch.float64)
        self.valid = torch.zeros(batch, history, dtype=torch.bool, device=x0.device)
        self.lam = 100 * torch.finfo(x0.dtype).eps  # of a unit diagonal: above rounding, far below any residual ratio
        self.damping, self.slot, self.history = damping, 0, history

    def __call__(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        slot, self.slot = self.slot, (self.slot + 1) % self.history
        g = fx - x
        self.images[:, slot], self.residuals[:, slot] = fx, g
        self.valid &= ~restart[:, None]
        self.valid[:, slot] = True
        row = torch.bmm(self.residuals, g[:, :, None])[..., 0].double()
        self.gram[:, slot, :], self.gram[:, :, slot] = row, row
        alpha = self._weights().to(x.dtype)[:, None]
        mixed = torch.bmm(alpha, self.images)[:, 0]
        if self.damping == 1.0:
            return mixed
        return mixed - (1 - self.damping) * torch.bmm(alpha, self.residuals)[:, 0]

    def _weights(self) -> Tensor:
        scale = torch.diagonal(self.gram, dim1=1, dim2=2).rsqrt()
        scale = torch.where(self.valid & torch.isfinite(scale), scale, 0.0)
        unit = scale[:, :, None] * self.gram * scale[:, None, :]
        torch.diagonal(unit, dim1=1, dim2=2).add_(torch.where(scale > 0, self.lam, 1.0))
        weights = scale * torch.linalg.solve_ex(unit, scale[..., None]).result[..., 0]
        total = weights.sum(dim=1, keepdim=True)
        newest = torch.nn.functional.one_hot(torch.tensor((self.slot - 1) % self.history), self.history)
        return torch.where(total.abs() > 0, weights / total, newest.to(weights))


class _Broyden:
    r"""Broyden's good method: :math:`x - B g(x)` with :math:`B \approx (\partial g / \partial x)^{-1}`, :math:`B_0 = -I`.

    The inverse is kept as :math:`-I + \sum_i u_i v_i^\top` per sample, and starts anew when ``history`` is full.
    """

    def __init__(self, x0: Tensor, history: int):
        self.u, self.v = x0.new_zeros(2, x0.shape[0], history, x0.shape[1])
        self.used, self.history = 0, history
        self.previous: tuple[Tensor, Tensor] | None = None

    def _apply(self, left: Tensor, right: Tensor, g: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(right, g[:, :, None]).transpose(1, 2), left)[:, 0] - g

    def __call__(self, x: Tensor, fx: Tensor, restart: Tensor) -> Tensor:
        g = fx - x
        if self.used == self.history:
            self.u.zero_(), self.v.zero_()
            self.used, self.previous = 0, None
        keep = (~restart)[:, None, None]
        u, v = self.u[:, : self.used + 1], self.v[:, : self.used + 1]
        if restart.any():
            u.mul_(keep), v.mul_(keep)
        if self.previous is not None:
            dx, dg = x - self.previous[0], g - self.previous[1]
            vt = self._apply(v, u, dx)
            denominator = (vt * dg).sum(dim=1)
            new_u = (dx - self._apply(u, v, dg)) / denominator[:, None]
            usable = ~restart & torch.isfinite(new_u).all(dim=1) & (dx != 0).any(dim=1)
            u[:, -1], v[:, -1] = _where(usable, new_u, torch.zeros_like(x)), _where(usable, vt, torch.zeros_like(x))
            self.used += 1
        self.previous = x, g
        return x - self._apply(u, v, g)


def fixed_point_iter(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    damping: float = 1.0,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Picard iteration :math:`x \leftarrow x + \beta (f(x) - x)`.

    :param Callable func: map of a ``(B, N)`` matrix to one of the same shape.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations.
    :param float tol: relative residual to reach.
    :param float damping: step :math:`\beta`.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    # transient growth is no reason to reject a plain step: there is no history to blame
    return _iterate(lambda x, fx, _: x + damping * (fx - x), func, x0, max_iter, tol, growth=torch.inf)


def anderson(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    history: int = 5,
    damping: float = 1.0,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Safeguarded Anderson acceleration (:footcite:t:`walker2011anderson`) with scale-free regularisation.

    :param Callable func: map of a ``(B, N)`` matrix to one of the same shape.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations.
    :param float tol: relative residual to reach.
    :param int history: number of points mixed.
    :param float damping: step :math:`\beta` along the mixed residual.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    return _iterate(_Anderson(x0, min(history, max_iter), damping), func, x0, max_iter, tol, growth=_GROWTH)


def broyden(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    history: int | None = None,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""Safeguarded Broyden's method (:footcite:t:`broyden1965class`) for :math:`f(x) - x = 0`.

    :param Callable func: map of a ``(B, N)`` matrix to one of the same shape.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations.
    :param float tol: relative residual to reach.
    :param int, None history: rank of the inverse before it starts anew; ``None`` keeps all.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    return _iterate(_Broyden(x0, min(history or max_iter, max_iter)), func, x0, max_iter, tol, growth=_GROWTH)


# --------------------------------------------------------------------------------------------------------------------
# Affine maps: a Krylov method


def gmres(
    func: Any,
    x0: Tensor,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    history: int | None = None,
    **_: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    r"""GMRES (:footcite:t:`saad1986gmres`) for :math:`b = \ell(b) + c`, that is :math:`(I - \ell) b = c`.

    One evaluation of :math:`\ell` per step; no method that sees :math:`\ell` through products alone needs fewer.

    :param Callable func: an affine map of ``(B, N)`` matrices; an :class:`AffineMap` saves the evaluation at zero that
        would otherwise give :math:`c`.
    :param torch.Tensor x0: first point, of shape ``(B, N)``.
    :param int max_iter: largest number of evaluations; for a map that is not an :class:`AffineMap`, one of them measures the
        residual of the answer.
    :param float tol: relative residual :math:`\|\ell(b) + c - b\| / \|\ell(b) + c\|` to reach.
    :param int, None history: number of basis vectors kept before a restart; ``None`` never restarts.
    :return: in TorchDEQ's form, the point, an empty list and a dictionary for :class:`SolverStat`.
    """
    affine = hasattr(func, "linear") and hasattr(func, "offset")
    zero_start = not bool(x0.any())
    evaluations = 0 if affine and zero_start else 1
    if affine:
        linear, image = func.linear, func.offset if zero_start else func(x0)
    else:
        offset = image = func(torch.zeros_like(x0))
        if not zero_start:
            image, evaluations = func(x0), 2
        unit = _unit(offset)  # at the size of the offset, or the difference would be all rounding
        linear = lambda b: (func(unit * b) - offset) / unit  # noqa: E731
    x = x0
    absolute, relative = _residual(x, image)
    floor = torch.finfo(x.dtype).eps * _norm(image)  # for a solution at zero, which has no relative accuracy
    abs_trace, rel_trace = [absolute], [relative]
    active, nstep = torch.isfinite(absolute) & (relative > tol), torch.full_like(absolute, evaluations)
    check = 0 if affine else 1  # nobody says that this map is affine: its true residual is the only one to report

    while bool(active.any()) and evaluations + check < max_iter:
        cycle = min(history or max_iter, max_iter - evaluations - check)
        tried = active
        x, absolute, relative, active, used = _arnoldi_cycle(
            linear, x, image - x, absolute, relative, active, cycle, tol, floor, (abs_trace, rel_trace)
        )
        evaluations += int(used.max())
        nstep = nstep + used
        if affine and (evaluations >= max_iter or not bool(active.any())):
            break
        image, evaluations = func(x), evaluations + 1  # the true residual, from which the recurrence starts anew
        nstep = torch.where(tried, nstep + 1, nstep)
        absolute, relative = _residual(x, image)
        active = tried & torch.isfinite(absolute) & (relative > tol) & (absolute > floor)

    info = {
        "abs_lowest": absolute,
        "rel_lowest": relative,
        "abs_trace": torch.stack(abs_trace, dim=1),
        "rel_trace": torch.stack(rel_trace, dim=1),
        "nstep": nstep,
        "converged": (relative <= tol) | (absolute <= floor),
    }
    return x, [], info


def _arnoldi_cycle(
    linear: Callable[[Tensor], Tensor],
    x: Tensor,
    residual: Tensor,
    absolute: Tensor,
    relative: Tensor,
    active: Tensor,
    cycle: int,
    tol: float,
    floor: Tensor,
    traces: tuple[list[Tensor], list[Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""One GMRES cycle from ``x``: at most ``cycle`` products, per sample the least residual over the Krylov space.

    :return: the point, its residuals by the recurrence, which samples want more, and how many products each one took.
    """
    batch, size = x.shape
    beta = _norm(residual).double()
    basis = x.new_zeros(batch, min(cycle, 15) + 1, size)  # grows, since few solves need all of their budget
    basis[:, 0] = _where(active, residual / _norm(residual)[:, None], torch.zeros_like(x))
    overlap = [(x * basis[:, 0]).sum(dim=1).double()]  # <x, v_j>: with it the norm of the image needs no product
    hessenberg = x.new_zeros(batch, cycle + 1, cycle, dtype=torch.float64)
    weights, x_norm2 = x.new_zeros(batch, cycle, dtype=torch.float64), _norm(x).double() ** 2
    used = torch.zeros_like(absolute)
    for j in range(cycle):
        known = basis[:, : j + 1]
        w = basis[:, j] - linear(basis[:, j])
        finite = torch.isfinite(w).all(dim=1)
        w = _where(finite & active, w, torch.zeros_like(w))
        for _ in range(2):  # once more: classical Gram-Schmidt loses orthogonality in single precision
            h = torch.bmm(known, w[:, :, None])
            w = w - torch.bmm(h.transpose(1, 2), known)[:, 0]
            hessenberg[:, : j + 1, j] += h[..., 0].double()
        length = _norm(w)
        hessenberg[:, j + 1, j] = length.double()
        if j + 1 == basis.shape[1]:
            basis = torch.cat([basis, torch.zeros_like(basis)], dim=1)
        basis[:, j + 1] = _where(length > 0, w / length[:, None], torch.zeros_like(w))
        overlap.append((x * basis[:, j + 1]).sum(dim=1).double())

        y, rho = _least_squares(hessenberg[:, : j + 2, : j + 1], beta)
        image = torch.cat([y, y.new_zeros(batch, 1)], dim=1) + rho
        image_norm2 = x_norm2 + 2 * (image * torch.stack(overlap, dim=1)).sum(dim=1) + (image * image).sum(dim=1)
        step_abs = rho.norm(dim=1)
        step_rel = torch.where(step_abs == 0, step_abs, step_abs / image_norm2.clamp_min(0).sqrt())
        update = active & finite
        weights[:, : j + 1] = torch.where(update[:, None], y, weights[:, : j + 1])
        absolute = torch.where(update, step_abs.to(x.dtype), absolute)
        relative = torch.where(update, step_rel.to(x.dtype), relative)
        used = used + active
        # length 0: the space is exhausted, the answer exact
        active = update & (step_rel > tol) & (step_abs > floor) & (length > 0)
        traces[0].append(absolute)
        traces[1].append(relative)
        if not bool(active.any()):
            break
    taken = len(overlap) - 1
    step = torch.bmm(weights[:, None, :taken].to(x.dtype), basis[:, :taken])[:, 0]
    return x + step, absolute, relative, active, used


def _least_squares(hessenberg: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    r"""Least-squares weights ``y`` for :math:`\beta e_1 \approx H y`, and the remainder :math:`\beta e_1 - H y`."""
    rhs = hessenberg.new_zeros(hessenberg.shape[0], hessenberg.shape[1], 1)
    rhs[:, 0, 0] = beta
    q, r = torch.linalg.qr(hessenberg)
    # a frozen sample has zero columns: an infinite pivot gives it the weight zero
    pivot = torch.diagonal(r, dim1=1, dim2=2)
    pivot.masked_fill_(pivot == 0, torch.inf)
    y = torch.linalg.solve_triangular(r, q.transpose(1, 2) @ rhs, upper=True).nan_to_num(0.0)
    return y[..., 0], (rhs - hessenberg @ y)[..., 0]


for _function in (anderson, broyden, fixed_point_iter, gmres):
    register_solver(_PREFIX + _function.__name__, _function)
