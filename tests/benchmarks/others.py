r"""Solvers of SciPy, jaxopt and optimistix on our maps: evaluations until an image is within 1e-3 of its fixed point.

.. code-block:: bash

    pip install scipy jaxopt optimistix
    python -m tests.benchmarks.cost --only "other solvers"

They are no dependencies of the package, and what is not installed is left out. Every solver runs with its defaults, one image at a
time, and is stopped from outside at the first evaluated point that is near enough, so no stopping criterion is compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad

from tests.benchmarks.limits import IMAGE

MOST = 200  # evaluations and products together


class Counted:
    r"""A map of flat float64 arrays that counts, and raises an error once it is done.

    :param Callable f: the bound map of one image.
    :param torch.Tensor x0: its start.
    :param torch.Tensor exact: its fixed point, in double precision.
    :param bool precondition: whether it is :math:`x + P (F(x) - x)` with our preconditioner.
    """

    def __init__(self, f: Any, x0: torch.Tensor, exact: torch.Tensor, precondition: bool):
        self._f, self._like, self._exact = f, x0, exact.double().numpy().ravel()
        self._p = f.preconditioner(x0) if precondition else None
        self.start = self._flat(x0)
        self.evaluations, self.products, self.reached, self.error = 0, 0, False, np.inf

    def __call__(self, x: Any) -> np.ndarray:
        x = np.asarray(x)
        self.error = min(self.error, float(np.linalg.norm(x - self._exact) / np.linalg.norm(self._exact)))
        self.evaluations += 1
        self._stop_if(self.error <= IMAGE)
        with torch.no_grad():
            return self._flat(self._image(self._tensor(x)))

    def residual(self, x: Any) -> np.ndarray:
        return self(x) - np.asarray(x)

    def product(self, x: Any, v: Any) -> np.ndarray:
        r"""The Jacobian at ``x`` times ``v``."""
        self.products += 1
        self._stop_if(False)
        with torch.no_grad(), forward_ad.dual_level():
            out = forward_ad.unpack_dual(self._image(forward_ad.make_dual(self._tensor(x), self._tensor(v)))).tangent
            assert out is not None
            return self._flat(out)

    def _stop_if(self, reached: bool) -> None:
        self.reached = self.reached or reached
        if self.reached or self.evaluations + self.products >= MOST:
            raise StopIteration("counted enough")

    def _image(self, x: torch.Tensor) -> torch.Tensor:
        return self._f(x) if self._p is None else x + self._p(self._f(x) - x)

    def _tensor(self, x: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(x)).to(self._like).reshape(self._like.shape)

    def _flat(self, x: torch.Tensor) -> np.ndarray:
        return x.double().numpy().ravel()


def _scipy_anderson(f: Counted) -> None:
    from scipy.optimize import anderson

    anderson(f.residual, f.start, maxiter=MOST, f_tol=1e-30)


def _scipy_newton_krylov(f: Counted) -> None:
    from scipy.optimize import newton_krylov

    newton_krylov(f.residual, f.start, method="lgmres", maxiter=MOST, f_tol=1e-30)


def _jaxopt_anderson(f: Counted) -> None:
    import jax
    import jaxopt

    jax.config.update("jax_enable_x64", True)
    # without compilation it evaluates the map with arrays, at once
    jaxopt.AndersonAcceleration(f, maxiter=MOST, tol=1e-30, jit=False, implicit_diff=False).run(
        jax.numpy.array(f.start)
    )


def _optimistix_newton_krylov(f: Counted) -> None:
    import jax
    import lineax
    import optimistix

    jax.config.update("jax_enable_x64", True)
    shape = jax.ShapeDtypeStruct(f.start.shape, jax.numpy.float64)

    @jax.custom_jvp
    def residual(x, args):
        return jax.pure_callback(f.residual, shape, x)

    @residual.defjvp
    def _(primals, tangents):
        (x, args), (v, _) = primals, tangents
        jv = jax.pure_callback(lambda x, v: f.product(x, v) - np.asarray(v), shape, x, v)
        return residual(x, args), jv

    inner = lineax.GMRES(rtol=1e-2, atol=1e-30)
    solver = optimistix.Newton(rtol=1e-12, atol=1e-12, linear_solver=inner)
    optimistix.root_find(residual, solver, jax.numpy.array(f.start), max_steps=30)


SOLVERS: dict[str, Callable[[Counted], None]] = {
    "SciPy anderson": _scipy_anderson,
    "SciPy newton_krylov, lgmres": _scipy_newton_krylov,
    "jaxopt AndersonAcceleration": _jaxopt_anderson,
    "optimistix Newton, GMRES": _optimistix_newton_krylov,
}


def count(make: Callable[[bool], Counted], preconditioners: bool) -> Iterator[dict[str, Any]]:
    r"""One row for each solver that is installed, without and with our preconditioner."""
    for name, solve in SOLVERS.items():
        for precondition in (False, True)[: 1 + preconditioners]:
            f, failed = make(precondition), ""
            try:
                with contextlib.redirect_stderr(None):
                    solve(f)
            except ImportError:
                break
            except Exception as error:  # ours, which ends the count, wrapped by JAX, or one of theirs
                failed = "" if f.reached or f.evaluations + f.products >= MOST else f"{type(error).__name__}: {error}"
            row = {"method": name, "preconditioned": precondition, "evaluations": f.evaluations}
            row |= {"products": f.products, "error": f.error, "reached": f.reached}
            yield row | ({"failed": failed[:200]} if failed else {})
