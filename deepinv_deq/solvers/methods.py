r"""The methods that :class:`Solver <deepinv_deq.Solver>` finds by name. A new one is one file, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchdeq.solver

from deepinv_deq import compat
from deepinv_deq.solvers.anderson import Anderson
from deepinv_deq.solvers.broyden import Broyden
from deepinv_deq.solvers.gmres import GMRES
from deepinv_deq.solvers.loop import Method
from deepinv_deq.solvers.picard import Picard

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
