r"""What a GPU changes: the time of one evaluation, eager and as a CUDA graph, rare checks, TF32, and the number of operations."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepinv_deq import Solver, group_norm
from deepinv_deq.solvers.cuda_graphs import graphed
from tests.benchmarks.bench import Bench, gradient, say, seconds
from tests.benchmarks.names import BATCH
from tests.benchmarks.peers import METHODS, Settings
from tests.problems import relative_error

REPEATS = 20
# launch nothing on a GPU
VIEWS = set(
    "view _unsafe_view _reshape_alias slice select expand t transpose permute as_strided detach alias unsqueeze squeeze split unbind "
    "lift_fresh view_as_real view_as_complex _conj sparse_compressed_tensor promote_types scalar_tensor".split()
)
CHECKS = (1, 2, 4, 8, 16)  # evaluations between two checks of the host
Row = dict[str, Any]


def accelerator(bench: Bench) -> list[Row]:
    r"""For each task: milliseconds of an evaluation, eager and as a CUDA graph; solves with rare checks; the floor with and without TF32."""
    if bench.device != "cuda":
        say("  only on a GPU")
        return []
    return [row for part in (_checks, _floors, _graphs) for name in BATCH for row in part(bench, name)]


def operations(bench: Bench, iterations: int = 5) -> list[Row]:
    r"""Operations of an EI step with 5 iterations in every solve, views left out, with PyTorch's own group norm, as on a GPU. Exact."""
    rows, ours = [], group_norm._is_for
    group_norm._is_for = lambda *args: False
    try:
        for name in BATCH:
            task = bench.contracting(name)
            for method, build in METHODS.items():
                model = build(task, Settings().exactly(iterations))
                gradient(task, model)  # the first pass measures the physics
                with _Counting() as counted:
                    gradient(task, model)
                rows.append({"task": name, "method": method, "operations": counted.count})
                say(f"  {rows[-1]}")
    finally:
        group_norm._is_for = ours
    return rows


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def _graphs(bench: Bench, name: str) -> list[Row]:
    r"""One evaluation, and a solve, with the map as it is and as a CUDA graph, which leaves the solver as it is."""
    task = bench.contracting(name)
    f, x = task.iteration.bind(task.y, task.physics), task.iteration.init(task.y, task.physics)
    solver = Solver("anderson", tol=1e-4, max_iter=400, on_failure="ignore")
    with torch.no_grad():
        row: Row = {"what": "graph", "task": name, "eager ms": _milliseconds(lambda: f.step(x), bench.rounds)}
        try:
            as_graph = graphed(f, x)
        except RuntimeError as error:  # the map copies from the host, or waits for it
            row["refused"] = str(error).splitlines()[0]
        else:
            row["graph ms"] = _milliseconds(lambda: as_graph.step(x), bench.rounds)
            row["error"] = relative_error(as_graph.step(x), f.step(x))
            for what, each in (("eager", f), ("graph", as_graph)):
                solver(each, x)
                times = [seconds(lambda each=each: solver(each, x), bench.device) for _ in range(bench.rounds)]
                row[f"{what} solve"] = statistics.median(times)
            with_option = replace(solver, cuda_graphs=True)
            with_option(f, x)
            times = [seconds(lambda: with_option(f, x), bench.device) for _ in range(bench.rounds)]
            row["option solve"] = statistics.median(times)
            row["option error"] = relative_error(with_option(f, x)[0], solver(f, x)[0])
            build = [seconds(lambda: graphed(f, x), bench.device) for _ in range(bench.rounds)]
            row["build"] = statistics.median(build)
    say(f"  {row}")
    return [row]


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
