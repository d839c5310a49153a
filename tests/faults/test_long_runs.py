r"""Memory does not grow over many steps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import deepinv as dinv
import pytest
import torch

from deepinv_deq import (
    DEProx,
    DEQReconstructor,
    ModularIDHook,
    Solver,
)
from tests.benchmarks.live_bytes import LiveBytes
from tests.faults.common import (
    FULL,
    MANY_STEPS,
    STEPS,
    TRIED,
)
from tests.problems import SmallDenoiser


def training_steps(steps):
    r"""Steps of equivariant imaging with a physics of its own for each: what is remembered of one must not pile up."""
    torch.manual_seed(0)
    model = DEQReconstructor(
        DEProx(SmallDenoiser(), stepsize=0.5),
        solver=Solver("anderson", max_iter=20, tol=1e-2),
        hook=ModularIDHook(Solver("gmres", max_iter=20, tol=1e-2)),
        warm_starts=4,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.rand(8, 1, 4, 4)
    for step in range(steps):
        physics = dinv.physics.Inpainting((1, 4, 4), mask=(torch.rand(1, 4, 4) > 0.2).float())
        x = images[step % 8 : step % 8 + 1]
        x_hat = model(physics.A(x), physics)
        turned = torch.rot90(x_hat, 1, (-2, -1))
        loss = (x_hat - x).square().mean() + (model(physics.A(turned), physics) - turned).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del physics, x, x_hat, turned, loss
        yield step + 1


def test_memory_does_not_grow_over_many_steps():
    settle, held, objects = min(STEPS // 2, 200), [], []
    with LiveBytes() as memory:
        for done in training_steps(STEPS):
            if done in (settle, STEPS):
                gc.collect()
                held.append(memory.now)
                objects.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert held[1] <= held[0] + 1024, held  # warm starts and caches are full since long
    assert objects[1] <= objects[0] + 8, objects


def resident_bytes_over(steps):
    r"""Print the resident bytes after a tenth of the steps and after all. For a process of its own."""
    torch.set_num_threads(1)
    for done in training_steps(steps):
        if done in (steps // 10, steps):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(done, pages * os.sysconf("SC_PAGE_SIZE"), flush=True)


@pytest.mark.skipif(not FULL, reason="ten thousand steps take minutes: DEEPINV_DEQ_FAULTS=full")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, where Linux says what is resident")
def test_resident_memory_does_not_grow_over_ten_thousand_steps():
    # what no tensor and no object shows: a kilobyte lost per step is nine megabytes
    code = "from tests.faults.test_long_runs import resident_bytes_over; resident_bytes_over(10_000)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (_, early), (steps, late) = (map(int, line.split()) for line in run.stdout.splitlines())
    assert late - early < 2**20, (early, late)
    TRIED[MANY_STEPS] += steps
