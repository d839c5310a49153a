r"""The search for settings and the study of the bound, on images small enough for a test."""

from __future__ import annotations

import json
import sys

import bound
import data
import pytest
import run
import search
import settings

from tests.paper.common import cell


def test_settings_come_from_validation_images_only(lab, monkeypatch):
    task, held = (data.make_task("ct", "small", lab, validate=v) for v in (False, True))
    assert held.test.stop == task.test.start and held.train.stop == held.test.start
    monkeypatch.setattr(search, "grid", lambda *_: [("lr", [1e-3, 3e-4])])
    search.search("ct", "unet", "sup", "small", lab, 1.0)
    trials = json.loads((lab / "search" / "small" / "ct_unet_sup.json").read_text())
    assert len(trials) == 2
    best = max(trials, key=lambda t: t["psnr"])["trial"]
    assert settings.found_settings()["small"]["ct"]["unet"]["sup"] == best
    found = settings.settings_of("ct", "unet", "sup", "small", settings.found_settings())
    assert found["lr"] == best.get("lr", 3e-4) and found["settings_from"] == "small/ct/unet/sup"


def test_several_seeds_decide_by_their_mean_and_a_known_trial_is_not_run_again(lab, monkeypatch):
    psnr = {(1e-3, 0): 31.0, (1e-3, 1): 27.0, (3e-4, 0): 30.0, (3e-4, 1): 29.0}
    ran = []

    def train(task, method, loss, scale, seed, *, override, **_):
        ran.append((override["lr"], seed))
        return {"psnr": {"mean": psnr[ran[-1]]}, "seconds": 0.0}, None

    monkeypatch.setattr(search, "run_cell", train)
    monkeypatch.setattr(search, "grid", lambda *_: [("lr", [1e-3, 3e-4])])
    arguments = ("ct", "unet", "sup", "small", lab)
    search.search(*arguments, share=0.5)
    assert settings.found_settings()["small"]["ct"]["unet"]["sup"] == {"lr": 1e-3} and len(ran) == 2
    for _ in range(2):
        search.search(*arguments, share=0.5, seeds=2)
        assert settings.found_settings()["small"]["ct"]["unet"]["sup"] == {} and len(ran) == 4
    search.search(*arguments, share=1.0)
    assert len(ran) == 6
    monkeypatch.setitem(settings.DEFAULTS["ct"], "n_trans", 2)  # trials of other defaults do not count
    search.search(*arguments, share=1.0)
    assert len(ran) == 8


def test_every_learned_method_gets_the_same_questions():
    for method, own in (
        ("deq-id", "data_weight"),
        ("modl", "data_weight"),
        ("lpd", "data_weight"),
        ("unrolled-3", "stepsize"),
    ):
        s = settings.default_settings("ct", method, "ei", "paper")
        steps = dict(search.grid("ct", method, "ei", s))
        assert list(steps) == ["lr", own, "alpha", "grad_clip"] and [len(v) for v in steps.values()] == [3, 3, 3, 2]
    assert search.complete("ct", "deq-id", {"data_weight": 99.0}) == {"data_weight": 99.0, "stepsize": 0.01}
    assert search.complete("ct", "modl", {"data_weight": 99.0}) == {"data_weight": 99.0}


def test_a_search_nearby_begins_at_the_settings_of_another_scale(lab, monkeypatch):
    there = {"lr": 3e-3, "data_weight": 100.0, "grad_clip": 1e-6}
    settings.SETTINGS.write_text(json.dumps({"small": {"ct": {"modl": {"sup": there}}}}))
    ran = []

    def train(task, method, loss, scale, seed, *, override, **_):
        ran.append(tuple(override[name] for name in there))
        return {"psnr": {"mean": 30.0 + (ran[-1][1] == 200.0)}, "seconds": 0.0}, None

    monkeypatch.setattr(search, "run_cell", train)
    search.search("ct", "modl", "sup", "paper", lab, 0.25, nearby=True)
    assert [lr for lr, *_ in ran[:3]] == pytest.approx([1e-3, 3e-3, 9e-3])
    assert [weight for _, weight, _ in ran[3:]] == [50.0, 200.0] and {clip for *_, clip in ran} == {1e-6}
    assert settings.found_settings()["paper"]["ct"]["modl"]["sup"] == pytest.approx(
        there | {"lr": 1e-3, "data_weight": 200.0}
    )
    assert settings.found_settings()["small"]["ct"]["modl"]["sup"] == there
    settings.SETTINGS.unlink()
    with pytest.raises(settings.NotSearched, match="No hyperparameters were searched"):
        search.search("ct", "modl", "sup", "paper", lab, 0.25, nearby=True)


def test_settings_whose_solves_fail_lose():
    trials = [{"psnr": 30.0, "missed": 1}, {"psnr": 29.0, "missed": 0}, {"psnr": 28.0}]
    trials += [{"psnr": 29.5, "missed": 0, "spread_db": 0.06}]
    trials += [{"psnr": None}]  # diverged
    assert sorted(trials, key=search.worth, reverse=True) == [trials[i] for i in (1, 2, 4, 0, 3)]


def test_cells_without_searched_settings_are_not_trained_in_silence(lab, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", str(lab), "--device", "cpu", "--no-progress", *cell()])
    with pytest.raises(SystemExit, match="No hyperparameters were searched for ct unet sup: run search.py"):
        run.main()
    assert not (lab / "results").exists()


def test_the_bound_is_varied_on_validation_images(lab, monkeypatch):
    args = ["--task", "ct", "--bounds", "0.5", "0.9", "--data", str(lab)]
    settings.SETTINGS.write_text(json.dumps({"small": {"ct": {"deq-id": {"sup": {}}}}}))
    monkeypatch.setattr(sys, "argv", ["bound.py", *args])
    bound.main()
    written = [json.loads(path.read_text()) for path in sorted((lab / "bound").glob("*.json"))]
    assert [w["bound"] for w in written] == [0.5, 0.9]
    assert {"steps", "psnr", "evaluations", "spectral_radius", "spread_db"} <= written[0].keys()
    assert set(written[0]["psnr"]) == {"start", "tenth", "zeros", "noise", "truth"}
    monkeypatch.setattr(sys, "argv", ["bound.py", "--task", "ct", "--bounds", "1.5"])
    with pytest.raises(SystemExit, match="must be in"):
        bound.main()
