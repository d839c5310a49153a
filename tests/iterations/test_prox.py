r"""Proximal maps of the data term by conjugate gradients with a filter."""

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEGrad
from deepinv_deq.iterations.circulant import CirculantInverse, spectrum
from deepinv_deq.iterations.prox import prox_by_cg
from tests.problems import F64, SmallDenoiser, relative_error

GAMMA = 50.0


def tomography(views: int = 6, side: int = 16) -> dinv.physics.Tomography:
    return dinv.physics.Tomography(views, side, normalize=True, adjoint_via_backprop=True)


def dense_inverse(physics: dinv.physics.LinearPhysics, side: int) -> torch.Tensor:
    unit = torch.eye(side**2).reshape(-1, 1, side, side)
    normal = physics.A_adjoint_A(unit).flatten(1).double()
    return torch.linalg.inv(GAMMA * normal + torch.eye(side**2, dtype=F64))


@pytest.mark.parametrize(("steps", "tolerance"), [(4, 0.1), (12, 2e-3), (40, 1e-5)])
def test_steps_with_a_filter_come_near_to_the_dense_inverse(steps, tolerance):
    physics, r = tomography(), torch.randn(3, 1, 16, 16)
    inverse = CirculantInverse(GAMMA * spectrum(physics, r) + 1)
    exact = (r.flatten(1).double() @ dense_inverse(physics, 16)).view_as(r)
    assert relative_error(prox_by_cg(physics, GAMMA, inverse, steps)(r), exact) < tolerance
    assert relative_error(inverse(r), exact) > 0.1  # the filter alone


def test_every_sample_is_solved_alone_and_nothing_stays_nothing():
    physics, r = tomography(), torch.randn(3, 1, 16, 16)
    r[1] = 0.0
    apply = prox_by_cg(physics, GAMMA, CirculantInverse(GAMMA * spectrum(physics, r) + 1))
    together = apply(r)
    assert not together[1].any()
    for one, alone in zip(together, r, strict=True):
        torch.testing.assert_close(one[None], apply(alone[None]), rtol=1e-4, atol=1e-6)


def test_the_metric_of_the_penalty_leaves_what_no_measurement_sees():
    torch.manual_seed(0)
    physics, side = tomography(), 16
    iteration = DEGrad(SmallDenoiser(), stepsize=1 / 51, data_weight=GAMMA)
    x = torch.rand(1, 1, side, side)
    f = iteration.bind(physics.A(x), physics)
    eigenvalues, vectors = torch.linalg.eigh(torch.linalg.inv(dense_inverse(physics, side)))
    unseen = vectors[:, 0].float().view_as(x)
    assert eigenvalues[0] < 1.01
    metric = f.contractive_part(x)[1]
    assert relative_error(metric(unseen), unseen) < 0.1
    filter_alone = CirculantInverse(GAMMA * spectrum(physics, x) + 1)
    assert relative_error(filter_alone(unseen), unseen) > 0.3
