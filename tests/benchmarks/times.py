r"""Times of the solvers' own algebra, of larger images and batches, of data-parallel training, and of a sparse operator."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import deepinv as dinv
import torch

from tests.benchmarks import scale, tasks
from tests.benchmarks.bench import ROUNDS, Bench, gradient, medians, say, seconds, take_turns
from tests.benchmarks.names import BATCH
from tests.benchmarks.peers import TYPICAL, Settings, ours
from tests.problems import relative_error


def overhead(bench: Bench) -> list[dict[str, Any]]:
    r"""Share of an EI step that is neither the iteration, its products, nor the loss: the solvers' own algebra."""
    rows = []
    for name in BATCH:
        task = bench.contracting(name)
        model = ours(task, TYPICAL[name])
        gradient(task, model)
        shares = []
        for _ in range(ROUNDS):
            spent = {"solve": 0.0, "inside": 0.0}
            with _timing_of_solves(spent, bench.device):
                total = seconds(lambda: gradient(task, model), bench.device)
            shares.append((spent["solve"] - spent["inside"]) / total)
        rows.append({"task": name, "share": statistics.median(shares)})
        say(f"  {rows[-1]}")
    return rows


@contextlib.contextmanager
def _timing_of_solves(spent: dict[str, float], device: str) -> Iterator[None]:
    from deepinv_deq import solvers
    from deepinv_deq.solvers import problem

    solve, count = solvers.Solver._solve, problem._counting

    def timed_solve(*args):
        out = []
        spent["solve"] += seconds(lambda: out.append(solve(*args)), device)
        return out[0]

    def timed_map(f, layout, n):
        def timed(x):
            out = []
            spent["inside"] += seconds(lambda: out.append(f(x)), device)
            return out[0]

        return count(timed, layout, n)

    solvers.Solver._solve, problem._counting = timed_solve, timed_map
    try:
        yield
    finally:
        solvers.Solver._solve, problem._counting = solve, count


def scaling(bench: Bench) -> list[dict[str, Any]]:
    r"""Time of a step with 5 iterations over pixels and batch (MRI, EI) and voxels (inpainting), and the exponents of power laws."""
    cells = {key: (task.to(bench.device), passes) for key, (task, passes) in scale.cells(bench.data).items()}
    work = {}
    for key, (task, passes) in cells.items():
        model = ours(task, Settings().exactly(scale.ITERATIONS))
        work[key] = lambda task=task, model=model, passes=passes: gradient(task, model, passes)
    rows = scale.exponents(medians(take_turns(work, bench.device, min(3, bench.rounds))))
    for row in rows:
        say(f"  {row}")
    return rows


def data_parallel(bench: Bench) -> list[dict[str, Any]]:
    r"""What a step of two processes takes beyond that of two processes that do not wait for one another."""
    rows = scale.data_parallel(bench.data)
    say(f"  {rows}")
    return rows


def sparse(bench: Bench) -> list[dict[str, Any]]:
    r"""A + Aᵀ of tomography, batch 4, 128×128, 50 views."""
    angles, settings = (
        torch.linspace(0, 180, 51)[:-1],
        {"circle": False, "normalize": False, "adjoint_via_backprop": True},
    )
    physics, truth = (
        dinv.physics.Tomography(angles.to(dtype), 128, device=bench.device, dtype=dtype, **settings)
        for dtype in (torch.float32, torch.float64)
    )
    built: list[Any] = []
    build = seconds(lambda: built.append(tasks.SparseLinearPhysics.from_physics(physics, (1, 128, 128))), bench.device)
    x = torch.rand(4, 1, 128, 128, device=bench.device)
    y = physics.A(x)
    exact = truth.A(x.double()), truth.A_adjoint(y.double())
    error = max(relative_error(built[0].A(x), exact[0]), relative_error(built[0].A_adjoint(y), exact[1]))
    work = {
        "Tomography": lambda: (physics.A(x), physics.A_adjoint(y)),
        "SparseLinearPhysics": lambda: (built[0].A(x), built[0].A_adjoint(y)),
    }
    times = medians(take_turns(work, bench.device, 4 * ROUNDS))
    ratio = times["Tomography"] / times["SparseLinearPhysics"]
    row = {"build seconds": build, "error": error, "seconds": times, "ratio": ratio}
    say(f"  {row}")
    return [row]
