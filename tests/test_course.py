r"""The course of a solve: recorded without changing the solve."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, Solver
from deepinv_deq.maps import Delegate, Map
from tests.problems import SmallDenoiser, imaging


def deblurring(batch=3, side=32):
    kernel = torch.tensor([[0.0, 1, 0], [1, 2, 1], [0, 1, 0]])[None, None] / 6
    physics = dinv.physics.BlurFFT((1, side, side), filter=kernel)
    x = torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 1e-3, 10.0])[:batch, None, None, None]
    model = DEQReconstructor(DEGrad(SmallDenoiser(), stepsize=1 / 201, data_weight=200.0))
    return model, physics, x, physics.A(x)


@pytest.mark.parametrize("method", ["anderson", "broyden", "fixed_point_iter"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_solve_is_the_one_without_a_record(method, chunk_size):
    model, physics, x, y = deblurring()
    model.solver = Solver(method, tol=1e-5, max_iter=60, chunk_size=chunk_size, on_failure="ignore")
    plain = model(y, physics)
    stat = model.forward_stat
    recorded, metrics = model(y, physics, compute_metrics=True, x_gt=x)
    assert torch.equal(recorded, plain)
    assert (model.forward_stat.evaluations, model.forward_stat.work) == (stat.evaluations, stat.work)
    assert torch.equal(model.forward_stat["nstep"], stat["nstep"])
    assert {len(course) for key in metrics for course in metrics[key]} == {stat["rel_trace"].shape[1]}
    gradients = [torch.autograd.grad(t.square().sum(), list(model.parameters()))[0] for t in (plain, recorded)]
    assert torch.equal(*gradients)


def test_record_is_that_of_each_sample():
    model, physics, x, y = imaging(batch=3)
    model.solver = Solver("fixed_point_iter", max_iter=300, tol=1e-6, chunk_size=1)
    _, apart = model(y, physics, compute_metrics=True, x_gt=x)
    model.solver = Solver("fixed_point_iter", max_iter=300, tol=1e-6, chunk_size=3)
    _, together = model(y, physics, compute_metrics=True, x_gt=x)
    for key in ("residual", "psnr"):
        for one, other in zip(apart[key], together[key], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    points, f = model.iteration.init(y, physics), model.iteration.bind(y, physics)
    for k in range(5):
        assert [c[k] for c in together["psnr"]] == pytest.approx(dinv.metric.PSNR()(points, x).tolist(), rel=1e-4)
        with torch.no_grad():
            points = f(points)


def test_every_method_of_a_map_that_a_solver_uses_is_handed_on():
    offered = {name for name in vars(Map) if not name.startswith("_") and callable(getattr(Map, name))}
    assert (offered | {"has_own_step"}) - {"rebind", "step"} <= set(vars(Delegate))


@pytest.mark.parametrize("hooked", [False, True])
def test_record_leaves_the_choice_between_step_and_difference(hooked):
    model, physics, x, y = imaging(DEGrad)
    if hooked:
        model.iteration.register_forward_hook(lambda *_: None)
    model.solver = Solver(tol=1e-4, max_iter=60)
    plain, stat = model(y, physics), model.forward_stat
    recorded, _ = model(y, physics, compute_metrics=True, x_gt=x)
    assert torch.equal(recorded, plain) and torch.equal(model.forward_stat["rel_trace"], stat["rel_trace"])


def test_metrics_come_with_a_gradient():
    model, physics, x, y = imaging(DEProx)
    x_hat, metrics = model(y.requires_grad_(), physics, compute_metrics=True, x_gt=x)
    (found,) = torch.autograd.grad(x_hat.sin().sum(), y)
    (exact,) = torch.autograd.grad(model(y, physics).sin().sum(), y)
    assert torch.equal(found, exact) and metrics["psnr"]


def test_what_cannot_be_recorded_is_refused():
    model, physics, x, y = imaging(DEProx, batch=3)
    for other in (x[:1], x[:, :, 1:], x.expand(3, 2, 4, 4)):
        for chunk_size in (None, 1):
            model.solver = Solver(chunk_size=chunk_size)
            with pytest.raises(
                ValueError, match=r"x_gt must have the shape of the reconstruction, \([13], 1, 4, 4\), got"
            ):
                model(y, physics, compute_metrics=True, x_gt=other)
    model.solver = Solver("simple_fixed_point_iter", on_failure="ignore")
    with pytest.raises(ValueError, match="which reports no residual for each evaluation: use another method"):
        model(y, physics, compute_metrics=True, x_gt=x)
    model.solver = Solver("gmres", on_failure="ignore")
    with pytest.raises(ValueError, match="'gmres', which evaluates the map at directions: use another method"):
        model(y, physics, compute_metrics=True, x_gt=x)
    x_hat, metrics = model(y, physics, compute_metrics=True)
    assert torch.equal(x_hat, model(y, physics)) and set(metrics) == {"residual"}


@pytest.mark.parametrize("with_truth", [True, False])
def test_the_joint_solve_of_a_batch_is_that_of_each_sample(with_truth):
    model, physics, x, y = imaging(batch=3)
    model.solver = Solver("anderson", tol=1e-10, max_iter=200, batched=False)
    recorded, metrics = model(y, physics, compute_metrics=True, x_gt=x if with_truth else None)
    assert torch.equal(recorded, model(y, physics))
    assert metrics["residual"] == 3 * [model.forward_stat["rel_trace"][0].tolist()]
    if with_truth:
        assert [len(values) for values in metrics["psnr"]] == [len(metrics["residual"][0])] * 3
        assert len({values[-1] for values in metrics["psnr"]}) == 3
