r"""Effect of each option of the package on an EI step, and of other starting points on the number of evaluations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import deepinv as dinv
import torch
from torch import Tensor

from deepinv_deq import DEQReconstructor
from tests.benchmarks import starts, tasks
from tests.benchmarks.bench import Bench, counting, medians, parameters, say, take_turns
from tests.benchmarks.names import BATCH, OURS
from tests.benchmarks.peers import TYPICAL, Settings, ours, whole_batch
from tests.benchmarks.tasks import Task
from tests.problems import relative_error

COMPILED = "with torch.compile"


def options(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""What each saving of ours is worth: an EI step without it, and with what the user may add."""
    rows = []
    batch = BATCH[name]  # chunks need more than one image; on MRI the default is one at a time
    task, exact = bench.contracting(name, batch), bench.reference(name, batch)
    settings, rough = TYPICAL[name], Settings(1e-2, 1e-2, 50, 50)  # half precision reaches no more
    twin, compiled = (tasks.contracting(name, data=bench.data, batch=batch).to(bench.device) for _ in range(2))
    twin.iteration.denoiser.to(memory_format=torch.contiguous_format)
    compiled.iteration.denoiser.compile()
    cells: dict[str, tuple[Task, Callable[..., Tensor], Any]] = {
        OURS: (task, ours(task, settings), None),
        "whole batch at a time": (task, whole_batch(task, settings), None),
        **({"an image at a time": (task, ours(task, settings, chunk_size=1), None)} if name == "ct" else {}),
        **({"no preconditioner": (task, ours(task, settings, precondition=False), None)} if name == "ct" else {}),
        "channels outermost": (twin, ours(twin, settings), None),
        "tolerances of 1e-2": (task, ours(task, rough), None),
        "tolerances of 1e-2, bfloat16 autocast": (task, ours(task, rough), torch.bfloat16),
        COMPILED: (compiled, ours(compiled, settings), None),
    }
    work, errors = {}, {}
    for label, (t, model, dtype) in cells.items():

        def step(t=t, model=model, dtype=dtype):
            with torch.autocast(bench.device, dtype=dtype, enabled=dtype is not None):
                loss = t.loss(model)
            return torch.autograd.grad(loss, parameters(t))

        try:
            with counting(t) as count:
                found = [g.cpu() for g in step()]
        except Exception as error:
            if label != COMPILED:  # a machine may have no compiler; everything else is a mistake of ours
                raise
            say(f"  {label}: {type(error).__name__}: {str(error)[:200]}")
            rows.append({"task": name, "option": label, "failed": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        errors[label] = relative_error(found, exact), dict(count)
        work[label] = step
    times = medians(take_turns(work, bench.device, 3))
    for label, (error, count) in errors.items():
        row = {"task": name, "option": label, "gradient error": error, **count, "seconds": times[label]}
        rows.append(row | {"ratio": times[label] / times[OURS]})
        say(f"  {rows[-1]}")
    return rows


def warm_starts(bench: Bench, images: int = 24, epochs: int = 6, size: int = 64) -> list[dict[str, Any]]:
    r"""EI training that remembers its fixed points, against the usual start; same steps, same seeds."""
    rows = []
    for name in BATCH:
        for remembered in (0, images):
            task = tasks.make(name, data=bench.data, batch=images + 8, size=size).to(bench.device)
            base = ours(task, Settings(1e-4, 1e-2, 100, 50))
            model = DEQReconstructor(base.iteration, solver=base.solver, hook=base.hook, warm_starts=remembered)
            model.train()
            task.iteration.eval()  # the denoiser of every method, at every evaluation, is the same function
            optimizer = torch.optim.Adam(parameters(task), lr=3e-4)
            work: list[list[float]] = [[] for _ in range(epochs)]

            def reconstruct(y: Tensor, physics: Any, model: Any = model, work: Any = work) -> Tensor:
                x_hat = model(y, physics)
                work[epoch].append(model.forward_stat.work)
                return x_hat

            start = time.perf_counter()
            for epoch in range(epochs):
                for i in range(0, images, 4):
                    optimizer.zero_grad()
                    replace(task, x=task.x[i : i + 4], y=task.y[i : i + 4]).loss(reconstruct).backward()
                    optimizer.step()
            took = time.perf_counter() - start
            with torch.no_grad():
                x_hat = model.eval()(task.y[images:], task.physics)
            first, both = ([statistics.mean(w[::2]) for w in work], [2 * statistics.mean(w) for w in work])
            rows.append({"task": name, "warm starts": remembered, "work": first, "both passes": both, "seconds": took})
            rows[-1]["psnr"] = float(dinv.metric.PSNR()(x_hat, task.x[images:]).mean())
            say(f"  {rows[-1]}")
    return rows


def learned_start(bench: Bench) -> list[dict[str, Any]]:
    r"""Evaluations to 1e-3 of the fixed point from a start that a network predicts."""
    rows = starts.count(bench.contracting("ct"), bench.fixed_point("ct"), "ct", bench.data)
    say(f"  {rows}")
    return rows
