r"""How time and memory grow with pixels, voxels and batch, and what data-parallel training adds to a step.

All solves take a fixed number of iterations, so the weights do not matter: the networks are untrained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepinv as dinv
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from deepinv_deq import DEProx, EquilibriumUNet
from tests.benchmarks import tasks
from tests.benchmarks.peers import Settings, ours
from tests.benchmarks.tasks import Task

CHANNELS = (16, 32, 64)
ITERATIONS = 5  # of every solve
STEPS = 12  # of data-parallel training, after two that warm up


def volumes(side: int) -> Task:
    r"""Inpainting of one volume of ``side`` voxels a side, half of which were measured."""
    shape = (1, side, side, side)
    physics = dinv.physics.Inpainting(shape, mask=0.5, rng=torch.Generator().manual_seed(0))
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = physics.A(x)
    torch.manual_seed(0)
    return Task("volume", physics, x, y, DEProx(EquilibriumUNet(1, channels=CHANNELS, dim=3), stepsize=0.5), alpha=1.0)


def images(name: str, data: Path | None, batch: int, side: int) -> Task:
    r"""MRI or CT with an untrained network."""
    torch.manual_seed(0)
    network = EquilibriumUNet({"ct": 1, "mri": 2}[name], channels=CHANNELS)
    return tasks.make(name, data=data, batch=batch, size=side, net=network)


def cells(data: Path | None) -> dict[tuple[str, int], tuple[Task, int]]:
    r"""The tasks by what grows and its size, and the passes through the model of one step."""
    grown: dict[tuple[str, int], tuple[Task, int]] = {}
    for side in (64, 128, 256, 512):
        grown["pixels", side] = images("mri", data, 1, side), 2
    for batch in (1, 4, 16):
        grown["batch", batch] = images("mri", data, batch, 64), 2
    for side in (16, 32, 64):
        grown["voxels", side] = volumes(side), 1
    return grown


def exponents(measured: dict[tuple[str, int], float]) -> list[dict[str, Any]]:
    r"""The exponent of a power law through times or bytes, over the number of pixels, voxels or images."""
    rows = []
    for what, power in (("pixels", 2), ("batch", 1), ("voxels", 3)):
        sizes = [size for kind, size in measured if kind == what]
        values = [measured[what, size] for size in sizes]
        n, t = (torch.tensor(each, dtype=torch.float64).log() for each in (sizes, values))
        n = power * n
        slope = float(((n - n.mean()) * (t - t.mean())).sum() / (n - n.mean()).square().sum())
        rows.append({"over": what, "sizes": sizes, "values": values, "exponent": slope})
    return rows


def data_parallel(data: Path | None) -> list[dict[str, Any]]:
    r"""Median step of two processes of one thread that train one model, over that of two processes that train one each."""
    with TemporaryDirectory() as folder:
        mp.spawn(_train, args=(folder, data), nprocs=2)
        measured = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]
    rows = []
    for name in ("ct", "mri"):
        alone, together = ([statistics.median(m[name][kind]) for m in measured] for kind in (0, 1))
        # the slower process decides how long a step takes
        rows.append({"task": name, "alone": max(alone), "together": max(together)})
        rows[-1]["overhead"] = rows[-1]["together"] / rows[-1]["alone"] - 1
    return rows


def _train(rank: int, folder: str, data: Path | None) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=10))
    found = {}
    for name in ("ct", "mri"):
        task = images(name, data, 2, 128)
        model = ours(task, Settings().exactly(ITERATIONS))
        parallel = DistributedDataParallel(model)
        times: list[list[float]] = [[], []]
        for k in range(STEPS + 2):
            for kind, trained in enumerate((model, parallel)):  # in turns, so that both see the same load
                dist.barrier()
                took = _seconds(lambda trained=trained, task=task: task.loss(trained).backward())
                model.zero_grad()
                times[kind] += [took] if k > 1 else []
        found[name] = times
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
