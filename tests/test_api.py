r"""The public names, and that every one is documented."""

from __future__ import annotations

import importlib
import inspect

import pytest

import deepinv_deq

NAMES = (
    "DEQReconstructor DifferentiableMap ModularIDHook FromOptim Solver DEGrad DEProx FixedPointIteration EquilibriumUNet PipelineEquivariance "
    "IterationEquivariance"
).split()

OF_0_1 = {  # every public class and function of version 0.1, by the module that it was in
    "": "ConvergenceError ConvergenceWarning DEADMM DEGrad DEHQS DEProx DEQReconstructor EquilibriumUNet FixedPointIteration "
    "FixedPointResidual FromOptim IterationEquivariance ModularIDHook PipelineEquivariance Solver SolverEvaluations SolverStat "
    "available_methods",
    ".datasets": "ct_slice load_images mr_slice phantoms",
    ".denoisers": "EquilibriumUNet",
    ".distributed": "SynchronisedDenoiser",
    ".equivariance": "IterationEquivariance PipelineEquivariance",
    ".from_optim": "FromOptim",
    ".implicit": "DifferentiableMap ModularIDHook",
    ".iterations": "DEADMM DEGrad DEHQS DEProx FixedPointIteration measurement",
    ".metrics": "FixedPointResidual SolverEvaluations solving_model",
    ".physics": "SparseLinearPhysics",
    ".reconstructor": "DEQReconstructor",
    ".solvers": "ConvergenceError ConvergenceWarning Solver SolverStat anderson available_methods broyden fixed_point_iter",
    ".training": "ResumableTrainer latest_checkpoint _read",
}


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in OF_0_1.items() for name in names.split()])
def test_what_was_imported_from_0_1_is_still_there(module, name):
    assert callable(getattr(importlib.import_module("deepinv_deq" + module), name))


def test_the_names_of_the_design_are_there():
    assert set(NAMES) <= set(deepinv_deq.__all__)
    assert all(hasattr(deepinv_deq, name) for name in deepinv_deq.__all__)


@pytest.mark.parametrize("name", deepinv_deq.__all__)
def test_public_docstrings_name_every_parameter(name):
    cls = getattr(deepinv_deq, name)
    assert cls.__doc__
    methods = [m for n, m in vars(cls).items() if inspect.isfunction(m) and not n.startswith("_") or n == "__call__"]
    built = "__init__" in vars(cls) and not getattr(cls, "_is_protocol", False)  # a protocol has one that nobody calls
    documented = [(cls.__init__, cls.__doc__)] if built else []
    for function, doc in documented + [(m, m.__doc__) for m in methods]:
        assert doc, function
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in ("self", "args") and not parameter.name.startswith("_"):
                assert f" {parameter.name}:" in doc, f"{function.__qualname__} does not document {parameter.name}"
