r"""Deep equilibrium models for DeepInverse, with exact implicit gradients."""

import deepinv_deq._versions  # noqa: F401  refuses an old deepinv
from deepinv_deq.certificate import Certificate
from deepinv_deq.denoisers import EquilibriumUNet
from deepinv_deq.equivariance import IterationEquivariance, PipelineEquivariance
from deepinv_deq.implicit import DifferentiableMap, ModularIDHook
from deepinv_deq.iterations import DEADMM, DEHQS, DEGrad, DEProx, FixedPointIteration, FromOptim
from deepinv_deq.losses import ContractionLoss, TurnedOperatorLoss
from deepinv_deq.metrics import ContractionFactor, FixedPointError, FixedPointResidual, SolverEvaluations
from deepinv_deq.reconstructor import DEQReconstructor
from deepinv_deq.solvers import ConvergenceError, ConvergenceWarning, Solver, SolverStat, available_methods

__version__ = "0.2.0"

__all__ = [
    "Certificate",
    "ContractionFactor",
    "ContractionLoss",
    "TurnedOperatorLoss",
    "FixedPointError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DEADMM",
    "DEGrad",
    "DEHQS",
    "DEProx",
    "DEQReconstructor",
    "DifferentiableMap",
    "EquilibriumUNet",
    "FixedPointIteration",
    "FixedPointResidual",
    "FromOptim",
    "IterationEquivariance",
    "ModularIDHook",
    "PipelineEquivariance",
    "Solver",
    "SolverEvaluations",
    "SolverStat",
    "available_methods",
]
