r"""Numbers of evaluations and products, next to the smallest possible numbers and to the solvers of other libraries."""

from __future__ import annotations

from typing import Any

import torch

from deepinv_deq import Solver
from tests.benchmarks import limits, others, tasks
from tests.benchmarks.bench import IMAGES, Bench, counting, gradient, say
from tests.benchmarks.names import BATCH, OURS
from tests.benchmarks.peers import Settings, ours

DEPTHS = (5, 16, 40)  # of Anderson's memory, besides the default


def over_the_limit(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""Evaluations and products until the error is small, over those of full GMRES on the linearised problem, per image."""
    exact, rows = bench.fixed_point(name), []
    task = bench.contracting(name)
    double = tasks.contracting(name, data=bench.data, batch=IMAGES[name]).to(torch.float64)
    quiet: dict[str, Any] = {"tol": 1e-7, "max_iter": 300, "on_failure": "ignore"}
    solvers = {"anderson": Solver("anderson", **quiet), "broyden": Solver("broyden", **quiet)}
    solvers |= {f"anderson, {n} points": Solver("anderson", history=n, **quiet) for n in DEPTHS}
    for i in range(IMAGES[name]):
        limit = limits.forward_limit(double, exact, i)
        taken = {label: limits.evaluations(task, exact, i, solver) for label, solver in solvers.items()}
        rows.append({"what": "evaluations", "image": i, "optimum": min(limit.values()), "variants": limit, **taken})
        limit, b_star = limits.adjoint_limit(double, exact, i)
        taken, error = limits.products(task, exact, b_star, i, Solver("gmres", max_iter=300, on_failure="ignore"))
        rows.append({"what": "VJPs", "image": i, "optimum": min(limit.values()), "variants": limit, "gmres": taken})
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
        task = bench.contracting(name, BATCH[name])
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
