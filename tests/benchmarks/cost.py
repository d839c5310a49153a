r"""What a DEQ costs, next to its peers, with the error of the gradient beside every time.

.. code-block:: bash

    python -m tests.benchmarks.cost --data ../shared/data      # all of it, about an hour on two cores
    python -m tests.benchmarks.cost --only sparse counts       # parts of it; the record keeps the others
    python docs/fill_tables.py                                 # the tables of docs/cost.md from the record

Prints what it measures and writes ``tests/benchmarks/records/cost-<device>.json``. Times are medians over rounds in which all
methods take turns. Every memory figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from torch import Tensor

from deepinv_deq import DEQReconstructor, Solver
from tests.benchmarks import limits, others, scale, starts, tasks
from tests.benchmarks.live_bytes import LiveBytes
from tests.benchmarks.peers import METHODS, Settings, ours, whole_batch
from tests.benchmarks.tasks import CACHE, ROOT, Task
from tests.problems import relative_error

RECORDS = Path(__file__).parent / "records"
BATCH = {"ct": 4, "mri": 2}  # of the parts with trained denoisers
IMAGES = {"ct": 1, "mri": 1}  # of the parts with contracting models
ROUNDS = 5
# from loose to tight: (forward, backward) tolerances among which every method takes the first that is exact enough
LEVELS = [
    (1e-2, 1e-1),
    (1e-3, 1e-2),
    (3e-4, 1e-2),
    (3e-4, 3e-3),
    (2e-4, 5e-3),
    (2e-4, 3e-3),
    (1e-4, 3e-3),
    (1e-4, 1e-3),
    (5e-5, 1e-3),
    (1e-5, 1e-3),
    (1e-5, 1e-4),
    (1e-6, 1e-4),
    (1e-6, 1e-5),
]
EXACT_ENOUGH = 1e-2
TOLERANCES = (1e-3, 3e-4, 1e-4, 5e-5, 2e-5, 1e-5, 3e-6, 1e-6)
MOST = 250  # evaluations of a reconstruction
OURS = "deepinv-deq"


class Bench:
    r"""What the parts share: data folder, device, tasks made once, reference gradients kept on disk."""

    def __init__(self, data: Path | None, device: str, rounds: int = ROUNDS):
        self.data, self.device, self.rounds = data, device, rounds
        self._tasks: dict[Any, Task] = {}

    def task(self, name: str, batch: int | None = None, size: int | None = None) -> Task:
        key = name, batch or BATCH[name], size
        if key not in self._tasks:
            task = tasks.make(name, data=self.data, batch=key[1], size=size).to(self.device)
            # whether the map can be restricted to samples is measured once, and not part of a step
            with torch.no_grad():
                ours(task, Settings(forward_tol=0.5))(task.y, task.physics)
            self._tasks[key] = task
        return self._tasks[key]

    def contracting(self, name: str) -> Task:
        r"""A shipped model at the paper's size."""
        key = name, "contracting", IMAGES[name]
        if key not in self._tasks:
            task = tasks.contracting(name, data=self.data, batch=IMAGES[name]).to(self.device)
            with torch.no_grad():
                ours(task, Settings(forward_tol=0.5))(task.y, task.physics)
            self._tasks[key] = task
        return self._tasks[key]

    def fixed_point(self, name: str) -> Tensor:
        r"""The fixed point in float64, a hundred times as exact as is asked for."""

        def solve() -> Tensor:
            task = tasks.contracting(name, data=self.data, batch=IMAGES[name]).to(torch.float64)
            model = ours(task, Settings(1e-7, 1e-5, 1500))
            with torch.no_grad():
                x = model(task.y, task.physics)
            assert model.forward_stat.converged.all(), model.forward_stat.outcome
            return x

        return self._kept(f"fixed-point-{name}", solve)

    def reference(self, name: str) -> list[Tensor]:
        r"""The gradient of the loss in float64, both solves far tighter than any method's."""

        def solve() -> list[Tensor]:
            task = tasks.contracting(name, data=self.data, batch=IMAGES[name]).to(torch.float64)
            model = ours(task, Settings(1e-6, 1e-4, 1500, 300))
            exact = gradient(task, model)
            assert model.forward_stat.converged.all() and model.hook.stat.converged.all(), model.forward_stat.outcome
            return exact

        return self._kept(f"gradient-{name}", solve)

    def _kept(self, what: str, solve: Callable[[], Any]) -> Any:
        path = CACHE / f"contracting-{what}-{IMAGES[what.split('-')[-1]]}-{'data' if self.data else 'phantoms'}.pt"
        if not path.exists():
            torch.save(solve(), path)
        return torch.load(path, weights_only=True)


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
    work: dict[Any, Callable[[], Any]], device: str, rounds: int = ROUNDS, first: dict[str, float] | None = None
) -> dict[Any, float]:
    r"""Median seconds of each, in rounds where all of them run after one another.

    Given a ``first`` time of each, who took three times as long as the quickest sits out: that ratio is not in doubt.
    """
    out = {name for name in first or {} if first[name] > 3 * min(first.values())}
    times: dict[Any, list[float]] = {name: [first[name]] if name in out else [] for name in work}
    for _ in range(rounds):
        for name in (n for n in work if n not in out):
            times[name].append(seconds(work[name], device))
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

    def watch(module, args, out: Tensor) -> Tensor:
        count["evaluations"] += len(out) / len(task.x)
        count["taped"] += len(out) / len(task.x) * out.requires_grad
        return Probe.apply(out) if out.requires_grad else out

    handle = task.iteration.denoiser.register_forward_hook(watch)
    try:
        yield count
    finally:
        handle.remove()


