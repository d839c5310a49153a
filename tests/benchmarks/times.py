r"""Times of the solvers' own algebra, of larger images and batches, of data-parallel training, and of a sparse operator."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import deepinv as dinv
import torch

from deepinv_deq.iterations import FixedPointIteration, bound, capture
from deepinv_deq.iterations.bound import BoundIteration
from deepinv_deq.solvers import Solver, problem
from tests.benchmarks import scale, tasks
from tests.benchmarks.bench import ROUNDS, Bench, gradient, medians, say, seconds, take_turns
from tests.benchmarks.live_bytes import LiveBytes
from tests.benchmarks.names import BATCH
from tests.benchmarks.peers import TYPICAL, Settings, ours
from tests.problems import relative_error


def overhead(bench: Bench) -> list[dict[str, Any]]:
    r"""Shares of an EI step that are neither the iteration, its products, nor the loss: the solvers' own algebra, and the replicas
    with all that their maps do around an evaluation."""
    rows = []
    for name in BATCH:
        task = bench.contracting(name)
        model = ours(task, TYPICAL[name])
        gradient(task, model)
        shares = []
        for _ in range(ROUNDS):
            with _exclusive_times(bench.device) as spent:
                total = seconds(lambda: gradient(task, model), bench.device)
            shares.append({kind: spent[kind] / total for kind in ("solver", "replica")})
        middle = sorted(shares, key=lambda share: sum(share.values()))[len(shares) // 2]  # the median of the sum
        rows.append({"task": name, "share": middle["solver"], "replica": middle["replica"]})
        say(f"  {rows[-1]}")
    return rows


@contextlib.contextmanager
def _exclusive_times(device: str) -> Iterator[dict[str, float]]:
    r"""Seconds in the solvers, in the maps and in the iteration, each without those of the calls inside it."""
    spent: dict[str, float] = defaultdict(float)
    inside = [0.0]  # of the call in progress, and of those around it

    def timed(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            out: list[Any] = []
            inside.append(0.0)
            try:
                took = seconds(lambda: out.append(call(*args, **kwargs)), device)
                spent[kind] += took - inside[-1]
            finally:
                inside.pop()
            inside[-1] += took
            return out[0]

        return timed_call

    counting = problem._counting
    places: list[tuple[Any, str, str]] = [
        (Solver, "__call__", "solver"),
        (FixedPointIteration, "bind", "replica"),
        (BoundIteration, "init", "replica"),
        (BoundIteration, "rebind", "replica"),
        (BoundIteration, "select", "replica"),
        (BoundIteration, "_evaluate", "replica"),
        (capture, "all_constants", "iteration"),
        (bound, "checked_start", "iteration"),
        (bound, "_of", "iteration"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, kind in places:
            stack.enter_context(mock.patch.object(owner, name, timed(kind, getattr(owner, name))))
        counted = lambda f, layout, n: counting(timed("iteration", f), layout, n)  # noqa: E731
        stack.enter_context(mock.patch.object(problem, "_counting", counted))
        yield spent


def scaling(bench: Bench) -> list[dict[str, Any]]:
    r"""Time and peak bytes of tensors of a step with 5 iterations over pixels and batch (MRI, EI) and voxels (inpainting), and the
    exponents of power laws."""
    cells = {key: (task.to(bench.device), passes) for key, (task, passes) in scale.cells(bench.data).items()}
    work = {}
    for key, (task, passes) in cells.items():
        model = ours(task, Settings().exactly(scale.ITERATIONS))
        work[key] = lambda task=task, model=model, passes=passes: gradient(task, model, passes)
    seconds_of = medians(take_turns(work, bench.device, min(3, bench.rounds)))
    peaks = {}
    for key, step in work.items():
        with LiveBytes() as memory:
            step()
        peaks[key] = float(memory.peak)
    rows = [
        {"over": t["over"], "sizes": t["sizes"], "seconds": t["values"], "exponent": t["exponent"]}
        | {"bytes": b["values"], "exponent of bytes": b["exponent"]}
        for t, b in zip(scale.exponents(seconds_of), scale.exponents(peaks), strict=True)
    ]
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
