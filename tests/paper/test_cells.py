r"""Every method with every loss, the blocks that are ours, and the settings of a cell."""

from __future__ import annotations

import copy
import itertools
import math

import data
import deepinv as dinv
import losses
import models
import numpy as np
import pytest
import settings
import torch
import training

from deepinv_deq.datasets import phantoms
from deepinv_deq.losses import BicubicRotate, RampFilteredError, TurnedOperatorLoss

CELLS = [
    cell
    for cell in itertools.product(data.TASKS, models.METHODS, losses.LOSSES)
    if settings.refusal(*cell) is None and losses.LOSSES[cell[2]].build is not None
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    r"""Two images to train and one to test of each task."""
    folder = tmp_path_factory.mktemp("images")
    for name in data.FILES.values():
        np.savez(folder / name, images=phantoms(3, 16)[:, 0].numpy())
    sizes = {"size": 16, "views": 60, "acceleration": 4, "channels": (4, 8), "batch": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SCALES, "small", dict.fromkeys(data.TASKS, sizes))
        made = {name: data.make_task(name, "small", folder) for name in data.TASKS}
    for task in made.values():
        task.train, task.test = slice(0, 2), slice(2, 3)
    return made


@pytest.mark.parametrize("task, method, loss", CELLS)
def test_every_method_takes_a_step_with_every_loss(tasks, monkeypatch, task, method, loss):
    average = dinv.physics.generator.PhysicsGenerator.average  # 2000 masks take seconds
    monkeypatch.setattr(dinv.physics.generator.PhysicsGenerator, "average", lambda self, **k: average(self, 20, **k))
    training.set_up()
    torch.manual_seed(0)
    s = settings.default_settings(task, method, loss, "small")
    s |= tasks[task].settings | {"epochs": 1, "max_iter": 8, "batch": 2}
    model = models.make_model(tasks[task], method, s, None).train()
    before = [p.detach().clone() for p in model.parameters()]
    curve, steps = training.train(tasks[task], model, method, loss, s, 0, {}, None, False)
    assert steps == 1 and all(np.isfinite(v).all() for v in curve["loss"].values())
    assert ("ContractionLoss" in curve["loss"]) == method.startswith("deq")
    after = list(model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert all(bool(torch.isfinite(p).all()) for p in after)


@pytest.mark.parametrize("task", data.TASKS)
def test_pnp_and_red_compute_where_the_images_are(tasks, tmp_path, task):
    # deepinv does not move the network of a prior with the model; a type stands for a device here
    channels = tasks[task].channels
    config = {"in_channels": channels, "out_channels": channels, "depth": 3, "nf": 4}
    weights = dinv.models.DnCNN(**config, pretrained=None).state_dict()
    torch.save({"settings": config, "state_dict": weights}, tmp_path / "dncnn.pt")
    there = copy.deepcopy(tasks[task])
    there.x, there.y, there.physics = there.x.double(), there.y.double(), there.physics.to(torch.float64)
    s = settings.default_settings(task, "denoiser", "none", "small") | {"iterations": 2}
    with torch.no_grad():
        x = models.make_model(there, "denoiser", s, str(tmp_path / "dncnn.pt"))(there.y, there.physics)
    assert x.dtype == torch.float64 and bool(torch.isfinite(x).all())


def test_combinations_that_make_no_sense_are_refused_with_a_reason():
    assert "not for mri" in settings.refusal("mri", "deq-id", "moi") and "not for mri" in settings.refusal(
        "mri", "lpd", "sup"
    )
    assert "not for ct" in settings.refusal("ct", "varnet", "sup") and "mask" in settings.refusal("mri", "varnet", "es")
    assert "goes with --loss none" in settings.refusal("ct", "unet", "none")
    assert len(CELLS) == len(set(CELLS)) > 100


def test_the_few_cg_steps_solve_the_data_term():
    a = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    physics = dinv.physics.LinearPhysics(A=lambda x: x @ a.T, A_adjoint=lambda y: y @ a)
    x, y = torch.randn(2, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 8, dtype=torch.float64)
    out = models.FewCGSteps(sigma=0.5).prox(x, y, physics, gamma=torch.tensor(0.7, dtype=torch.float64))
    normal = 0.7 / 0.25 * a.T @ a + torch.eye(6, dtype=torch.float64)
    exact = torch.linalg.solve(normal, (x + 0.7 / 0.25 * y @ a).T).T
    assert torch.allclose(out, exact, atol=1e-9)
    ours, theirs = (torch.autograd.grad(z.square().sum(), x, retain_graph=True)[0] for z in (out, exact))
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_own_settings_come_first_then_those_of_the_nearest_search():
    found = {
        "small": {
            "ct": {
                "deq-id": {"ei-turned": {"lr": 0.5, "alpha": 7.0}},
                "unrolled": {"sup": {"lr": 0.25, "stepsize": 0.3}},
            }
        }
    }
    own = settings.settings_of("ct", "deq-id", "ei-turned", "small", found)
    assert (own["lr"], own["alpha"], own["settings_from"]) == (0.5, 7.0, "small/ct/deq-id/ei-turned")
    inherited = settings.settings_of("ct", "deq-id", "ei-turned", "paper", found)
    assert (inherited["lr"], inherited["alpha"], inherited["size"]) == (0.5, 7.0, 128)
    assert inherited["settings_from"] == "small/ct/deq-id/ei-turned"
    found["paper"] = {"ct": {"deq-id": {"ei-turned": {}}}}
    assert (
        settings.settings_of("ct", "deq-id", "ei-turned", "paper", found)["settings_from"]
        == "paper/ct/deq-id/ei-turned"
    )
    related = settings.settings_of("ct", "modl", "sup", "small", found)  # of another method, only what they share
    assert (related["lr"], related["stepsize"], related["settings_from"]) == (0.25, 1.0, "small/ct/unrolled/sup")
    found["small"]["ct"]["deq-id"]["split"] = {"lr": 0.125, "contraction_weight": 3.0, "alpha": 9.0}
    related = settings.settings_of("ct", "deq-id", "selfdeq", "small", found)  # of the same method, the penalty too
    assert (related["lr"], related["contraction_weight"]) == (0.125, 3.0) and related["alpha"] != 9.0
    found["small"]["ct"]["modl"] = {"sup": {"lr": 0.0625, "data_weight": 100.0, "alpha": 9.0}}
    found["small"]["ct"]["unrolled"]["ei"] = {"lr": 0.25}
    related = settings.settings_of("ct", "modl", "ei-turned", "small", found)  # supervised, but of the same method
    assert (related["lr"], related["data_weight"], related["settings_from"]) == (0.0625, 100.0, "small/ct/modl/sup")
    assert related["alpha"] != 9.0
    with pytest.raises(settings.NotSearched, match="search.py --task mri --method unet --loss sup"):
        settings.settings_of("mri", "unet", "sup", "small", found)
    assert settings.settings_of("mri", "unet", "sup", "small", found, defaults=True)["settings_from"] == "defaults"


def test_committed_settings_cover_every_cell_of_the_matrix():
    import records

    found = settings.found_settings()
    for scale in data.SCALES:
        for task, method, loss, _ in records.matrix(scale):
            s = settings.settings_of(task, method, loss, scale, found)
            assert s["epochs"] > 0 or loss == "none"


@pytest.mark.parametrize("count", [1, 3])
def test_views_of_each_sample_are_hidden_at_random(count):
    rng = torch.Generator().manual_seed(0)
    mask = losses.HiddenViews((1, 6, 5), count, rng).step(64)["mask"]
    assert mask.shape == (64, 1, 6, 5)
    hidden = (mask == 0).all(dim=2).squeeze(1)
    assert bool((hidden.sum(dim=1) == count).all()) and bool(hidden.any(dim=0).all())
    assert bool(((mask == 0).sum(dim=(1, 2, 3)) == 6 * count).all())
    again = losses.HiddenViews((1, 6, 5), count, torch.Generator().manual_seed(0)).step(64)["mask"]
    assert torch.equal(mask, again)


@pytest.mark.parametrize("task, loss, alpha", [("ct", "ei", 30.0), ("ct", "ei-fixed", 10.0), ("mri", "ei-fixed", 10.0)])
def test_the_penalty_weighs_what_an_error_of_images_does(tasks, task, loss, alpha):
    s = settings.default_settings(task, "deq-id", loss, "small") | tasks[task].settings | {"alpha": alpha}
    *_, of_images, penalty = losses.make_losses(tasks[task], "deq-id", loss, s, 0)
    assert math.isclose(penalty.weight, s["contraction_weight"] * of_images.weight)
    *_, penalty = losses.make_losses(tasks[task], "deq-id", "sup", s, 0)
    assert penalty.weight == s["contraction_weight"]


@pytest.mark.parametrize("task", data.TASKS)
def test_the_penalty_has_the_size_of_a_jacobian_free_gradient(tasks, task):
    s = settings.default_settings(task, "deq-jfb", "sup", "small") | tasks[task].settings
    exact, jfb = (losses.make_losses(tasks[task], method, "sup", s, 0)[-1] for method in ("deq-id", "deq-jfb"))
    assert math.isclose(jfb.weight, exact.weight * s["stepsize"])


def test_errors_of_views_are_errors_of_images():
    physics = dinv.physics.Tomography(angles=48, img_width=32, normalize=True, adjoint_via_backprop=True)
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    error = RampFilteredError(physics, (1, 32, 32))
    fine, coarse = noise, torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)
    zero = torch.zeros(())
    ratios = [(error(physics.A(e), zero) / e.square().mean(dim=(1, 2, 3))).mean().item() for e in (fine, coarse)]
    plain = [(physics.A(e).square().mean() / e.square().mean()).item() for e in (fine, coarse)]
    assert 0.9 < ratios[0] < 1.1 and 0.5 < ratios[1] < 2  # the projector blurs the finest details
    assert plain[1] / plain[0] > 5  # without the filter, coarse errors count several times as much


def test_turned_operators_measure_turned_images():
    blobs = [(0.3, 0.1, 0.05), (-0.2, -0.4, 0.02)]
    rows, columns = torch.linspace(-1, 1, 32).view(-1, 1), torch.linspace(-1, 1, 32)
    x = sum(torch.exp(-((rows - a) ** 2 + (columns - b) ** 2) / c) for a, b, c in blobs)[None, None]
    (physics, _), (other, _), (turned, _) = (data.tomography(32, 10, turn=turn) for turn in (0.0, 18.0, 7.0))
    y = physics.A(x)
    assert torch.allclose(other.A(x)[..., :-1], y[..., 1:], atol=1e-6)  # by one view: the next views
    image = BicubicRotate(n_trans=1)._rotated(x, math.radians(-7))
    assert (turned.A(x) - physics.A(image)).norm() < 0.03 * y.norm() and (turned.A(x) - y).norm() > 0.1 * y.norm()


def test_the_target_of_the_turned_operator_is_fixed_and_that_of_moi_is_not():
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    physics = dinv.physics.Physics()
    settled = {"x_net": x, "y": x, "physics": physics, "model": lambda y, operator: scale * y}
    value = TurnedOperatorLoss([physics], weight=2.0)(**settled)
    assert torch.allclose(value, 2.0 * 0.25 * x.square().mean(dim=(1, 2, 3)))
    value.sum().backward()
    assert x.grad is None and torch.allclose(scale.grad, 2.0 * x.detach().square().mean(dim=(1, 2, 3)).sum())
    dinv.loss.MOILoss([physics], weight=2.0)(**settled).sum().backward()
    assert x.grad is not None


def test_consistency_of_the_second_reconstruction_is_with_the_measurements():
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    physics, y = dinv.physics.Physics(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    model = lambda y, operator: scale * y  # noqa: E731
    error = lambda a, b: (a - b).square().flatten(1).mean(dim=1)  # noqa: E731
    loss = TurnedOperatorLoss([physics], weight=2.0, consistency=error)
    value = loss(x_net=x, y=y, physics=physics, model=model)
    assert torch.allclose(value, 2.0 * (0.25 * x.square().mean(dim=(1, 2, 3)) + error(1.5 * x, y)))
    value.sum().backward()
    assert x.grad is None and scale.grad is not None
    for missing in ({"y": None}, {"physics": None}):
        with pytest.raises(ValueError, match="consistency compares with measurements"):
            loss(**{"x_net": x, "y": y, "physics": physics, "model": model} | missing)


def test_equivariance_is_measured_beyond_80_db(tasks):
    task = tasks["ct"]
    x = task.x[task.test]
    error = torch.full_like(x, 1e-6)
    assert data.ExactPSNR()(x + error, x).item() == pytest.approx(120, abs=0.5)
    s = settings.default_settings("ct", "deq-id", "sup", "small") | task.settings | {"stepsize": 1e-6, "epochs": 1}
    model = models.make_model(task, "deq-id", s, None)
    saturated, exact = (
        m(x, x, physics=task.physics, model=model).item()
        for m in (data.IterationEquivariance(), data.metrics(task)["iteration_equivariance"])
    )
    assert saturated == pytest.approx(80, abs=0.1) and exact > 100
