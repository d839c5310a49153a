r"""NaN and Inf in weights, stepsizes, physics and starts."""

from __future__ import annotations

import pytest
import torch

from deepinv_deq import (
    ConvergenceError,
    ConvergenceWarning,
    Solver,
)
from tests.faults.common import (
    TRIED,
)
from tests.problems import imaging, relative_error


@pytest.mark.parametrize(
    "where,value",  # an infinite weight is none of them: tanh makes a finite map of it
    [("weight", torch.nan), *((where, v) for where in ("stepsize", "physics", "init") for v in (torch.nan, torch.inf))],
)
def test_what_is_not_finite_is_said_and_spoils_only_its_sample(where, value):
    model, physics, _, y = imaging(batch=2, tol=1e-8)
    init = None
    good = model(y, physics).detach()
    with torch.no_grad():
        if where == "weight":
            model.iteration.denoiser.conv.weight[0, 0, 1, 1] = value
        elif where == "stepsize":
            model.iteration.stepsize.fill_(value)
        elif where == "physics":
            physics.matrix = physics.matrix.clone()
            physics.matrix[0, 0] = value
        else:
            init = good.clone()
            init[0, 0, 0, 0] = value
    with pytest.warns(ConvergenceWarning, match="NaN or Inf: check weights, input and loss"):
        x_hat = model(y, physics, init=init)
    stat = model.forward_stat
    assert not bool(stat.converged[0]) and bool(stat.residual[0].isinf()) and "of 2 samples" in stat.outcome
    if where == "init":  # the other sample has nothing to do with it
        assert bool(stat.converged[1]) and relative_error(x_hat[1], good[1]) < 1e-6
    if where in ("weight", "stepsize"):
        assert bool(x_hat.isfinite().all())  # the best that was there: the start
        with pytest.warns(ConvergenceWarning):
            x_hat.sum().backward()
        assert not all(bool(p.grad.isfinite().all()) for p in model.parameters())  # no finite gradient out of nothing
    model.solver = Solver("anderson", on_failure="raise")
    with pytest.raises(ConvergenceError, match="NaN or Inf"):
        model(y, physics, init=init)
    TRIED["NaN and Inf in weights, stepsize, physics or start"] += 1
