r"""How often the host waits for the device in a training step, counted on the CPU."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from deepinv.physics.functional.blur import gaussian_blur

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver, states
from tests.problems import Synchronisations

MASK = (torch.arange(16) % 3 > 0).float().expand(1, 2, 16, 16)
TASKS = [
    (DEGrad, dinv.physics.BlurFFT((1, 16, 16), filter=gaussian_blur(sigma=(1.0, 1.0))), 1),
    (DEProx, dinv.physics.MRI(mask=MASK, img_size=(2, 16, 16)), 2),
]
FIXED = 10  # one check of y, whether two filters are one, whether the map is still that of the forward pass, one sentence for each of two solves and the verification, and what GMRES asks at its start and end


def waits(kind, physics, channels, every):
    torch.manual_seed(0)
    solvers = [
        Solver(method, max_iter=21, tol=1e-30, on_failure="ignore", sync_every=every, chunk_size=2)
        for method in ("anderson", "gmres")
    ]
    net = EquilibriumUNet(channels, channels=(4, 8))
    model = DEQReconstructor(kind(net, stepsize=0.5), solver=solvers[0], hook=ModularIDHook(solvers[1]))
    x = torch.rand(2, channels, 16, 16)
    y = physics.A(x)
    model(y, physics).sum().backward()  # the first pass measures the physics
    with Synchronisations() as mode:
        (model(y, physics) - x).square().sum().backward()
    assert model.forward_stat.evaluations == 21
    return mode.count


@pytest.mark.parametrize("kind, physics, channels", TASKS)
def test_a_step_waits_for_its_checks_and_a_few_times_more(kind, physics, channels, monkeypatch):
    monkeypatch.setattr(states, "on_host", lambda t: False)  # as on an accelerator
    rarely = waits(kind, physics, channels, 1000)
    assert rarely <= FIXED
    every = waits(kind, physics, channels, 1)
    assert every - rarely >= 20  # the counter sees the checks
    sometimes = waits(kind, physics, channels, 4)
    assert sometimes - rarely <= 2 * (21 // 4) + 1
