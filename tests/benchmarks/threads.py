r"""Threads against chunks: the wall time of an EI step on several cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.bench import Bench, gradient, medians, say
from tests.benchmarks.names import NAMES
from tests.benchmarks.peers import Settings, ours, whole_batch
from tests.benchmarks.tasks import Task

IMAGES = {"ct": 4, "mri": 2}
ITERATIONS = 10  # of every solve
ONE = "one thread"


def threads(bench: Bench) -> list[dict[str, Any]]:
    r"""An EI step with several threads in each operation of PyTorch, with chunks of several sizes, and with a part of the batch
    in each of several Python threads. Wall times, on a CPU only."""
    if bench.device != "cpu":
        return []
    cores = len(os.sched_getaffinity(0))
    rows = []
    for name in NAMES:
        task, fixed = bench.contracting(name, IMAGES[name]), Settings().exactly(ITERATIONS)
        default = ours(task, fixed)
        models = {
            "": default,
            ", whole batch at a time": whole_batch(task, fixed),
            ", an image at a time": ours(task, fixed, chunk_size=1),
        }
        work: dict[str, tuple[int, Callable[[], Any]]] = {
            f"{label}{chunks}": (number, partial(gradient, task, model))
            for number, label in ((1, ONE), (cores, f"{cores} threads"))
            for chunks, model in models.items()
        }
        parallel = f"{cores} Python threads of one thread each, a part of the batch each"
        work[parallel] = 1, partial(in_parallel, task, default, cores)
        times: dict[str, list[float]] = {label: [] for label in work}
        for _ in range(bench.rounds + 1):  # the first round warms up
            for label, (number, step) in work.items():
                with _number_of_threads(number):
                    start = time.perf_counter()
                    step()
                    times[label].append(time.perf_counter() - start)
        seconds = medians({label: values[1:] for label, values in times.items()})
        for label in work:
            row = {"task": name, "variant": label, "seconds": seconds[label], "ratio": seconds[label] / seconds[ONE]}
            rows.append(row)
            say(f"  {row}")
    return rows


def in_parallel(task: Task, model: Callable[..., Tensor], workers: int) -> list[Tensor]:
    r"""The sum of the gradients of the loss of equal parts of the batch, each of them in a thread of its own."""
    size = -(-len(task.y) // workers)
    parts = [replace(task, x=task.x[i : i + size], y=task.y[i : i + size]) for i in range(0, len(task.y), size)]

    def part(of: Task) -> list[Tensor]:
        torch.set_num_threads(1)
        return gradient(of, model)

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(part, parts))
    return [torch.stack(each).sum(0) for each in zip(*found, strict=True)]


@contextmanager
def _number_of_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
