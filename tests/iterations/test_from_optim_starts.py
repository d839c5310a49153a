r"""Where algorithms of deepinv start with a physics that is not linear: reproducible, and without the global generators."""

from __future__ import annotations

import deepinv as dinv
import torch

from deepinv_deq import FromOptim
from tests.iterations.test_from_optim import algorithm


class Drawn(dinv.physics.Physics):
    r"""Its inverse draws numbers."""

    def A(self, x, **_):
        return x.abs()

    def A_dagger(self, y, **_):
        return y + torch.randn_like(y)


def test_the_spectral_start_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    physics = dinv.physics.RandomPhaseRetrieval(m=60, img_size=(1, 4, 4), dtype=torch.cfloat)
    y = physics(torch.rand(2, 1, 4, 4) + 0j)
    draws, backward = [], physics.B_adjoint
    physics.B_adjoint = lambda v, **kwargs: (draws.append(torch.rand(1).item()), backward(v, **kwargs))[1]
    torch.manual_seed(1)
    iteration = FromOptim(algorithm("GD", prior=dinv.optim.Tikhonov()))
    first, second = iteration.init(y, physics), iteration.init(y, physics)  # another thread may draw meanwhile
    assert torch.equal(first, second) and len(set(draws)) == len(draws) > 2


def test_a_start_that_draws_numbers_is_reproducible_and_leaves_the_generator():
    y, iteration = torch.rand(2, 1, 4, 4), FromOptim(algorithm("GD", prior=dinv.optim.Tikhonov()))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = iteration.init(y, Drawn()), iteration.init(y, Drawn())
    assert torch.equal(first, second) and torch.equal(torch.rand(3), expected)
