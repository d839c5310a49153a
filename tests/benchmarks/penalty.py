r"""What a measurement of :class:`deepinv_deq.losses.ContractionLoss` costs, in units of a training step."""

from __future__ import annotations

from typing import Any

import torch

from deepinv_deq.losses import ContractionLoss
from tests.benchmarks.bench import Bench, gradient, medians, parameters, say, take_turns
from tests.benchmarks.names import BATCH, OURS
from tests.benchmarks.peers import Settings, ours

TRAINING = {"ct": Settings(1e-4, 3e-2), "mri": Settings(1e-3, 3e-2)}  # tolerances of the paper's cells
STEPS = {"EI": 2, "one pass": 1}  # passes through the model; supervised steps have one


def penalty(bench: Bench) -> list[dict[str, Any]]:
    r"""Time of a call with its backward pass, of a step of EI and of one with a single pass, as supervised ones."""
    rows = []
    for name in BATCH:
        task = bench.contracting(name)
        model = ours(task, TRAINING[name])
        x = model(task.y, task.physics).detach()
        loss = ContractionLoss(0.1, rng=torch.Generator().manual_seed(0))  # of shipped models, the norm is above this

        def call(task: Any = task, model: Any = model, x: Any = x, loss: Any = loss) -> None:
            value = loss(x_net=x, y=task.y, physics=task.physics, model=model).mean()
            torch.autograd.grad(value, parameters(task), allow_unused=True)

        work = {OURS: call} | {
            step: lambda task=task, model=model, passes=passes: gradient(task, model, passes)
            for step, passes in STEPS.items()
        }
        for run in work.values():  # whatever is measured once, and no part of a step
            run()
        times = medians(take_turns(work, bench.device, bench.rounds))
        for step in STEPS:
            rows.append({"task": name, "step": step, "seconds": times[step], "share": times[OURS] / times[step]})
            say(f"  {rows[-1]}")
    return rows
