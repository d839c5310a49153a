r"""Fixed-point solvers: :class:`Solver` is settings and a call, :class:`SolverStat` says what happened.

A new method is one class in one file (see :class:`Method`), and one line in :data:`METHODS`.
"""

from deepinv_deq.solvers.loop import Method, Settings
from deepinv_deq.solvers.methods import METHODS, available_methods
from deepinv_deq.solvers.solver import Solver
from deepinv_deq.solvers.stat import ConvergenceError, ConvergenceWarning, SolverStat

# last: these functions have the names of modules of this package
from deepinv_deq.solvers.functions import anderson, broyden, fixed_point_iter, gmres  # isort: skip

__all__ = [
    "METHODS",
    "ConvergenceError",
    "ConvergenceWarning",
    "Method",
    "Settings",
    "Solver",
    "SolverStat",
    "anderson",
    "available_methods",
    "broyden",
    "fixed_point_iter",
    "gmres",
]
