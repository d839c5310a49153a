r"""The measurements of the page Benchmarks: goals, searches and tables that can be wrong without any benchmark failing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torchdeq

from deepinv_deq import EquilibriumUNet
from tests.benchmarks import bench, error, exactness, limits, options, peers, starts, tasks
from tests.benchmarks.bench import take_turns
from tests.benchmarks.cost_tables import _targets
from tests.benchmarks.names import MEASURED, NAMES, OURS, TARGETS
from tests.benchmarks.part_tables import TABLES, _methods, _over_the_limit
from tests.benchmarks.ratios import Kind, best_peer
from tests.benchmarks.search import Trial, cheapest


def test_references_are_ten_times_tighter_than_all_levels():
    forward, backward = bench.REFERENCE
    assert 10 * forward <= min(error.FORWARD) * (1 + 1e-9) and 10 * backward <= min(error.BACKWARD) * (1 + 1e-9)
    assert 10 * bench.POINT[0] <= min(error.TOLERANCES) * (1 + 1e-9)


@pytest.mark.parametrize("task", NAMES)
def test_methods_are_stopped_beyond_the_target(task):
    target = TARGETS["equal error"][task]
    forward, adjoint = error.PATIENCE[task]
    assert min(forward, adjoint + 1) >= target and error.BEYOND > 1.2


def searched(errors_forward, errors_backward, start, enough=1.0, stopped_beyond=math.inf):
    r"""The search where errors add up, and each step tighter on either list takes one unit more work."""
    runs = []

    def run(i, j):
        runs.append((i, j))
        work = float(i + j)
        return Trial(errors_forward[i] + errors_backward[j], work, work >= stopped_beyond, 0.0, {})

    pair, best = cheapest(run, start, (len(errors_forward), len(errors_backward)), enough)
    return pair, best, runs


@pytest.mark.parametrize("start", [(0, 0), (2, 0), (0, 3), (4, 4)])
def test_tolerances_are_searched_separately(start):
    forward, backward = [9, 5, 2, 0.9, 0.2, 0.1], [8, 0.7, 0.3, 0.1, 0.05]
    pair, best, runs = searched(forward, backward, start)
    assert pair == (4, 1) and best.error <= 1.0
    assert len(runs) == len(set(runs)) <= 14


def test_a_search_ends_at_the_limit_of_work_and_at_the_tightest_pair():
    pair, best, runs = searched([9.0] * 6, [9.0] * 6, (1, 1), stopped_beyond=4)
    assert pair == (2, 2) and best.stopped and runs == [(1, 1), (2, 2)]
    pair, best, _ = searched([9.0] * 3, [9.0] * 2, (0, 0))
    assert pair == (2, 1) and not best.stopped and best.error > 1.0


def test_only_methods_far_beyond_the_target_are_timed_once():
    work = {name: lambda: None for name in (OURS, "near", "far")}
    first = {OURS: 1.0, "near": 7.4, "far": 7.6}
    times = take_turns(work, "cpu", 5, first, beyond=7.5)
    assert {name: len(values) for name, values in times.items()} == {OURS: 5, "near": 5, "far": 1}
    assert times["far"] == [7.6]


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    r"""A benchmark of a tiny task, whose cached results are counted."""
    task = SimpleNamespace(iteration=Line(), x=torch.ones(1), y=torch.ones(1))
    task.to = lambda dtype: task
    monkeypatch.setattr(bench, "CACHE", tmp_path)
    monkeypatch.setattr(bench.tasks, "contracting", lambda *args, **kwargs: task)
    solved = []

    def kept(tolerances=(1e-8, 1e-5), batch=1):
        b = bench.Bench(None, "cpu")
        return b._kept("gradient", "ct", tolerances, batch, lambda t: solved.append(1) or torch.ones(1))

    return task, kept, solved


def test_a_cached_reference_is_of_the_same_weights_and_tolerances(cache):
    task, kept, solved = cache
    kept(), kept()
    assert len(solved) == 1
    kept(tolerances=(1e-6, 1e-4))
    assert len(solved) == 2
    task.iteration.weight.data.mul_(2)
    kept(), kept()
    assert len(solved) == 3
    task.y = 2 * task.y
    kept(), kept(batch=2)
    assert len(solved) == 5


def test_a_cached_start_is_of_the_same_weights():
    task = SimpleNamespace(iteration=Line())
    first = starts.cached(task, "ct", None, 10)
    assert first == starts.cached(task, "ct", None, 10) != starts.cached(task, "ct", None, 9)
    task.iteration.weight.data.mul_(2)
    assert first != starts.cached(task, "ct", None, 10)


def test_full_gmres_that_fails_has_no_count():
    turn = torch.roll(torch.eye(8, dtype=torch.float64), 1, 0)  # GMRES needs all 8 products
    rhs = torch.eye(8, dtype=torch.float64)[0]
    exact = torch.linalg.solve(torch.eye(8) - 2 * turn, rhs)

    def taken(most):
        distance = lambda d: float((d - exact).norm() / exact.norm())  # noqa: E731
        return limits.products_of_gmres(lambda d: 2 * turn @ d, rhs, distance, 1e-8, None, False, most)

    assert taken(20) == 8 and taken(7) == math.inf


def test_a_limit_that_was_not_found_is_no_success():
    row = {"what": "VJPs", "image": 0, "optimum": math.inf, "variants": {"plain": math.inf}, "gmres": 81}
    assert "| > 300 | – | gmres | 81 | – |" in _over_the_limit([row])
    parts = {"over the limit, ct": {"rows": [row]}}
    (line,) = [line for line in _targets(parts).splitlines() if "over the limit" in line]
    assert "not reached" in line and "missed" in line
    row |= {"optimum": 64, "gmres": math.inf}
    assert "| > 300 | – |" in _over_the_limit([row])


def steps(**peer):
    ours = {"method": OURS, "gradient error": 0.009, "exact enough": True, "ratio": 1.0, "goal": 0.02}
    peer = {"method": "peer", "gradient error": 0.9, "exact enough": False, "ratio": 8.3, "goal": 0.02} | peer
    return [row | {"evaluations": 1204.0, "vjps": 400.0, "seconds": 1.0} for row in (ours, peer)]


def test_tables_say_that_a_ratio_is_a_lower_bound_and_name_the_goal():
    rows = steps(stopped=True)
    assert "| 1.00 |" in _methods(rows) and "| ≥ 8.30 (stopped after 1204 evaluations, 400 VJPs) |" in _methods(rows)
    (line,) = [line for line in _targets({"equal error, ct": {"rows": rows}}).splitlines() if "EI step" in line]
    assert "within 2 %" in line and "| ≥ 8.30 | met |" in line
    rows[0]["tolerances"] = [1.5e-6, 1e-3]
    assert "| 1.5e-06, 1e-03 |" in _methods(rows)
    rows = steps(stopped=False)
    assert "9.0e-01 (missed)" in _methods(rows) and "| 8.30 |" in _methods(rows)
    (line,) = [line for line in _targets({"equal error, ct": {"rows": rows}}).splitlines() if "EI step" in line]
    assert "no peer is exact enough" in line and "| 8.30 | undecided |" in line  # it is no lower bound
    assert best_peer([*steps(stopped=True), *steps(ratio=9.0, stopped=False)]) == (8.3, Kind.INEXACT)
    assert best_peer(steps(**{"exact enough": True, "stopped": False})) == (8.3, Kind.EXACT)


def test_solvers_of_others_say_how_they_were_stopped():
    row = {"preconditioned": False, "reached": False, "error": 0.15}
    rows = [row | {"method": "SciPy anderson", "evaluations": 200, "products": 0}]
    rows += [row | {"method": "optimistix Newton, GMRES", "evaluations": 1, "products": 199}]
    title, table = TABLES["other solvers"]
    assert "One image" in table(rows) and "200 evaluations" in title
    assert "optimistix Newton, GMRES: the 199 Jacobian products end before" in table(rows)
    assert "end before" not in table(rows[:1])


def test_every_part_has_a_table_and_a_description():
    assert MEASURED.keys() == TABLES.keys()


@pytest.fixture
def small(monkeypatch):
    r"""A benchmark of a small task on a machine without a compiler."""

    def make(*args, **kwargs):
        torch.manual_seed(0)
        return tasks.make("mri", data=None, batch=2, size=16, net=EquilibriumUNet(2, channels=(8, 16)).eval())

    def fail(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(tasks, "contracting", make)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: module.register_forward_pre_hook(fail))
    reference = [p.detach() for p in bench.parameters(make())]
    out = bench.Bench(None, "cpu")
    out.contracting, out.reference = make, lambda name, batch: reference
    return out


def test_options_go_on_without_a_compiler(small):
    rows = options.options(small, "mri")
    assert [row["option"] for row in rows if "failed" in row] == [options.COMPILED]
    assert len(rows) == 6 and [row["ratio"] for row in rows if row["option"] == OURS] == [1.0]


def test_options_fail_with_the_reference_of_another_model(small):
    small.reference = lambda name, batch: [torch.zeros(3)]
    with pytest.raises(RuntimeError, match="size of tensor"):
        options.options(small, "mri")


def test_all_methods_are_compared_at_equal_error(small, monkeypatch):
    task = small.contracting().to(torch.float64)
    exact = bench.gradient(task, peers.ours(task, peers.Settings(1e-9, 1e-9, 300, 300)))
    small.reference, small.rounds = lambda name: exact, 2
    monkeypatch.setattr(error, "FORWARD", (1e-1, 1e-2, 1e-3, 3e-4, 1e-4))
    rows = error.equal_error(small, "mri")
    assert [row["method"] for row in rows] == list(peers.METHODS)
    for row in rows:
        assert row["exact enough"] == (row["gradient error"] <= error.EXACT_ENOUGH["mri"])
        assert not (row["stopped"] and row["exact enough"]) and row["timings"] in (1, 2)
    assert rows[0]["exact enough"] and rows[0]["timings"] == 2 and rows[0]["ratio"] == 1.0


def test_tolerances_of_peers_may_come_from_another_record(small, monkeypatch):
    task = small.contracting().to(torch.float64)
    exact = bench.gradient(task, peers.ours(task, peers.Settings(1e-9, 1e-9, 300, 300)))
    small.reference, small.rounds = lambda name: exact, 1
    rows = [{"method": name, "tolerances": [3e-3, 1e-1]} for name in peers.METHODS]
    small._known = {"equal error, mri": {"rows": rows}}
    monkeypatch.setattr(error, "cheapest", lambda *args: ((0, 0), error.Trial(0.0, 1e3, False, 1.0, {})))
    found = error.equal_error(small, "mri")
    assert found[0]["tolerances"] == [error.FORWARD[0], error.BACKWARD[0]]  # ours has its own search
    assert all(row["tolerances"] == [3e-3, 1e-1] and row["gradient error"] > 0 for row in found[1:])


def test_torchdeq_has_the_criterion_of_the_other_benchmarks(monkeypatch):
    made = []
    original = torchdeq.get_deq
    monkeypatch.setattr(torchdeq, "get_deq", lambda *args, **kwargs: made.append(original(*args, **kwargs)) or made[-1])
    exactness.torchdeq_scaled(1.0)
    assert [(deq.f_stop_mode, deq.b_stop_mode) for deq in made] == [("rel", "rel")]
