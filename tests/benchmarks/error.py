r"""Time of an EI step and of a reconstruction, with the error of every method beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.bench import Bench, counting, gradient, medians, say, seconds, take_turns
from tests.benchmarks.names import OURS, TARGETS
from tests.benchmarks.peers import METHODS, Settings
from tests.benchmarks.search import Trial, cheapest
from tests.benchmarks.tasks import Task
from tests.problems import relative_error

# from loose to tight; every method takes the cheapest pair that is exact enough
FORWARD = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 2e-6, 1.5e-6, 1e-6)
BACKWARD = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
START = {"ct": (1.5e-6, 3e-3), "mri": (3e-4, 1e-2)}  # where the search for ours begins
# relative error of the gradient; with ct-ei, single precision comes to 1.9 % at any tolerances below (1e-6, 1e-3)
EXACT_ENOUGH = {"ct": 2e-2, "mri": 1e-2}
LIMITS = {"ct": (1500, 600), "mri": (300, 200)}  # evaluations and products of a pass of ours
PATIENCE = {"ct": (6, 4), "mri": (4, 4)}  # of all forward and of all adjoint solves of a step, times the work of ours
BEYOND = 1.4  # times the target: methods that are slower are timed once
TOLERANCES = (1e-3, 3e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 3e-6, 1e-6)
MOST = 1000  # evaluations of a reconstruction


def equal_error(bench: Bench, name: str) -> list[dict[str, Any]]:
    r"""An EI step at equal gradient error: each method at the cheapest tolerances that are :data:`EXACT_ENOUGH` against float64.

    A method is stopped where its forward or its adjoint solves take :data:`PATIENCE` times the work of ours.
    """
    task, exact = bench.contracting(name), bench.reference(name)
    enough, limits, most = EXACT_ENOUGH[name], LIMITS[name], (float("inf"), float("inf"))
    start = FORWARD.index(START[name][0]), BACKWARD.index(START[name][1])
    rows, work = [], {}
    for method, build in METHODS.items():

        def settings(i: int, j: int, limits: tuple[int, int] = limits) -> Settings:
            return Settings(FORWARD[i], BACKWARD[j], *limits)

        def run(i: int, j: int, method=method, build=build, settings=settings, most=most) -> Trial:
            model, errors = build(task, settings(i, j)), []
            with counting(task) as count:
                took = seconds(lambda: errors.append(_gradient_error(task, model, exact)), bench.device)
            spent = count["evaluations"] + 2 * count["vjps"]
            stopped = count["evaluations"] >= most[0] or count["vjps"] >= most[1]
            say(f"  {method}: {FORWARD[i]:g}, {BACKWARD[j]:g}: gradient error {errors[0]:.1e}, {count}, {took:.1f} s")
            return Trial(errors[0], spent, stopped, took, count)

        if known := bench.known(f"equal error, {name}", method):
            i, j = FORWARD.index(known["tolerances"][0]), BACKWARD.index(known["tolerances"][1])
            best = run(i, j)
        else:
            (i, j), best = cheapest(run, start, (len(FORWARD), len(BACKWARD)), enough)
        if method == OURS:
            start = i, j
            forward, adjoint = (times * best.work for times in PATIENCE[name])
            limits = math.ceil(forward / 2), math.ceil(adjoint / 4)  # in each of two passes; products count twice
            most = 2 * limits[0], 2 * limits[1]
        row = {"method": method, "tolerances": [FORWARD[i], BACKWARD[j]], "gradient error": best.error, **best.count}
        row |= {"exact enough": best.error <= enough, "stopped": best.stopped and best.error > enough}
        rows.append(row | {"goal": enough, "seconds": best.seconds})
        work[method] = lambda model=build(task, settings(i, j)): gradient(task, model)
    return _timed(rows, work, bench, BEYOND * TARGETS["equal error"][name])


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
            known = bench.known(f"inference, {name}", method)
            for tol in TOLERANCES:
                if tol > (known["tolerance"] if known else first):
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
            rows[-1]["stopped"] = error > target and count["evaluations"] >= MOST
            work[method] = lambda model=model: model(task.y, task.physics)
        return _timed(rows, work, bench, BEYOND * TARGETS["inference"][name])


def each_error(x: Tensor, exact: Tensor) -> Tensor:
    r"""Relative distance of each image."""
    return (x.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def _timed(
    rows: list[dict[str, Any]], work: dict[str, Callable[[], Any]], bench: Bench, beyond: float = float("inf")
) -> list[dict[str, Any]]:
    first = {row["method"]: row["seconds"] for row in rows if "seconds" in row}
    times = take_turns(work, bench.device, bench.rounds, first, beyond)
    for row in rows:
        row |= {"seconds": medians(times)[row["method"]], "timings": len(times[row["method"]])}
        row["ratio"] = row["seconds"] / medians(times)[OURS]
        say(f"  {row['method']}: {row['seconds']:.2f} s, {row['ratio']:.2f} x ours")
    return rows
