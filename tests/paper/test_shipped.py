r"""Certificates of the models that ship, under other conditions than those of their training."""

from __future__ import annotations

import json

import data
import pytest
import shipped


def test_a_condition_is_measured_and_rendered(tmp_path, monkeypatch, lab):
    monkeypatch.setattr(shipped, "RECORD", tmp_path / "shipped.json")
    monkeypatch.setitem(
        shipped.CONDITIONS, "mri-ei/own", ({"size": 16, "file": data.FILES["ct"]}, 1, "16×16, CT slices")
    )
    measured = shipped.measure("mri-ei/own", lab)
    assert measured["images"] == 1 and len(measured["spread_db"]["all"]) == 1
    assert set(measured["psnr"]) == {"start", "tenth", "zeros", "noise", "truth"}
    for i, spread in enumerate(measured["spread_db"]["all"]):
        values = [v["all"][i] for v in measured["psnr"].values()]
        assert spread == pytest.approx(max(values) - min(values), abs=2e-3)
    shipped.RECORD.write_text(json.dumps({"mri-ei/own": measured}))
    row = next(line for line in shipped.render().splitlines() if "16×16, CT slices" in line)
    assert "`mri-ei`" in row and f"| {measured['converged']} of 1 | {measured['certified']} of 1 |" in row
