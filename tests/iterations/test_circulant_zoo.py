r"""The filter of every physics of deepinv is measured once, however many solves there are."""

import pytest
import torch
from deepinv.physics import BlurFFT, Inpainting, LinearPhysics
from deepinv.physics.functional.blur import gaussian_blur
from torch import nn

from deepinv_deq import DEGrad
from deepinv_deq.iterations import circulant
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_later_solves_use_the_filter_of_the_first(name, monkeypatch):
    make, x = ZOO[name]
    physics, measured, original = make(), [], circulant._measure
    if not isinstance(physics, LinearPhysics):
        pytest.skip("not linear")
    monkeypatch.setattr(circulant, "_measure", lambda *args: measured.append(1) or original(*args))
    iteration, y = DEGrad(nn.Identity(), stepsize=0.1), physics.A(x)
    for _ in range(3):  # deepinv builds some of its parts when they are used first
        f = iteration.bind(y, physics)
        f.preconditioner(f.init(y))
        f(f.init(y))
        del measured[:-1]
    f = iteration.bind(y, physics)
    measured.clear()
    f.preconditioner(f.init(y))
    assert not measured


def inpainting(share):
    return Inpainting(
        (1, 32, 32), mask=(torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0)) < share).float()
    )


@pytest.mark.parametrize(
    "physics,products,fits",
    [
        (BlurFFT((1, 32, 32), filter=gaussian_blur(sigma=(2.0, 2.0))), 2, True),
        (inpainting(0.3), 2, False),
        (inpainting(0.7), 8, False),
        (inpainting(0.9), 8, True),
    ],
)
def test_few_products_measure_the_filter_where_they_tell_enough(physics, products, fits):
    x, product, count = torch.rand(2, 1, 32, 32), physics.A_adjoint_A, []
    model = circulant._measure(physics, x.shape, x)
    physics.A_adjoint_A = lambda v, **kwargs: (count.append(1), product(v, **kwargs))[1]
    circulant._measure(physics, x.shape, x)
    assert len(count) == products and (model is not None) == fits
    if products == 2 and fits:
        w = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(circulant._filtered(w, model), product(w), rtol=1e-4, atol=1e-5)
