r"""Why a solve may have failed: the stepsize against the norm of the operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deq.compat import random_numbers
from deepinv_deq.iterations.capture import Capture


def diagnose(capture: Capture) -> str:
    r"""Compare the stepsize with the norm of the operator.

    :param Capture capture: what the map depends on.
    :return: a sentence with the stepsize that would do, or an empty string.
    """
    replica = capture.replicate()[0]
    iteration, physics = replica.roots
    eta = float(torch.as_tensor(iteration.numbers().get("stepsize", 0.0)).detach().max())
    try:
        sqnorm = _squared_norm(physics, physics.A_adjoint(capture._y()))
    except Exception:  # whatever is wrong with this operator, the message of the solve matters more
        return ""
    safe = iteration.safe_stepsize(sqnorm)
    if not eta >= 2 * safe:  # NaN for an operator that is zero
        return ""
    return (
        f"The stepsize {eta:.3g} diverges for this operator, whose squared norm is {sqnorm:.3g} "
        f"(physics.compute_sqnorm): use stepsize={safe:.2g}."
    )


@torch.no_grad()
def _squared_norm(physics: Any, like: Tensor) -> float:
    r"""The squared norm of an operator by the power method, with a start of its own: ``physics.compute_sqnorm`` draws one from the
    global random generators, which other threads use at the same time."""
    x = random_numbers(np.random.default_rng(0), like.shape, normal=True).to(like.device, like.dtype)
    size = old = torch.linalg.vector_norm(x)
    for _ in range(100):
        x = physics.A_adjoint_A(x / size)
        size, old = torch.linalg.vector_norm(x), size
        if not bool((size - old).abs() > 1e-3 * old):
            break
    return float(size)
