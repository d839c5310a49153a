r"""Tests of :mod:`deepinv_deq.solvers`, a file a module."""

OURS = ["anderson", "broyden", "fixed_point_iter", "gmres"]
NONLINEAR = ["anderson", "broyden", "fixed_point_iter"]


def norm(x):
    return x.flatten(1).norm(dim=1)


def residual(f, x):
    r"""The criterion of a map without natural units; 1 at zero."""
    change, size = norm(f(x) - x), norm(x)
    return change / size.where(size > 0, change)
