r"""The public names, and that every one is documented."""

from __future__ import annotations

import inspect

import pytest

import deepinv_deq

NAMES = (
    "DEQReconstructor ModularIDHook Solver DEGrad DEProx FixedPointIteration EquilibriumUNet PipelineEquivariance "
    "IterationEquivariance"
).split()


def test_the_names_of_the_design_are_there():
    assert set(NAMES) <= set(deepinv_deq.__all__)
    assert all(hasattr(deepinv_deq, name) for name in deepinv_deq.__all__)


@pytest.mark.parametrize("name", deepinv_deq.__all__)
def test_public_docstrings_name_every_parameter(name):
    cls = getattr(deepinv_deq, name)
    assert cls.__doc__
    methods = [m for n, m in vars(cls).items() if inspect.isfunction(m) and not n.startswith("_") or n == "__call__"]
    documented = [(cls.__init__, cls.__doc__)] if "__init__" in vars(cls) else []
    for function, doc in documented + [(m, m.__doc__) for m in methods]:
        assert doc, function
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in ("self", "args") and not parameter.name.startswith("_"):
                assert f" {parameter.name}:" in doc, f"{function.__qualname__} does not document {parameter.name}"
