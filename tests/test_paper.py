r"""The runner of the paper's experiments, on images small enough for a test."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from urllib.error import URLError

import deepinv as dinv
import numpy as np
import pytest
import torch

from deepinv_deq import EquilibriumUNet
from deepinv_deq.datasets import phantoms

FOLDER = Path(__file__).parents[1] / "examples" / "paper"
sys.path.insert(0, str(FOLDER))
import experiments as ex  # noqa: E402
import run  # noqa: E402
import search  # noqa: E402
import tables  # noqa: E402

EPOCHS = dict.fromkeys(("deq", "unet", "unrolled"), 1)
TINY = {
    "ct": {"size": 16, "views": 8, "channels": (16, 32, 64), "batch": 4, "epochs": EPOCHS},
    "mri": {"size": 16, "acceleration": 4, "channels": (16, 32, 64), "batch": 4, "epochs": EPOCHS},
}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    r"""A folder with images, a scale that takes a second, and places for records of its own."""
    for name in ("ct100_128.npz", "cardiac_mr_256.npz"):
        np.savez(tmp_path / name, images=phantoms(10, 16)[:, 0].numpy())
    monkeypatch.setitem(ex.SCALES, "small", TINY)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "SETTINGS", tmp_path / "settings.json")
    monkeypatch.setattr(search, "TRIALS", tmp_path / "search")
    monkeypatch.chdir(tmp_path)
    torch.save(
        {
            "settings": {"in_channels": 1, "out_channels": 1, "depth": 3, "nf": 4},
            "state_dict": dinv.models.DnCNN(1, 1, depth=3, nf=4, pretrained=None).state_dict(),
        },
        tmp_path / "dncnn.pt",
    )
    (tmp_path / "runs" / "paper").mkdir(parents=True)
    (tmp_path / "dncnn.pt").rename(tmp_path / "runs" / "paper" / "dncnn-1.pt")
    return tmp_path


def command(monkeypatch, lab, *args):
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--data", str(lab), "--device", "cpu", "--no-progress", *map(str, args)]
    )
    run.main()


def cell(task="ct", method="unet", loss="sup", *more):
    return ["--task", task, "--method", method, "--loss", loss, *more]


@pytest.mark.parametrize(
    "task, method, loss",
    [(t, m, "ei") for t in ("ct", "mri") for m in ("deq-id", "deq-jfb", "unet", "unrolled-3")]
    + [
        ("ct", "deq-id", "sup"),
        ("mri", "deq-id", "ei-sure"),
        ("ct", "deq-id", "ei-fixed"),
        ("ct", "deq-id", "ei-turned"),
        ("ct", "deq-id", "split"),
        ("mri", "deq-id", "ei-fixed"),
        ("ct", "denoiser", "none"),
    ],
)
def test_every_kind_of_cell_leaves_a_whole_record(lab, monkeypatch, task, method, loss):
    command(monkeypatch, lab, *cell(task, method, loss))
    record = json.loads((lab / "results" / "small" / f"{task}_{method}_{loss}_0.json").read_text())
    for key in ("psnr", "ssim", "psnr_start", "pipeline_equivariance"):
        assert np.isfinite(record[key]["mean"]) and len(record[key]["all"]) == record["images"] == 1
    assert np.isfinite(record["ei_loss"]) and record["ei_loss"] > 0
    assert {"config", "steps", "seconds", "peak_memory_mb", "device", "versions", "commit"} <= record.keys()
    assert ("iteration_equivariance" in record) == method.startswith("deq")
    assert record["steps"] == (0 if loss == "none" else 3)
    assert not record["resumed"]


def test_a_finished_cell_is_not_run_again_unless_forced(lab, monkeypatch, capsys):
    command(monkeypatch, lab, *cell())
    path = lab / "results" / "small" / "ct_unet_sup_0.json"
    before = path.stat().st_mtime_ns
    command(monkeypatch, lab, *cell())
    assert path.stat().st_mtime_ns == before and "--force" in capsys.readouterr().out
    command(monkeypatch, lab, *cell(), "--force")
    assert path.stat().st_mtime_ns > before


def test_the_dncnn_is_deepinvs_where_it_can_be_downloaded(lab, monkeypatch, capsys):
    def dncnn(*args, pretrained, **kwargs):
        if pretrained == "download" and not online:
            raise URLError("no network")
        return original(*args, pretrained=None, **kwargs)

    def train(command, check):
        Path(command[command.index("--out") + 1]).write_text("trained here")

    original, online = dinv.models.DnCNN, False
    monkeypatch.setattr(dinv.models, "DnCNN", dncnn)
    monkeypatch.setattr(run.subprocess, "run", train)
    path = lab / "runs" / "paper" / "dncnn-1.pt"
    path.unlink()
    assert Path(run.weights_of("small", "ct", "dncnn", lab)).read_text() == "trained here"
    assert "cannot be downloaded" in capsys.readouterr().err
    path.unlink()
    online = True
    state = torch.load(run.weights_of("small", "ct", "dncnn", lab), weights_only=True)
    original(**state["settings"], pretrained=None).load_state_dict(state["state_dict"])


def test_another_denoiser_has_a_record_of_its_own(lab, monkeypatch):
    other = lab / "upright.pt"
    denoiser = EquilibriumUNet(1)
    torch.save({"settings": denoiser.settings, "state_dict": denoiser.state_dict()}, other)
    command(monkeypatch, lab, *cell("ct", "deq-id", "sup"), "--denoiser", other)
    path = run.path_of("small", "ct", "deq-id", "sup", 0, other)
    assert path.parent.name == "upright" and run.read_record(path)["config"]["denoiser"] == "upright.pt"
    assert not run.path_of("small", "ct", "deq-id", "sup", 0).exists() and "upright" in tables.operators("small")
    for args in ([*cell(), "--denoiser", lab / "nowhere.pt"], ["--all", "--denoiser", other]):
        with pytest.raises(SystemExit, match="--denoiser is for one cell and takes a file"):
            command(monkeypatch, lab, *args)


def test_an_interrupted_cell_ends_as_if_nothing_had_happened(lab, monkeypatch):
    monkeypatch.setitem(TINY["ct"], "epochs", {"deq": 3})
    command(monkeypatch, lab, *cell("ct", "deq-id", "ei"))
    path = lab / "results" / "small" / "ct_deq-id_ei_0.json"
    whole = json.loads(path.read_text())
    path.unlink()
    checkpoints = sorted((lab / "runs" / "paper" / "small" / "ct_deq-id_ei_0").rglob("ckp_[0-9].pth.tar"))
    assert [c.name for c in checkpoints] == ["ckp_1.pth.tar", "ckp_2.pth.tar"]
    checkpoints[1].write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="Passing over the broken checkpoint"):
        command(monkeypatch, lab, *cell("ct", "deq-id", "ei"))
    again = json.loads(path.read_text())
    assert again["psnr"] == whole["psnr"] and again["curve"] == whole["curve"]
    assert len(again["curve"]["loss"]["MCLoss"]) == 3


def test_a_broken_record_is_named_and_its_cell_run_afresh(lab, monkeypatch, capsys):
    path = lab / "results" / "small" / "ct_unet_sup_0.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"psnr": ')
    other = path.with_name("ct_unet_ei_0.json")
    other.write_text("{}")
    command(monkeypatch, lab, *cell())
    assert f"record {path} is broken" in capsys.readouterr().err
    assert run.read_record(path) is not None and other.read_text() == "{}"


@pytest.mark.parametrize(
    "args, message",
    [
        (cell(task="mr"), "unknown task 'mr': must be one of ct, mri"),
        (cell(method="vit"), "unknown method 'vit': must be one of deq-id"),
        (cell(loss="l1"), "unknown loss 'l1': must be one of sup, ei"),
        (cell() + ["--scale", "huge"], "unknown scale 'huge': must be one of full, small"),
        (cell(loss="none"), "goes with --loss none"),
        (cell(loss="ei-sure"), "those of ct have none"),
    ],
)
def test_unknown_names_list_the_valid_ones(lab, monkeypatch, args, message):
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, lab, *args)


def test_missing_images_say_where_to_get_them(lab, monkeypatch):
    (lab / "cardiac_mr_256.npz").unlink()
    with pytest.raises(SystemExit, match=r"cardiac_mr_256.npz.*fastMRI"):
        command(monkeypatch, lab, *cell("mri"))


def test_settings_come_from_validation_images_only(lab, monkeypatch):
    task, held = (ex.make_task("ct", "small", lab, validate=v) for v in (False, True))
    assert held.test.stop == task.test.start and held.train.stop == held.test.start
    monkeypatch.setattr(search, "grid", lambda *_: [("lr", [1e-3, 3e-4])])
    search.search("ct", "unet", "sup", "small", lab, 1.0)
    trials = json.loads((lab / "search" / "small" / "ct_unet_sup.json").read_text())
    assert len(trials) == 2
    best = max(trials, key=lambda t: t["psnr"])["trial"]
    assert run.found_settings()["small"]["ct"]["unet"]["sup"] == best
    assert ex.settings_of("ct", "unet", "sup", "small", run.found_settings())["lr"] == best.get("lr", 3e-4)


def test_several_seeds_decide_by_their_mean_and_a_known_trial_is_not_run_again(lab, monkeypatch):
    psnr = {(1e-3, 0): 31.0, (1e-3, 1): 27.0, (3e-4, 0): 30.0, (3e-4, 1): 29.0}
    ran = []

    def train(task, method, loss, scale, seed, *, override, **_):
        ran.append((override["lr"], seed))
        return {"psnr": {"mean": psnr[ran[-1]]}, "seconds": 0.0}, None

    monkeypatch.setattr(run, "run_cell", train)
    monkeypatch.setattr(search, "grid", lambda *_: [("lr", [1e-3, 3e-4])])
    arguments = ("ct", "unet", "sup", "small", lab)
    search.search(*arguments, share=0.5)
    assert run.found_settings()["small"]["ct"]["unet"]["sup"] == {"lr": 1e-3} and len(ran) == 2
    for _ in range(2):
        search.search(*arguments, share=0.5, seeds=2)
        assert run.found_settings()["small"]["ct"]["unet"]["sup"] == {} and len(ran) == 4
    search.search(*arguments, share=1.0)
    assert len(ran) == 6


def test_settings_whose_solves_fail_lose():
    trials = [{"psnr": 30.0, "missed": 1}, {"psnr": 29.0, "missed": 0}, {"psnr": 28.0}]
    assert sorted(trials, key=search.worth, reverse=True) == [trials[1], trials[2], trials[0]]


def test_tables_are_made_of_records(lab, monkeypatch):
    assert "Nothing was run" in tables.render()
    for args in (cell("ct", "deq-id", "sup"), cell("ct", "deq-id", "ei"), cell("ct", "deq-jfb", "ei")):
        command(monkeypatch, lab, *args)
    text = tables.render()
    record = run.read_record(run.path_of("small", "ct", "deq-id", "ei", 0))
    assert f"{record['psnr']['mean']:.2f}" in text and "36.77" in text and "(incomplete)" in text
    tables.curves(lab / "curves.png", "small")
    assert (lab / "curves.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no model"):
        tables.figure(lab / "figure.png", "small", lab)


def test_the_matrix_is_the_papers():
    cells = run.matrix("small")
    assert len(cells) == len(set(cells))
    for task in ex.TASKS:
        for method in tables.COLUMNS[:-1]:
            for loss in ("sup", "ei"):
                assert sum(c[:3] == (task, method, loss) for c in cells) == (3 if "deq" in method else 1)
        assert (task, "denoiser", "none", 0) in cells


def test_one_failing_cell_does_not_stop_the_others(lab, capfd):
    script = lab / "cell.py"
    script.write_text("import sys; open(sys.argv[1], 'w').close(); sys.exit(sys.argv[1] == 'b')")
    args = Namespace(scale="small", data=lab, jobs=2)
    with pytest.raises(SystemExit, match="1 of 3 failed"):
        run.run_each(str(script), args, [["a"], ["b"], ["c"]], [])
    assert all((lab / name).exists() for name in "abc") and "b: failed" in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run.run_each(str(script), args, [["a"]], [])
    assert ended.value.code == 0


def test_one_view_of_each_sample_is_hidden():
    rng = torch.Generator().manual_seed(0)
    mask = ex.LeaveOneViewOut((1, 6, 5), rng).step(64)["mask"]
    assert mask.shape == (64, 1, 6, 5) and bool(((mask == 0).sum(dim=(1, 2, 3)) == 6).all())
    hidden = (mask == 0).all(dim=2).squeeze(1)
    assert bool((hidden.sum(dim=1) == 1).all()) and bool(hidden.any(dim=0).all())
    again = ex.LeaveOneViewOut((1, 6, 5), torch.Generator().manual_seed(0)).step(64)["mask"]
    assert torch.equal(mask, again)


def test_errors_of_views_are_errors_of_images():
    physics = dinv.physics.Tomography(angles=48, img_width=32, normalize=True, adjoint_via_backprop=True)
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    error = ex.ImageError(physics, noise[:1])
    fine, coarse = noise, torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)
    ratios = [(error(physics.A(e), 0.0) / e.square().mean(dim=(1, 2, 3))).mean().item() for e in (fine, coarse)]
    plain = [(physics.A(e).square().mean() / e.square().mean()).item() for e in (fine, coarse)]
    assert 0.9 < ratios[0] < 1.1 and 0.5 < ratios[1] < 2  # the projector blurs the finest details
    assert plain[1] / plain[0] > 5  # without the filter, coarse errors count several times as much


def test_turned_operators_measure_turned_images():
    blobs = [(0.3, 0.1, 0.05), (-0.2, -0.4, 0.02)]
    rows, columns = torch.linspace(-1, 1, 32).view(-1, 1), torch.linspace(-1, 1, 32)
    x = sum(torch.exp(-((rows - a) ** 2 + (columns - b) ** 2) / c) for a, b, c in blobs)[None, None]
    (physics, _), (other, _), (turned, _) = (ex.tomography(32, 10, turn=turn) for turn in (0.0, 18.0, 7.0))
    y = physics.A(x)
    assert torch.allclose(other.A(x)[..., :-1], y[..., 1:], atol=1e-6)  # by one view: the next views
    image = ex.CubicRotation(n_trans=1)._rotated(x, math.radians(-7))
    assert (turned.A(x) - physics.A(image)).norm() < 0.03 * y.norm() and (turned.A(x) - y).norm() > 0.1 * y.norm()


def test_the_target_of_the_turned_operator_is_fixed():
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    physics = dinv.physics.Physics()
    loss = ex.TurnedOperatorLoss([physics], 2.0, torch.Generator().manual_seed(0))
    value = loss(x_net=x, y=x, physics=physics, model=lambda y, operator: scale * y)
    assert torch.allclose(value, 2.0 * 0.25 * x.square().mean(dim=(1, 2, 3)))
    value.sum().backward()
    assert x.grad is None and torch.allclose(scale.grad, 2.0 * x.detach().square().mean(dim=(1, 2, 3)).sum())


@pytest.mark.parametrize("loss", ["split", "ei-turned"])
def test_views_are_of_ct(lab, monkeypatch, loss):
    with pytest.raises(SystemExit, match="it is for ct"):
        command(monkeypatch, lab, *cell("mri", "deq-id", loss))
