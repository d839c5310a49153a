r"""What the parts of :mod:`tests.benchmarks.cost` share: tasks, reference gradients, counts and times."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepinv_deq._digest import digest
from tests.benchmarks import tasks
from tests.benchmarks.names import OURS
from tests.benchmarks.peers import Settings, ours
from tests.benchmarks.tasks import CACHE, Task
from tests.observe import observing

IMAGES = {"ct": 1, "mri": 1}  # of the parts with contracting models
ROUNDS = 5
# forward and backward tolerances in float64: at least ten times tighter than any that a method is tried at
POINT, REFERENCE = (1e-7, 1e-5), (1e-8, 1e-5)


class Bench:
    r"""What the parts share: data folder, device, tasks made once, reference gradients kept on disk."""

    def __init__(self, data: Path | None, device: str, rounds: int = ROUNDS, known: dict[str, Any] | None = None):
        self.data, self.device, self.rounds = data, device, rounds
        self._known = known or {}  # parts of another record
        self._tasks: dict[Any, Task] = {}

    def known(self, part: str, method: str) -> dict[str, Any] | None:
        r"""What another record has of a peer in this part, if its tolerances are to be taken from there."""
        rows = {row["method"]: row for row in self._known.get(part, {}).get("rows", ())}
        return rows.get(method) if method != OURS else None

    def contracting(self, name: str, batch: int | None = None) -> Task:
        r"""A shipped model at the size of its training."""
        count = batch or IMAGES[name]
        return self._once((name, "contracting", count), lambda: tasks.contracting(name, data=self.data, batch=count))

    def _once(self, key: Any, make: Callable[[], Task]) -> Task:
        if key not in self._tasks:
            task = make().to(self.device)
            _settle(task)
            self._tasks[key] = task
        return self._tasks[key]

    def fixed_point(self, name: str) -> Tensor:
        r"""The fixed point in float64, a hundred times as exact as is asked for."""

        def solve(task: Task) -> Tensor:
            model = ours(task, Settings(*POINT, 1500))
            with torch.no_grad():
                x = model(task.y, task.physics)
            assert model.forward_stat.converged.all(), model.forward_stat.outcome
            return x

        return self._kept("fixed-point", name, POINT, IMAGES[name], solve)

    def reference(self, name: str, batch: int | None = None) -> list[Tensor]:
        r"""The gradient of the loss in float64, both solves at least ten times tighter than any method's."""

        def solve(task: Task) -> list[Tensor]:
            model = ours(task, Settings(*REFERENCE, 3000, 2000))
            exact = gradient(task, model)
            assert model.forward_stat.converged.all() and model.hook.stat.converged.all(), model.forward_stat.outcome
            return exact

        return self._kept("gradient", name, REFERENCE, batch or IMAGES[name], solve)

    def _kept(self, what: str, name: str, tolerances: tuple, batch: int, solve: Callable[[Task], Any]) -> Any:
        r"""A result in float64 from disk, or solved and saved. The file name holds a digest of all it depends on."""
        task = tasks.contracting(name, data=self.data, batch=batch)
        made_of = digest([task.iteration.state_dict(), task.x, task.y, tolerances])[:16]
        made_of += "" if self.device == "cpu" else f"-{self.device}"  # whose random rotations are others
        path = CACHE / f"contracting-{what}-{name}-{batch}-{made_of}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(solve(task.to(self.device).to(torch.float64)), path)
        return torch.load(path, weights_only=True, map_location="cpu")


def parameters(task: Task) -> list[Tensor]:
    return [p for p in task.iteration.parameters() if p.requires_grad]


def gradient(task: Task, model: Callable[..., Tensor], passes: int = 2) -> list[Tensor]:
    return list(torch.autograd.grad(task.loss(model, passes), parameters(task)))


def seconds(work: Callable[[], Any], device: str) -> float:
    r"""CPU time of one thread, which other processes hardly change; wall time otherwise."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def take_turns(
    work: dict[Any, Callable[[], Any]],
    device: str,
    rounds: int = ROUNDS,
    first: dict[str, float] | None = None,
    beyond: float = float("inf"),
) -> dict[Any, list[float]]:
    r"""Seconds of each, in rounds where all of them run after one another.

    Given a ``first`` time of each, a method that took more than ``beyond`` times as long as ours is not run again.
    """
    first = first or {}
    out = {name for name in first if first[name] > beyond * first[OURS]}
    times: dict[Any, list[float]] = {name: [first[name]] if name in out else [] for name in work}
    for _ in range(rounds):
        for name in (n for n in work if n not in out):
            times[name].append(seconds(work[name], device))
    return times


def medians(times: dict[Any, list[float]]) -> dict[Any, float]:
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def counting(task: Task) -> Iterator[dict[str, float]]:
    r"""Evaluations of the denoiser, taped ones among them, and products with its Jacobian, in units of the whole batch."""
    count = {"evaluations": 0.0, "taped": 0.0, "vjps": 0.0}

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            count["vjps"] += len(g) / len(task.x)
            return g

    def watch(out: Tensor) -> Tensor:
        count["evaluations"] += len(out) / len(task.x)
        count["taped"] += len(out) / len(task.x) * out.requires_grad
        return Probe.apply(out) if out.requires_grad else out

    with observing(task.iteration.denoiser, watch):
        _settle(task)
        count.update(dict.fromkeys(count, 0.0))
        yield count


@torch.no_grad()
def _settle(task: Task) -> None:
    r"""Whether the map can be restricted to samples is measured once, and not part of a step."""
    ours(task, Settings(forward_tol=0.5))(task.y, task.physics)


def say(text: str) -> None:
    print(text, flush=True)
