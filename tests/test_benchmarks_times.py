r"""The measurements of times and of memory that need no trained model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepinv_deq import EquilibriumUNet
from deepinv_deq.iterations import FixedPointIteration
from deepinv_deq.solvers import Solver
from tests.benchmarks import scale, tasks, threads, times
from tests.benchmarks.bench import Bench, gradient
from tests.benchmarks.cost_tables import _targets
from tests.benchmarks.part_tables import TABLES
from tests.benchmarks.peers import Settings, ours
from tests.problems import relative_error


@pytest.fixture
def small(monkeypatch):
    r"""A benchmark of a small MRI task of any batch, in one round."""

    def make(name="mri", batch=2):
        torch.manual_seed(0)
        return tasks.make("mri", data=None, batch=batch, size=16, net=EquilibriumUNet(2, channels=(8, 16)).eval())

    out = Bench(None, "cpu", rounds=1)
    out.contracting = make
    monkeypatch.setattr(times, "ROUNDS", 1)
    return out


def table(part, rows):
    return TABLES[part][1](rows)


def test_exclusive_times_add_up_to_the_solves_and_leave_nothing_behind(small, monkeypatch):
    before = Solver.__call__, FixedPointIteration.bind
    now = [0.0]

    def one_second_each(work, device):
        start = now[0]
        work()
        now[0] += 1.0
        return now[0] - start

    monkeypatch.setattr(times, "seconds", one_second_each)
    task = small.contracting()
    with times._exclusive_times("cpu") as spent:
        gradient(task, ours(task, Settings().exactly(3)))
    # every timed call took a second besides the calls inside it, so that each is counted once
    assert sum(spent.values()) == now[0]
    # a forward and a backward solve in each of two passes, of three iterations each
    assert spent["solver"] == 4 and spent["replica"] >= 2 and spent["iteration"] >= 12
    assert (Solver.__call__, FixedPointIteration.bind) == before


def test_shares_of_a_step_are_below_one_and_are_judged_together(small):
    rows = times.overhead(small)
    assert all(0 < r["share"] < 1 and 0 < r["replica"] < 1 for r in rows)
    assert table("overhead", rows).count("%") == 2 * len(rows)
    met = {"task": "ct", "share": 0.03, "replica": 0.01}
    assert "| 0.040 | met |" in _targets({"overhead": {"rows": [met]}})
    assert "| 0.060 | **missed** |" in _targets({"overhead": {"rows": [met | {"replica": 0.03}]}})


def test_growth_has_the_exponents_of_times_and_of_bytes(small, monkeypatch):
    power = {("pixels", side): 3.0 * side**2.2 for side in (64, 128, 256)} | {("voxels", 2): 1.0, ("voxels", 4): 8.0}
    power |= {("batch", 1): 1.0, ("batch", 4): 2.0}
    assert [round(r["exponent"], 6) for r in scale.exponents(power)] == [1.1, 0.5, 1.0]
    cells = {("pixels", 1): (small.contracting(batch=1), 2), ("pixels", 2): (small.contracting(batch=4), 2)}
    cells |= {(kind, n): (small.contracting(batch=n), 1) for kind in ("batch", "voxels") for n in (1, 4)}
    monkeypatch.setattr(scale, "cells", lambda data: cells)
    rows = times.scaling(small)
    assert [r["over"] for r in rows] == ["pixels", "batch", "voxels"]
    assert all(r["bytes"][0] < r["bytes"][1] and 0 < r["exponent of bytes"] < 1.1 for r in rows)
    assert table("scaling", rows).count("\n") == 4
    assert "exponent of memory over pixels, over batch, over voxels" in _targets({"scaling": {"rows": rows}})


def test_python_threads_share_the_gradient_of_a_batch(small):
    task = small.contracting(batch=4)
    model = ours(task, Settings().exactly(3))
    parts = [gradient(replace(task, x=task.x[i : i + 2], y=task.y[i : i + 2]), model) for i in (0, 2)]
    whole = [a + b for a, b in zip(*parts, strict=True)]
    assert relative_error(threads.in_parallel(task, model, 2), whole) < 1e-6


def test_threads_are_compared_with_one(small):
    before = torch.get_num_threads()
    rows = threads.threads(small)
    assert torch.get_num_threads() == before
    assert [r["ratio"] for r in rows if r["variant"] == threads.ONE] == [1.0, 1.0] and len(rows) == 14
    assert table("threads", rows).count("\n") == 15
