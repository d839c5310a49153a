r"""What a GPU changes: the time of one evaluation and of one product, CUDA graphs, rare checks, and TF32."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepinv_deq import Solver
from tests.benchmarks.bench import BATCH, Bench, say, seconds

REPEATS = 20
CHECKS = (1, 2, 4, 8, 16)  # evaluations between two checks of the host
Row = dict[str, Any]


def accelerator(bench: Bench) -> list[Row]:
    r"""For each task: milliseconds, eager and as a CUDA graph; solves with rare checks; the floor with and without TF32."""
    if bench.device != "cuda":
        say("  only on a GPU")
        return []
    return [row for name in BATCH for part in (_evaluations, _checks, _floors) for row in part(bench, name)]


def _evaluations(bench: Bench, name: str) -> list[Row]:
    task = bench.contracting(name)
    f, x = task.iteration.bind(task.y, task.physics), torch.rand_like(task.x)
    with torch.no_grad():
        rows = [_eager_and_graph("evaluation", name, lambda: f(x), bench.rounds)]
    point = x.detach().requires_grad_()
    image, b = f(point), torch.rand_like(x)
    product: Callable[[], Tensor] = lambda: torch.autograd.grad(image, point, b, retain_graph=True)[0]  # noqa: E731
    return [*rows, _eager_and_graph("product", name, product, bench.rounds)]


def _eager_and_graph(what: str, task: str, work: Callable[[], Tensor], rounds: int) -> Row:
    row: Row = {"what": what, "task": task, "eager ms": _milliseconds(work, rounds)}
    try:
        graph = _captured(work)
    except RuntimeError as error:
        return row | {"failed": str(error).splitlines()[0]}
    finally:
        torch.cuda.synchronize()
    row["graph ms"] = _milliseconds(graph.replay, rounds)
    say(f"  {row}")
    return row


def _captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _milliseconds(work: Callable[[], Any], rounds: int) -> float:
    work()
    torch.cuda.synchronize()
    repeated: Callable[[], Any] = lambda: [work() for _ in range(REPEATS)]  # noqa: E731
    return 1e3 / REPEATS * statistics.median(seconds(repeated, "cuda") for _ in range(rounds))


def _checks(bench: Bench, name: str) -> list[Row]:
    task = bench.contracting(name)
    f, x0, rows = task.iteration.bind(task.y, task.physics), task.iteration.init(task.y, task.physics), []
    with torch.no_grad():
        for every in CHECKS:
            solver = Solver("anderson", tol=1e-4, max_iter=400, sync_every=every, on_failure="ignore")
            solver(f, x0)
            times = [seconds(lambda s=solver: s(f, x0), "cuda") for _ in range(bench.rounds)]
            rows.append({"what": "checks", "task": name, "sync_every": every, "seconds": statistics.median(times)})
            rows[-1]["evaluations"] = solver(f, x0)[1].evaluations
            say(f"  {rows[-1]}")
    return rows


def _floors(bench: Bench, name: str) -> list[Row]:
    task = bench.contracting(name)
    f, x0, rows = task.iteration.bind(task.y, task.physics), task.iteration.init(task.y, task.physics), []
    for allowed in (False, True):
        with torch.no_grad(), tf32(allowed):
            stat = Solver("anderson", tol=1e-8, max_iter=300, on_failure="ignore")(f, x0)[1]
        rows.append({"what": "floor", "task": name, "tf32": allowed, "residual": float(stat.residual.max())})
        rows[-1] |= {"evaluations": stat.evaluations, "outcome": stat.outcome}
        say(f"  {rows[-1]}")
    return rows


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    r"""Allow or forbid convolutions in TF32, as PyTorch does by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