# The parts -----------------------------------------------------------------------------------------------------------


def equal_error(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""An EI step at equal gradient error: each method at the loosest tolerances that give 1 % against float64.

    A method is not tried at tighter tolerances once it takes three times (CT: eight times) the work that ours did.
    """
    patience = {"ct": 8, "mri": 3}[name]
    task, exact = bench.contracting(name), bench.reference(name)
    rows, work, first, limit = [], {}, 0, float("inf")
    for method, build in METHODS.items():
        for i, (forward, backward) in enumerate(LEVELS):
            if i < first:
                continue
            model = build(task, Settings(forward, backward, 150, 100))
            errors: list[float] = []
            with counting(task) as count:
                took = seconds(lambda m=model, to=errors: to.append(_gradient_error(task, m, exact)), bench.device)
            error, spent = errors[0], count["evaluations"] + 2 * count["vjps"]
            say(f"  {method}: {forward:g}, {backward:g}: gradient error {error:.1e}, {count}, {took:.1f} s")
            if error <= EXACT_ENOUGH or spent > limit or (count["evaluations"] >= 300 and count["vjps"] >= 200):
                break  # exact enough, out of the race, or at the largest number of iterations of both solves in both passes
        if method == OURS:
            first, limit = max(0, i - 2), patience * spent  # nobody needs far looser tolerances than ours
        rows.append({"method": method, "tolerances": [forward, backward], "gradient error": error, **count})
        rows[-1] |= {"exact enough": error <= EXACT_ENOUGH, "seconds": took}
        work[method] = lambda model=model: gradient(task, model)
    return _timed(rows, work, bench)


def _gradient_error(task: Task, model: Callable[..., Tensor], exact: list[Tensor]) -> float:
    return relative_error([g.cpu() for g in gradient(task, model)], exact)


def equal_iterations(bench: Bench, name: str, iterations: int = 5) -> list[dict[str, Any]]:
    r"""An EI step with 5 iterations of both solves, whatever they reach."""
    task, exact = bench.contracting(name), bench.reference(name)
    rows, work = [], {}
    for method, build in METHODS.items():
        model = build(task, Settings().exactly(iterations))
        with counting(task) as count:
            error = relative_error([g.cpu() for g in gradient(task, model)], exact)
        rows.append({"method": method, "gradient error": error, **count})
        work[method] = lambda model=model: gradient(task, model)
    return _timed(rows, work, bench)


def inference(bench: Bench, name: str, target: float = 1e-3) -> list[dict[str, Any]]:
    r"""Reconstruction at equal true error: each method at the loosest tolerance at which every image is within 1e-3 of the
    fixed point in float64. The true residual is recorded, too."""
    task, exact = bench.contracting(name), bench.fixed_point(name)
    f = task.iteration.bind(task.y, task.physics)
    rows, work, first = [], {}, float("inf")
    with torch.no_grad():
        for method, build in METHODS.items():
            for tol in TOLERANCES:
                if tol > first:
                    continue
                model = build(task, Settings(forward_tol=tol, forward_iter=MOST))
                found: list[Tensor] = []
                with counting(task) as count:
                    took = seconds(lambda m=model, to=found: to.append(m(task.y, task.physics)), bench.device)
                x = found[0]
                error = float(each_error(x.cpu(), exact).max())
                if error <= target or count["evaluations"] >= MOST:
                    break  # a smaller tolerance would take no more evaluations
            residual = float(((f(x) - x).flatten(1).norm(dim=1) / f(x).flatten(1).norm(dim=1)).max())
            say(f"  {method}: tolerance {tol:g}: error {error:.1e}, residual {residual:.1e}, {count}")
            if method == OURS:
                first = 30 * tol  # nobody needs far larger tolerances than ours
            rows.append({"method": method, "tolerance": tol, "error": error, "residual": residual})
            rows[-1] |= {"evaluations": count["evaluations"], "exact enough": error <= target, "seconds": took}
            work[method] = lambda model=model: model(task.y, task.physics)
        return _timed(rows, work, bench)


def each_error(x: Tensor, exact: Tensor) -> Tensor:
    r"""Relative distance of each image."""
    return (x.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def _timed(rows: list[dict[str, Any]], work: dict[str, Callable[[], Any]], bench: Bench) -> list[dict[str, Any]]:
    first = {row["method"]: row["seconds"] for row in rows if "seconds" in row}
    medians = take_turns(work, bench.device, bench.rounds, first=first)
    for row in rows:
        row["seconds"] = medians[row["method"]]
        row["ratio"] = row["seconds"] / medians[OURS]
        say(f"  {row['method']}: {row['seconds']:.2f} s, {row['ratio']:.2f} x ours")
    return rows


def backward_products(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""Vector-Jacobian products of the adjoint solve against full GMRES in float64 without preconditioner, per image."""
    tolerances, taken = (1e-2, 1e-3, 1e-4), {}
    for kind in ("ours", "float64"):
        task = tasks.make(name, data=bench.data, batch=BATCH[name])
        task = task.to(torch.float64) if kind == "float64" else task.to(bench.device)
        model = ours(task, Settings(1e-5 if kind == "ours" else 1e-6, 1e-2, 400))
        x_hat = model(task.y, task.physics)
        rng = torch.Generator().manual_seed(0)  # the cotangent of an l2 loss against a noisy reference
        noise = 0.05 * torch.randn(task.x.shape, generator=rng).to(task.x)
        loss = ((x_hat - task.x + noise) ** 2).sum()
        for tol in tolerances:
            model.hook.solver = Solver("gmres", max_iter=150, tol=tol)
            if kind == "float64":  # the optimum: no restart
                model.hook.solver = replace(model.hook.solver, history=150, precondition=False)
            torch.autograd.grad(loss, parameters(task), retain_graph=True)
            extra = 1 if kind == "ours" else 0  # the last product, which is for the parameters
            taken[kind, tol] = (model.hook.stat["nstep"] + extra).int().tolist()
            say(f"  {name} {kind} {tol:g}: {taken[kind, tol]}")
    return [
        {"task": name, "tolerance": t, "optimum": taken["float64", t], "ours": taken["ours", t]} for t in tolerances
    ]


def over_the_limit(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""Evaluations and products until the error is small, over those of full GMRES on the linearised problem, per image."""
    exact, rows = bench.fixed_point(name), []
    task = bench.contracting(name)
    double = tasks.contracting(name, data=bench.data, batch=IMAGES[name]).to(torch.float64)
    quiet = {"tol": 1e-7, "max_iter": 300, "on_failure": "ignore"}
    for i in range(IMAGES[name]):
        limit = limits.forward_limit(double, exact, i)
        taken = {m: limits.evaluations(task, exact, i, Solver(m, **quiet)) for m in ("anderson", "broyden")}
        rows.append({"what": "evaluations", "image": i, "optimum": min(limit.values()), "variants": limit, **taken})
        limit, b_star = limits.adjoint_limit(double, exact, i)
        taken, error = limits.products(task, exact, b_star, i, Solver("gmres", max_iter=300, on_failure="ignore"))
        rows.append({"what": "products", "image": i, "optimum": min(limit.values()), "variants": limit, "gmres": taken})
        rows[-1]["error"] = error
        say(f"  {rows[-2]}\n  {rows[-1]}")
    return rows


def other_solvers(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""SciPy, jaxopt and optimistix on the same map, one image: evaluations until 1e-3 of the fixed point."""
    exact, task = bench.fixed_point(name), bench.contracting(name)
    f, x0, x_star = limits.of_image(task, exact, 0)
    rows = []
    for method in ("anderson", "broyden"):
        taken = limits.evaluations(task, exact, 0, Solver(method, tol=1e-7, max_iter=300, on_failure="ignore"))
        rows.append({"method": f"{OURS}, {method}", "preconditioned": f.preconditioner(x0) is not None})
        rows[-1] |= {"evaluations": taken, "products": 0, "error": limits.IMAGE, "reached": taken < float("inf")}
        say(f"  {rows[-1]}")
    for row in others.count(
        lambda precondition: others.Counted(f, x0, x_star, precondition), f.preconditioner(x0) is not None
    ):
        say(f"  {row}")
        rows.append(row)
    return rows


def counts(bench: Bench) -> list[dict[str, Any]]:
    r"""Taped evaluations per pass, and evaluations in evaluation mode beyond the solver's."""
    rows = []
    for name in BATCH:
        task = bench.task(name)
        for passes in (1, 2, 4):
            model = ours(task, Settings(1e-2, 1e-1))
            with counting(task) as count:
                gradient(task, model, passes)
            rows.append({"task": name, "passes": passes, "taped per pass": count["taped"] / passes})
        with torch.no_grad(), counting(task) as count:
            model(task.y, task.physics)
        rows.append({"task": name, "evaluation mode": count["evaluations"] - model.forward_stat.work})
        say(f"  {rows[-4:]}")
    return rows


def overhead(bench: Bench) -> list[dict[str, Any]]:
    r"""Share of an EI step that is neither the iteration, its products, nor the loss: the solvers' own algebra."""
    rows = []
    for name in BATCH:
        task = bench.task(name)
        model = ours(task, Settings(1e-4, 1e-3, 200, 200))
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
    rows = scale.exponents(take_turns(work, bench.device, min(3, bench.rounds)))
    for row in rows:
        say(f"  {row}")
    return rows


def data_parallel(bench: Bench) -> list[dict[str, Any]]:
    r"""What a step of two processes takes beyond that of two processes that do not wait for one another."""
    rows = scale.data_parallel(bench.data)
    say(f"  {rows}")
    return rows


def learned_start(bench: Bench) -> list[dict[str, Any]]:
    r"""Evaluations to 1e-3 of the fixed point from a start that a network predicts."""
    rows = starts.count(bench.contracting("ct"), bench.fixed_point("ct"), "ct", bench.data)
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
    medians = take_turns(work, bench.device, 4 * ROUNDS)
    ratio = medians["Tomography"] / medians["SparseLinearPhysics"]
    row = {"build seconds": build, "error": error, "seconds": medians, "ratio": ratio}
    say(f"  {row}")
    return [row]


def memory(bench: Bench) -> list[dict[str, Any]]:
    r"""Peak resident memory of two EI steps of batch 4 above what the task itself takes."""
    return _cells(
        bench,
        [
            {"what": "peers", "task": name, "method": method, "iterations": 10, "passes": 2, "steps": 2, "batch": 4}
            for name in BATCH
            for method in (*METHODS, f"{OURS}, whole batch")
        ],
    )


def memory_growth(bench: Bench) -> list[dict[str, Any]]:
    r"""Peak bytes of tensors in one step of ours, over the number of iterations and of passes.

    Resident memory of one cell differs from run to run by as much as is looked for. Beside it are the bytes of the loss
    alone, which holds some images per pass whatever the model.
    """
    one = {"task": "mri", "method": OURS, "iterations": 10, "passes": 1, "steps": 1, "batch": 2}
    cells = [{**one, "what": "iterations", "iterations": n} for n in (10, 30, 100)]
    cells += [{**one, "what": "iterations", "iterations": 100, "full": True}]
    return _cells(bench, cells + [{**one, "what": "passes", "passes": n} for n in (1, 2, 4)])


def _cells(bench: Bench, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""Measure each in a process of its own."""
    rows = []
    for cell in cells:
        command = [sys.executable, "-m", "tests.benchmarks.cost", "--device", bench.device]
        command += [] if bench.data is None else ["--data", str(bench.data)]
        command += ["--memory-cell", json.dumps(cell)]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        say(f"  {rows[-1]}")
    return rows


def memory_cell(bench: Bench, cell: dict[str, Any]) -> dict[str, Any]:
    task = tasks.make(cell["task"], data=bench.data, batch=cell["batch"]).to(bench.device)
    settings = Settings().exactly(cell["iterations"])
    model = {**METHODS, f"{OURS}, whole batch": whole_batch}[cell["method"]](task, settings)
    if cell.get("full"):
        model.hook.solver = replace(model.hook.solver, history=cell["iterations"])
    if cell["what"] != "peers":
        return cell | {"MB": _live(task, model, cell["passes"]), "loss MB": _live(task, _adjoint(task), cell["passes"])}
    before = _resident(bench.device, reset=True)
    for _ in range(cell["steps"]):
        for p in parameters(task):
            p.grad = None
        task.loss(model, cell["passes"]).backward()
    return cell | {"MB": (_resident(bench.device) - before) / 1e6}


def _live(task: Task, model: Callable[..., Tensor], passes: int) -> float:
    with LiveBytes() as tensors:
        task.loss(model, passes).backward()
    return tensors.peak / 1e6


def _adjoint(task: Task) -> Callable[..., Tensor]:
    r"""A model that keeps next to nothing: what a step takes with it is the loss's own."""
    weight = torch.ones((), device=task.y.device, requires_grad=True)
    return lambda y, physics: weight * physics.A_adjoint(y)


def _resident(device: str, reset: bool = False) -> int:
    r"""Largest memory so far, in bytes; of the process on CPU, of tensors on CUDA. ``reset`` forgets what was before."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def options(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""What each saving of ours is worth: an EI step without it, and with what the user may add."""
    rows = []
    task, exact = bench.task(name), bench.reference(name)
    settings, rough = Settings(1e-4, 1e-3, 200, 200), Settings(1e-2, 1e-2, 50, 50)  # half precision reaches no more
    twin = tasks.make(name, data=bench.data, batch=BATCH[name]).to(bench.device)
    twin.iteration.denoiser.to(memory_format=torch.contiguous_format)
    compiled = tasks.make(name, data=bench.data, batch=BATCH[name]).to(bench.device)
    compiled.iteration.denoiser.compile()
    cells: dict[str, tuple[Task, Callable[..., Tensor], Any]] = {
        OURS: (task, ours(task, settings), None),
        "whole batch at a time": (task, whole_batch(task, settings), None),
        **({"no preconditioner": (task, ours(task, settings, precondition=False), None)} if name == "ct" else {}),
        "channels outermost": (twin, ours(twin, settings), None),
        "tolerances of 1e-2": (task, ours(task, rough), None),
        "tolerances of 1e-2, bfloat16 autocast": (task, ours(task, rough), torch.bfloat16),
        "with torch.compile": (compiled, ours(compiled, settings), None),
    }
    work, errors = {}, {}
    for label, (t, model, dtype) in cells.items():

        def step(t=t, model=model, dtype=dtype):
            with torch.autocast(bench.device, dtype=dtype, enabled=dtype is not None):
                loss = t.loss(model)
            return torch.autograd.grad(loss, parameters(t))

        try:
            with counting(t) as count:
                errors[label] = relative_error([g.cpu() for g in step()], exact), dict(count)
        except Exception as error:  # no compiler, say
            say(f"  {label}: {type(error).__name__}: {str(error)[:200]}")
            rows.append({"task": name, "option": label, "failed": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        work[label] = step
    medians = take_turns(work, bench.device, 3)
    for label, (error, count) in errors.items():
        if label in medians:
            row = {"task": name, "option": label, "gradient error": error, **count, "seconds": medians[label]}
            rows.append(row | {"ratio": medians[label] / medians[OURS]})
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


PARTS: dict[str, Callable[[Bench], Any]] = {
    "sparse": sparse,
    "counts": counts,
    "memory": memory,
    "growth of memory": memory_growth,
    **{f"equal error, {n}": lambda bench, n=n: equal_error(bench, n) for n in BATCH},
    **{f"equal iterations, {n}": lambda bench, n=n: equal_iterations(bench, n) for n in BATCH},
    **{f"inference, {n}": lambda bench, n=n: inference(bench, n) for n in BATCH},
    **{f"over the limit, {n}": lambda bench, n=n: over_the_limit(bench, n) for n in BATCH},
    **{f"other solvers, {n}": lambda bench, n=n: other_solvers(bench, n) for n in BATCH},
    **{f"products, {n}": lambda bench, n=n: backward_products(bench, n) for n in BATCH},
    "overhead": overhead,
    "scaling": scaling,
    "data parallel": data_parallel,
    "learned start": learned_start,
    **{f"options, {n}": lambda bench, n=n: options(bench, n) for n in BATCH},
    "warm starts": warm_starts,
}


def say(text: str) -> None:
    print(text, flush=True)


def machine(device: str) -> dict[str, Any]:
    r"""Where the record was made."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {"torch": torch.__version__, "deepinv": dinv.__version__, "torchdeq": "0.1.0"}
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": name, "threads": torch.get_num_threads(), "gpu": gpu, "versions": versions}


def main() -> None:
    r"""Measure, print, record."""
    parser = argparse.ArgumentParser(description="Cost of a DEQ step, next to its peers.")
    parser.add_argument("--data", type=Path, help="folder with the real images; default: phantoms")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", help=f"parts to measure, of: {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of which medians are taken")
    parser.add_argument("--memory-cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    bench = Bench(args.data, args.device, args.rounds)
    if args.memory_cell:
        print(json.dumps(memory_cell(bench, json.loads(args.memory_cell))))
        return
    chosen = [p for o in args.only or [""] for p in PARTS if p.startswith(o)]
    if not chosen:
        sys.exit(f"error: no part {' '.join(args.only)}: must be one of {', '.join(PARTS)}.")
    path = RECORDS / f"cost-{args.device}.json"
    for part in chosen:
        say(f"{part} ...")
        start = time.time()
        rows = PARTS[part](bench)
        record = json.loads(path.read_text()) if path.exists() else {"parts": {}}
        entry = {"rows": rows, "minutes": (time.time() - start) / 60, "date": time.strftime("%Y-%m-%d")}
        entry |= {"data": args.data is not None, "load": os.getloadavg()[0], "machine": machine(args.device)}
        record["parts"][part] = entry
        RECORDS.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(path)


if __name__ == "__main__":
    main()
