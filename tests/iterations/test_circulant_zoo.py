r"""The filter of every physics of deepinv is measured once, however many solves there are."""

import pytest
from deepinv.physics import LinearPhysics
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
