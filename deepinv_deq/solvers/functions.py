r"""The methods as functions in TorchDEQ's form, as in deepinv-deq 0.1: ``fn(func, x0, **settings) -> (x, [], stat)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deepinv_deq.solvers.solver import Solver
from deepinv_deq.solvers.stat import SolverStat


def _function(method: str) -> Callable[..., tuple[Tensor, list[Tensor], SolverStat]]:
    def solve(
        func: Callable[[Tensor], Tensor],
        x0: Tensor,
        *,
        max_iter: int = 50,
        tol: float = 1e-4,
        history: int | None = None,
        damping: float = 1.0,
        sync_every: int = 1,
        **_: Any,
    ) -> tuple[Tensor, list[Tensor], SolverStat]:
        r"""Solve for the fixed point of a map of ``(B, N)`` matrices; the settings are those of :class:`Solver`."""
        settings: dict[str, Any] = {"max_iter": max_iter, "tol": tol, "history": history, "damping": damping}
        x, stat = Solver(method, **settings, sync_every=sync_every, on_failure="ignore", chunk_size=max(1, len(x0)))(
            func, x0
        )
        return x, [], stat

    solve.__name__ = solve.__qualname__ = method
    return solve


anderson = _function("anderson")
broyden = _function("broyden")
fixed_point_iter = _function("fixed_point_iter")
gmres = _function("gmres")
