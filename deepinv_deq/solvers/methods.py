r"""The methods that :class:`Solver <deepinv_deq.Solver>` finds by name. A new one is one file, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchdeq.solver
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.solvers.anderson import Anderson
from deepinv_deq.solvers.broyden import Broyden
from deepinv_deq.solvers.gmres import GMRES
from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.solvers.picard import Picard
from deepinv_deq.solvers.problem import Problem

#: Methods by name. Those of TorchDEQ with another name are found, too.
METHODS: dict[str, type[Method]] = {
    "anderson": Anderson,
    "broyden": Broyden,
    "fixed_point_iter": Picard,
    "gmres": GMRES,
}


def available_methods() -> list[str]:
    r"""Names that :class:`Solver` accepts, in alphabetical order.

    :return: list of method names, those registered with TorchDEQ by others included.
    """
    return sorted({*METHODS, *compat.registered_solvers()})


def foreign(name: str) -> Callable[..., Any] | None:
    r"""A solver in TorchDEQ's registry, or ``None``.

    TorchDEQ's Anderson, Broyden and plain iteration stop batch-wide, with a regularisation that depends on the scale. So a name
    in :data:`METHODS` comes first, and TorchDEQ's registry is left as it is.
    """
    try:
        return torchdeq.solver.get_solver(name)
    except AssertionError:  # torchdeq 0.1: no such solver
        return None


def run_foreign(
    name: str, problem: Problem, start: Tensor, settings: Settings, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    r"""Run a solver of TorchDEQ's registry with the same settings under TorchDEQ's names, and measure its point.

    :param str name: its name.
    :param Problem problem: the problem.
    :param torch.Tensor start: first point, of shape ``(B, N)``.
    :param Settings settings: settings of the solver.
    :param Mapping options: further keyword arguments.
    :return: the point, and the keys of its :class:`SolverStat <deepinv_deq.SolverStat>`.
    :raises ValueError: if there is no such solver.
    """
    function = foreign(name)
    if function is None:
        raise ValueError(f"The solver {name!r} is no longer in TorchDEQ's registry.")
    theirs = {"stop_mode": "rel", "tau": settings.damping, "m": settings.history or 6, "LBFGS_thres": settings.history}
    theirs |= {"max_iter": settings.max_iter, "tol": settings.tol}
    x, _, info = function(problem, start, **theirs | dict(options))
    now = problem.evaluate(x)
    measured = {"abs_lowest": now.absolute, "rel_lowest": now.relative, "plain_residual": now.plain}
    measured = {key: t.nan_to_num(torch.inf, torch.inf).to(x.dtype) for key, t in measured.items()}
    none = torch.zeros_like(now.relative, dtype=torch.bool)
    verdict = {"converged": now.relative <= settings.tol, "at_floor": none, "singular": none}
    return x, dict(info) | measured | verdict
