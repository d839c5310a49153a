r"""DEQReconstructor as a deepinv model: interface, Trainer, bad input."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch
from deepinv.datasets import TensorDataset
from torch import nn
from torch.utils.data import DataLoader

from deepinv_deq import (
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    IterationEquivariance,
    ModularIDHook,
    PipelineEquivariance,
    Solver,
)
from tests.problems import imaging, mri, small_deq


def test_it_is_a_deepinv_reconstructor():
    model, physics, _, y = imaging()
    assert isinstance(model, dinv.models.Reconstructor)
    x_hat = model(y, physics, some_unknown_argument=3, update_parameters=True)
    assert x_hat.shape == (2, 1, 4, 4) and model.forward_stat.converged.all()
    f = model.iteration.bind(y, physics)
    torch.testing.assert_close(f(x_hat), x_hat)


def test_a_warm_start_saves_evaluations():
    model, physics, _, y = imaging()
    x_hat = model(y, physics)
    cold = model.forward_stat.evaluations
    again = model(y, physics, init=x_hat.detach())
    assert model.forward_stat.evaluations < cold / 3
    torch.testing.assert_close(again, x_hat)


def test_metrics_of_the_solve_are_what_deepinv_plots(tmp_path):
    model, physics, x, y = imaging()
    x_hat, metrics = model(y, physics, x_gt=x, compute_metrics=True)
    assert set(metrics) == {"residual", "psnr"} and torch.is_tensor(x_hat)
    for course in metrics.values():
        assert len(course) == 2 and all(len(c) == model.forward_stat.evaluations for c in course)
    assert metrics["psnr"][0][-1] == pytest.approx(dinv.metric.PSNR()(x_hat, x)[0].item(), abs=1e-3)
    dinv.utils.plot_curves(metrics, save_dir=tmp_path, show=False)
    assert set(model(y, physics, compute_metrics=True)[1]) == {"residual"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_measurements_must_be_finite(value):
    model, physics, _, y = imaging()
    y[0, 3] = value
    with pytest.raises(ValueError, match="1 NaN or Inf values of 16. Repair or mask"):
        model(y, physics)


def test_parts_of_the_wrong_kind():
    good = DEProx(nn.Identity())
    for bad in ({"iteration": nn.Identity()}, {"solver": "anderson"}, {"hook": Solver("gmres")}):
        with pytest.raises(TypeError, match=next(iter(bad))):
            DEQReconstructor(**({"iteration": good} | bad))


@pytest.mark.parametrize("template", [DEProx, DEGrad])
@pytest.mark.parametrize("mode", ["implicit", "jfb"])
def test_training_without_ground_truth_with_deepinvs_trainer(template, mode, tmp_path):
    torch.manual_seed(0)
    physics = mri()
    x = torch.rand(6, 2, 16, 16)
    train = DataLoader(TensorDataset(y=physics.A(x[:4]), use_dict_output=True), batch_size=2)
    test = DataLoader(TensorDataset(x=x[4:], y=physics.A(x[4:]), use_dict_output=True), batch_size=2)
    model = DEQReconstructor(
        template(EquilibriumUNet(2, channels=(4, 8)), stepsize=0.5),
        solver=Solver("anderson", max_iter=20, tol=1e-2, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=20, tol=1e-2, on_failure="ignore"), mode=mode),
    )
    rotate = dinv.transform.Rotate(interpolation_mode="bilinear")
    trainer = dinv.Trainer(
        model,
        physics,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        train,
        epochs=2,
        losses=[dinv.loss.MCLoss(), dinv.loss.EILoss(rotate)],
        metrics=[dinv.metric.PSNR(), PipelineEquivariance(), IterationEquivariance()],
        compute_train_metrics=False,
        plot_convergence_metrics=False,
        eval_dataloader=test,
        device="cpu",
        save_path=tmp_path,
        verbose=False,
    )
    before = [p.clone() for p in model.parameters()]
    trainer.train()
    assert all((p.grad is not None) and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    result = trainer.test(test, compare_no_learning=True)
    assert {"PSNR", "PipelineEquivariance", "IterationEquivariance"} <= set(result)
    assert result["IterationEquivariance no learning"] != result["IterationEquivariance no learning"]  # NaN


def test_mixed_precision_trains(tmp_path):
    torch.manual_seed(0)
    physics, x = mri(), torch.rand(4, 2, 16, 16)
    loader = DataLoader(TensorDataset(x=x, y=physics.A(x), use_dict_output=True), batch_size=2)
    model = DEQReconstructor(
        DEProx(EquilibriumUNet(2, channels=(4, 8)), stepsize=0.5),
        solver=Solver("anderson", max_iter=20, tol=2e-2, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=20, tol=2e-2, on_failure="ignore")),
    )
    y = physics.A(x)
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(y, physics).square().sum()
    half = torch.autograd.grad(loss, list(model.parameters()))  # backward outside of autocast, as the Trainer runs it
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in half)
    flat = [torch.cat([g.flatten() for g in gs]) for gs in (exact, half)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.9
    dinv.Trainer(
        model, physics, torch.optim.Adam(model.parameters()), loader, epochs=1, mixed_precision="bf16", device="cpu",
        save_path=tmp_path, verbose=False,
    ).train()  # fmt: skip


def test_stacked_measurements_and_coils():
    stacked = dinv.physics.stack(mri(), mri())
    model = DEQReconstructor(DEProx(nn.Hardtanh(), stepsize=0.4), solver=Solver("anderson", tol=1e-3))
    y = stacked.A(torch.rand(2, 2, 16, 16))
    assert model(y, stacked).shape == (2, 2, 16, 16)
    y[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="in part 1"):
        model(y, stacked)


def test_inference_mode_and_no_grad():
    model, physics, _, y = imaging()
    with torch.inference_mode():
        inferred = model(y, physics)
    with torch.no_grad():
        plain = model(y, physics)
    torch.testing.assert_close(inferred, plain)
    assert not plain.requires_grad and model(y, physics).requires_grad


# Faster evaluations ------------------------------------------------------------------------------------------------


def step(model, physics, y):
    x_hat = model(y, physics)
    return torch.autograd.grad(x_hat.float().square().sum(), list(model.parameters()))


def test_channels_are_innermost_inside_the_denoiser_and_outermost_outside():
    net, seen = EquilibriumUNet(2, channels=(4, 8)), []
    net.Conv_1x1.register_forward_hook(lambda m, i, out: seen.append(i[0].stride(1)))
    assert net(torch.rand(2, 2, 16, 16)).is_contiguous() and seen == [1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim == 4)


def test_copies_train_as_the_original_does():
    # PyTorch's cache of normalised weights takes a copy of a layer for the layer itself
    model, physics, y = small_deq()
    twin = copy.deepcopy(model)
    for ours, theirs in zip(step(model, physics, y), step(twin, physics, y), strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_and_its_copy_in_one_iteration():
    class Both(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.one, self.other = net, copy.deepcopy(net)
            nn.init.constant_(self.other.Conv_1x1.bias, 0.1)
            for p in self.other.parameters():
                p.data.add_(0.1 * torch.randn_like(p))

        def forward(self, x):
            return 0.4 * self.one(x) + 0.4 * self.other(x)

    model, physics, y = small_deq()
    model.iteration.denoiser = Both(model.iteration.denoiser)
    x = physics.A_adjoint(y)
    with torch.no_grad():
        alone = model.iteration(x, physics, x)
        with torch.nn.utils.parametrize.cached():  # whose keys the two share
            assert torch.allclose(model.iteration.bind(y, physics)(x), alone, atol=1e-6)
    assert all(torch.isfinite(g).all() for g in step(model, physics, y))
