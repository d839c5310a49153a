r"""The commands of the paper's experiments, on images small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from urllib.error import URLError

import commands
import data
import deepinv as dinv
import numpy as np
import pytest
import records
import run
import settings
import ship
import tables
import torch
import weights

from deepinv_deq import EquilibriumUNet
from tests.paper.common import cell, command

SCRIPTS = Path(run.__file__).parent


@pytest.mark.parametrize(
    "task, method, loss",
    [
        ("ct", "deq-id", "ei-turned"),
        ("mri", "deq-id", "ei-sure"),
        ("mri", "deq-jfb", "ei"),
        ("ct", "unet", "sup"),
        ("mri", "unrolled-3", "ei"),
        ("ct", "modl", "ei"),
        ("ct", "lpd", "sup"),
        ("mri", "varnet", "sup"),
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
    assert ("iteration_equivariance" in record) == ("fixed_point" in record) == method.startswith("deq")
    if method.startswith("deq"):
        point = record["fixed_point"]
        assert set(point["psnr"]) == {"start", "tenth", "zeros", "noise", "truth"} and point["tol"] > 0
        assert len(point["spread_db"]["all"]) == len(point["spectral_radius"]["all"]) == len(point["evaluations"]) == 1
    assert record["config"]["settings_from"] == "defaults"
    assert record["steps"] == (0 if loss == "none" else 3)
    assert not record["resumed"]


def test_a_finished_cell_is_not_run_again_unless_forced(lab, monkeypatch, capsys):
    command(monkeypatch, lab, *cell())
    path = lab / "results" / "small" / "ct_unet_sup_0.json"
    before = path.stat().st_mtime_ns
    command(monkeypatch, lab, *cell())
    said = capsys.readouterr().out
    assert path.stat().st_mtime_ns == before and "--force" in said and "other settings" not in said
    monkeypatch.setitem(settings.DEFAULTS["ct"], "lr", 0.5)
    command(monkeypatch, lab, *cell())
    assert "made with other settings: lr 0.0003 instead of 0.5); --force" in capsys.readouterr().out
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
    monkeypatch.setattr(weights.subprocess, "run", train)
    path = lab / "runs" / "paper" / "dncnn-1.pt"
    path.unlink()
    assert Path(weights.weights_of("ct", "dncnn", lab)).read_text() == "trained here"
    assert "cannot be downloaded" in capsys.readouterr().err
    path.unlink()
    online = True
    state = torch.load(weights.weights_of("ct", "dncnn", lab), weights_only=True)
    original(**state["settings"], pretrained=None).load_state_dict(state["state_dict"])


def test_another_denoiser_has_a_record_of_its_own(lab, monkeypatch):
    other = lab / "upright.pt"
    denoiser = EquilibriumUNet(1, channels=data.CHANNELS)
    torch.save({"settings": denoiser.settings, "state_dict": denoiser.state_dict()}, other)
    command(monkeypatch, lab, *cell("ct", "deq-id", "sup"), "--denoiser", other)
    path = records.path_of("small", "ct", "deq-id", "sup", 0, "upright")
    assert path.parent.name == "upright" and records.read_record(path)["config"]["denoiser"] == "upright.pt"
    assert not records.path_of("small", "ct", "deq-id", "sup", 0).exists()
    for args in ([*cell(), "--denoiser", lab / "nowhere.pt"], ["--all", "--denoiser", other]):
        with pytest.raises(SystemExit, match="--denoiser is for one cell and takes a file"):
            command(monkeypatch, lab, *args)


def test_an_interrupted_cell_ends_as_if_nothing_had_happened(lab, tiny, monkeypatch):
    tiny["ct"]["epochs"]["deq"] = 3
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
    assert records.read_record(path) is not None and other.read_text() == "{}"


@pytest.mark.parametrize(
    "args, message",
    [
        (cell(task="mr"), "unknown task 'mr': must be one of ct, mri"),
        (cell(method="vit"), "unknown method 'vit': must be one of deq-id"),
        (cell(loss="l1"), "unknown loss 'l1': must be one of sup, ei"),
        (cell() + ["--scale", "huge"], "unknown scale 'huge': must be one of small, paper"),
        (cell(loss="none"), "goes with --loss none"),
        (cell(loss="ei-sure"), "is for mri, not for ct"),
    ],
)
def test_unknown_names_list_the_valid_ones(lab, monkeypatch, args, message):
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, lab, *args)


def test_missing_images_say_where_to_get_them(lab, monkeypatch):
    (lab / "cardiac_mr_256.npz").unlink()
    with pytest.raises(SystemExit, match=r"cardiac_mr_256.npz.*fastMRI"):
        command(monkeypatch, lab, *cell("mri"))


def test_tables_are_made_of_records(lab, monkeypatch):
    for args in (cell("ct", "deq-id", "sup"), cell("ct", "unet", "sup")):
        command(monkeypatch, lab, *args)
    text = tables.render()
    record = records.read_record(records.path_of("small", "ct", "unet", "sup", 0))
    assert f"{record['psnr']['mean']:.2f}" in text and "36.77" in text


def test_other_feature_maps_and_epochs_have_records_of_their_own(lab, monkeypatch):
    command(monkeypatch, lab, *cell("ct", "lpd"), "--channels", 4, 8, "--epochs", 2)
    path = records.path_of("small", "ct", "lpd", "sup", 0, "4-8_epochs-2")
    record = records.read_record(path)
    assert record["config"]["channels"] == [4, 8] and record["config"]["epochs"] == 2
    assert len(record["curve"]["psnr"]["PSNR"]) == 2
    assert not records.path_of("small", "ct", "lpd", "sup", 0).exists()
    with pytest.raises(SystemExit, match="--epochs must be at least 1, got 0"):
        command(monkeypatch, lab, *cell("ct", "lpd"), "--epochs", 0)


def test_an_old_record_of_a_deq_is_run_again(lab, monkeypatch):
    path = records.path_of("small", "ct", "deq-jfb", "sup", 0)
    old = {"config": {"task": "ct", "method": "deq-jfb", "loss": "sup"}, "psnr": {"mean": 30.0}}
    records.write(path, json.dumps(old))
    command(monkeypatch, lab, *cell("ct", "deq-jfb"))
    assert "fixed_point" in records.read_record(path)


def test_a_model_is_shipped_with_what_it_was_trained_on(lab, monkeypatch):
    with pytest.raises(SystemExit, match="run that cell first"):
        ship.ship("ct", "small", 0, lab, lab)
    command(monkeypatch, lab, *cell("ct", "deq-id", "ei-turned"))
    path = ship.ship("ct", "small", 0, lab, lab, tol=1e-6)
    saved = torch.load(path, weights_only=True)
    assert path.name == "ct-ei-small.pt" and saved["about"]["loss"] == "ei-turned"
    assert saved["solver"]["tol"] == 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_denoisers_say_how_good_they_are(lab, channels):
    out = lab / "denoiser.pt"
    np.savez(lab / "grey.npz", images=np.random.default_rng(0).random((10, 16, 16), dtype=np.float32))
    command = [sys.executable, str(SCRIPTS / "pretrain_denoiser.py"), "--in-channels", str(channels), "--steps", "2"]
    command += ["--batch-size", "2", "--patch", "16", "--channels", "4", "8", "--contraction", "0.9", "--out", str(out)]
    ran = subprocess.run([*command, "--data", str(lab / "grey.npz")], capture_output=True, text=True, check=True)
    about = torch.load(out, weights_only=True)["about"]
    assert all(type(value) in (int, float) for value in about.values())
    last = ran.stdout.splitlines()[-1]
    assert f"{about['denoised_psnr_0.05']:.2f} dB at 0.05" in last and f"{about['jacobian_norm_0']:.3f}" in last
    assert EquilibriumUNet(pretrained=out).settings["in_channels"] == channels


def test_one_failing_cell_does_not_stop_the_others(lab, capfd):
    script = lab / "cell.py"
    script.write_text("import sys; open(sys.argv[1], 'w').close(); sys.exit(sys.argv[1] == 'b')")
    args = Namespace(scale="small", data=lab, jobs=2)
    with pytest.raises(SystemExit, match="1 of 3 failed"):
        commands.run_each(str(script), args, [["a"], ["b"], ["c"]], [])
    assert all((lab / name).exists() for name in "abc") and "b: failed" in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        commands.run_each(str(script), args, [["a"]], [])
    assert ended.value.code == 0


@pytest.mark.parametrize("loss", ["split", "ei-turned"])
def test_views_are_of_ct(lab, monkeypatch, loss):
    with pytest.raises(SystemExit, match="is for ct, not for mri"):
        command(monkeypatch, lab, *cell("mri", "deq-id", loss))


def test_a_trained_model_is_measured_again(lab, monkeypatch):
    with pytest.raises(SystemExit, match="--again needs the record"):
        command(monkeypatch, lab, *cell("ct", "lpd"), "--again")
    command(monkeypatch, lab, *cell("ct", "lpd"))
    path = records.path_of("small", "ct", "lpd", "sup", 0)
    whole = records.read_record(path)
    broken = {key: whole["ssim"] for key in ("psnr", "pipeline_equivariance")}
    records.write(path, json.dumps(whole | broken | {"exact_equivariance": False}))
    command(monkeypatch, lab, *cell("ct", "lpd"), "--again")
    again = records.read_record(path)
    assert again.pop("measured_again")["date"] and again.keys() == whole.keys()
    for name in ("psnr", "ssim", "pipeline_equivariance"):
        assert again[name]["mean"] == pytest.approx(whole[name]["mean"], rel=1e-5)
    with pytest.raises(SystemExit, match="--again is for one cell"):
        command(monkeypatch, lab, "--all", "--again")
