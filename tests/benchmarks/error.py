r"""Time of an EI step and of a reconstruction, with the error of every method beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.bench import OURS, Bench, counting, gradient, say, seconds, take_turns
from tests.benchmarks.peers import METHODS, Settings
from tests.benchmarks.tasks import Task
from tests.problems import relative_error

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
    (1e-5, 1e-2),
    (3e-6, 1e-2),
    (1e-6, 1e-3),
    (1e-6, 1e-4),
    (1e-6, 1e-5),
]
# relative error of the gradient; that of ct-ei is small beside its terms, and single precision has it to 4 %
EXACT_ENOUGH = {"ct": 5e-2, "mri": 1e-2}
LIMITS = {"ct": (600, 200), "mri": (150, 100)}  # evaluations and products of a pass
PATIENCE = {"ct": 8, "mri": 3}
TOLERANCES = (1e-3, 3e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 3e-6, 1e-6)
MOST = 1000  # evaluations of a reconstruction


def equal_error(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""An EI step at equal gradient error: each method at the loosest tolerances that are :data:`EXACT_ENOUGH` against float64.

    A method is not tried at tighter tolerances once it takes :data:`PATIENCE` times the work that ours did.
    """
    enough, (most, most_products) = EXACT_ENOUGH[name], LIMITS[name]
    task, exact = bench.contracting(name), bench.reference(name)
    rows, work, first, limit = [], {}, 0, float("inf")
    for method, build in METHODS.items():
        for i, (forward, backward) in enumerate(LEVELS):
            if i < first:
                continue
            model = build(task, Settings(forward, backward, most, most_products))
            errors: list[float] = []
            with counting(task) as count:
                took = seconds(lambda m=model, to=errors: to.append(_gradient_error(task, m, exact)), bench.device)
            error, spent = errors[0], count["evaluations"] + 2 * count["vjps"]
            say(f"  {method}: {forward:g}, {backward:g}: gradient error {error:.1e}, {count}, {took:.1f} s")
            at_limits = count["evaluations"] >= 2 * most and count["vjps"] >= 2 * most_products  # in both passes
            if error <= enough or spent > limit or at_limits:
                break
        if method == OURS:
            first, limit = max(0, i - 2), PATIENCE[name] * spent  # nobody needs far looser tolerances than ours
        rows.append({"method": method, "tolerances": [forward, backward], "gradient error": error, **count})
        rows[-1] |= {"exact enough": error <= enough, "goal": enough, "seconds": took}
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
