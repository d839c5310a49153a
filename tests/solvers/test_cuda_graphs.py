r"""CUDA graphs: on a GPU where one is at hand, and else with a stand-in that replays by calling the map again."""

from __future__ import annotations

from dataclasses import replace

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.maps import as_map
from deepinv_deq.solvers import cuda_graphs
from tests.problems import relative_error

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


class Replayed:
    r"""Writes to the same tensors in every replay, as a graph does."""

    def __init__(self, work):
        self.work, self.out, self.replays = work, tuple(t.clone() for t in work()), 0

    def replay(self):
        self.replays += 1
        for to, t in zip(self.out, self.work(), strict=True):
            to.copy_(t)


@pytest.fixture
def made(monkeypatch):
    r"""The graphs made in a test, with a stand-in on the CPU."""
    found = []

    def captured(work):
        found.append(Replayed(work))
        return found[-1], found[-1].out

    monkeypatch.setattr(cuda_graphs, "_has_graphs", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "captured", captured)
    return found


def problem(kind, device="cpu", batch=3):
    r"""An iteration, measurements and physics; the samples need different numbers of evaluations."""
    torch.manual_seed(0)
    channels = 1 if kind is DEGrad else 2
    mask = (torch.arange(16) % 3 > 0).float().expand(1, channels, 16, 16)
    if channels == 1:
        physics = dinv.physics.Inpainting((1, 16, 16), mask=mask)
    else:
        physics = dinv.physics.MRI(mask=mask, img_size=(2, 16, 16))
    physics = physics.to(device)
    iteration = kind(EquilibriumUNet(channels, channels=(4, 8)), stepsize=0.5).to(device).eval()
    x = (
        torch.rand(batch, channels, 16, 16, device=device)
        * torch.logspace(-3, 0, batch, device=device)[:, None, None, None]
    )
    return iteration, physics.A(x), physics


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter"])
@pytest.mark.parametrize("kind", [DEGrad, DEProx, DEHQS, DEADMM])
def test_a_solve_with_a_graph_is_the_same_solve(made, kind, method):
    iteration, y, physics = problem(kind)
    solver = Solver(method, tol=1e-5, max_iter=30, on_failure="ignore")
    with torch.no_grad():
        f = iteration.bind(y, physics)
        start = iteration.init(y, physics)
        plain, stat = solver(f, start)
        assert not made
        x, with_graph = replace(solver, cuda_graphs=True, chunk_size=3)(f, start)
    assert len(made) == 1 and made[0].replays == with_graph.evaluations
    assert with_graph.evaluations == stat.evaluations and torch.equal(with_graph.residual, stat.residual)
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (x, plain)), strict=True):
        assert torch.equal(a, b)


def test_training_and_tests_of_a_model_give_the_same_with_graphs(made):
    iteration, y, physics = problem(DEProx)
    solver = Solver("anderson", tol=1e-5, max_iter=100)
    results = []
    for graph in (False, True):
        model = DEQReconstructor(iteration, solver=replace(solver, cuda_graphs=graph))
        loss = model(y, physics).square().sum()
        results.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    assert len(made) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_results_of_a_replay_are_not_overwritten_by_the_next(made):
    f = cuda_graphs.graphed(as_map(lambda x: 0.5 * x + 1), torch.zeros(1, 3))
    first = f(torch.zeros(1, 3))
    f(torch.ones(1, 3))
    assert torch.equal(first, torch.ones(1, 3))


def test_maps_that_a_graph_would_change_stay_as_they_are(made):
    iteration, y, physics = problem(DEProx)
    solver = Solver("anderson", tol=1e-2, cuda_graphs=True, on_failure="ignore")
    model = DEQReconstructor(iteration, solver=solver).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(y, physics)
    assert not made
    with torch.no_grad():
        model(y, physics, x_gt=torch.zeros(3, 2, 16, 16), compute_metrics=True)
    assert not made


def test_without_a_gpu_the_setting_does_nothing(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "captured", lambda work: pytest.fail("captured without a GPU"))
    x, stat = Solver("anderson", tol=1e-6, cuda_graphs=True)(lambda x: 0.5 * x + 1, torch.zeros(1, 3))
    assert stat.converged.all() and torch.allclose(x, torch.full((1, 3), 2.0))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.max().item(),
        lambda x: float(x.sum() > 0),
        lambda x: x[x > 2].sum(),
        lambda x: x.nonzero().sum(),
        lambda x: x.to("meta").shape[0],
        lambda x: bool((x > 0).all()),
    ],
)
def test_a_map_that_synchronises_host_and_gpu_is_refused_before_a_capture_fails(made, read):
    with pytest.raises(RuntimeError, match=r"its operation \w+ synchronises host and GPU\. .*cuda_graphs=False"):
        Solver("anderson", cuda_graphs=True)(lambda x: 0.5 * x / (1 + read(x)), torch.ones(1, 3))
    assert not made


def test_a_map_that_cannot_be_captured_is_named_with_the_remedy(monkeypatch):
    def captured(work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graphs, "_has_graphs", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "captured", captured)
    with pytest.raises(RuntimeError, match=r"cannot be captured .*is capturing\)\. .*cuda_graphs=False"):
        Solver("anderson", cuda_graphs=True)(lambda x: 0.5 * x, torch.ones(1, 3))


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("kind", [DEGrad, DEProx])
def test_on_a_gpu(device, kind):
    iteration, y, physics = problem(kind, device)
    solver = Solver("anderson", tol=1e-5, max_iter=100)
    with torch.no_grad():
        plain, x = (
            DEQReconstructor(iteration, solver=replace(solver, cuda_graphs=graph))(y, physics)
            for graph in (False, True)
        )
    assert relative_error(x, plain) < 1e-5
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be captured"):
        replace(solver, cuda_graphs=True)(lambda x: 0.5 * x / (1 + x.max().item()), torch.ones(1, 3, device=device))
    torch.rand(1, device=device)  # a failed capture would spoil the generator
