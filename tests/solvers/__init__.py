r"""Tests of :mod:`deepinv_deq.solvers`, in files whose names begin with the module they test."""

import torch

from tests.problems import F64

OURS = ["anderson", "broyden", "fixed_point_iter", "gmres"]
NONLINEAR = ["anderson", "broyden", "fixed_point_iter"]
RATES = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.0, 0.3], dtype=F64)


def norm(x):
    return x.flatten(1).norm(dim=1)


def residual(f, x):
    r"""The criterion of a map without natural units; 1 at zero."""
    change, size = norm(f(x) - x), norm(x)
    return change / size.where(size > 0, change)
