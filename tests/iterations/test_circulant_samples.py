r"""Circulant models, preconditioners and units of residuals of a sample do not depend on the rest of the batch."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import Blur, Inpainting
from deepinv.physics.blur import gaussian_blur

from deepinv_deq import DEGrad, DEQReconstructor, Solver
from deepinv_deq.iterations.circulant import spectrum
from tests.problems import F64, SmallDenoiser, rng

FEW, ALL = (torch.rand(1, 16, 16, generator=rng(7)) > 0.85).double(), torch.ones(1, 16, 16, dtype=F64)
KERNEL = gaussian_blur(sigma=0.8).to(F64)


def inpainting(rows):
    return Inpainting((1, 16, 16), mask=torch.stack([FEW, ALL])[rows])


def half_blurred(rows):
    r"""A blur of the first sample that is nearly a convolution, and the identity."""
    identity = torch.zeros_like(KERNEL)
    identity[..., KERNEL.shape[-2] // 2, KERNEL.shape[-1] // 2] = 1
    return Blur(torch.cat([KERNEL, identity])[rows], padding="reflect")


@pytest.mark.parametrize("make", [inpainting, half_blurred])
def test_a_sample_has_the_model_that_it_has_alone(make):
    x = torch.rand(2, 1, 16, 16, dtype=F64, generator=rng())
    iteration, together = DEGrad(SmallDenoiser().to(F64), stepsize=0.5), make(slice(None))
    model = spectrum(together, x)
    kinds = []
    for i in range(2):
        rows = slice(i, i + 1)
        alone = spectrum(make(rows), x[rows])
        kinds.append(alone is None)
        torch.testing.assert_close(
            model[rows], torch.full_like(model[rows], torch.nan) if alone is None else alone, equal_nan=True
        )
        inverse = iteration.preconditioner(x[rows], make(rows)) or (lambda r: r)
        torch.testing.assert_close(iteration.preconditioner(x, together)(x)[rows], inverse(x[rows]))
        unit = iteration.natural(x[rows], make(rows))
        torch.testing.assert_close(iteration.natural(x, together)(x)[rows], unit(x[rows]))
        part, metric = iteration.contractive_part(x, together)
        _, own = iteration.contractive_part(x[rows], make(rows))
        torch.testing.assert_close(metric(x)[rows], x[rows] if own is None else own(x[rows]))
    assert kinds == [make is inpainting, False]


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_a_sample_without_a_preconditioner_takes_the_evaluations_that_it_takes_alone(tol):
    x = torch.rand(2, 1, 16, 16, dtype=F64, generator=rng())
    model = DEQReconstructor(DEGrad(SmallDenoiser(0.45).to(F64), stepsize=0.5), solver=Solver(tol=tol, max_iter=200))
    found = []
    for rows in (slice(0, 1), slice(0, 2)):
        physics = inpainting(rows)
        found.append((model(physics(x[rows]), physics)[:1], int(model.forward_stat["nstep"][0])))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
