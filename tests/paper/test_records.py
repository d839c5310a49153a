r"""Records, tables, claims and figures."""

from __future__ import annotations

import json
import math
import statistics

import claims
import data
import figure_1
import figures
import models
import paired
import pytest
import records
import settings
import tables


def record(task, method, loss, seed=0, psnr=(30.0,) * 10, scale="small", fixed_point=None, **more):
    r"""Write a record by hand."""
    entry = {"mean": statistics.mean(psnr), "std": 0.0, "all": list(psnr)}
    config = {"task": task, "method": method, "loss": loss, "scale": scale, "seed": seed}
    config["stepsize"] = settings.default_settings(task, method, loss, scale)["stepsize"]  # as today
    content = {
        "config": config,
        "psnr": entry,
        "ssim": entry,
        "psnr_start": entry,
        "ssim_start": entry,
        "images": len(psnr),
    }
    content |= {
        "pipeline_equivariance": entry,
        "seconds": 60.0,
        "steps": 3,
        "device": "x",
        "versions": {},
        "date": "2026-11-25",
    }
    content |= {"curve": {"psnr": {"PSNR": [20.0, 30.0]}}, "ei_loss": 1e-4}
    if method.startswith("deq"):
        content |= {"iteration_equivariance": entry, "iteration_fidelity": entry, "untrained": {}}
    if fixed_point is not None:
        per_image = {"mean": fixed_point, "std": 0.0, "all": [0.0] * (len(psnr) - 1) + [fixed_point]}
        content["fixed_point"] = {
            "psnr": {"start": entry, "tenth": entry, "zeros": entry},
            "spread_db": per_image,
            "converged": 10,
            "certified": 9,
        }
        content["fixed_point"] |= {"spectral_radius": per_image, "evaluations": [20] * len(psnr), "tol": 1e-4}
    path = records.path_of(scale, task, method, loss, seed)
    records.write(path, json.dumps(content | more))
    return path


def test_differences_are_paired_and_a_doubled_image_counts_once(lab):
    shared = [30.0, 35.0, 40.0, 28.0, 33.0, 31.0, 29.0, 36.0, 32.0, 32.0]
    gain = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.3, 0.7, 5.0, 5.0]
    record("ct", "deq-id", "sup", psnr=[a + b for a, b in zip(shared, gain, strict=True)], fixed_point=0.0)
    record("ct", "unet", "sup", psnr=shared)
    found = paired.difference(records.Records("small"), ("ct", "deq-id", "sup"), ("ct", "unet", "sup"))
    assert found.images == 9 and found.seeds == (1, 1)
    assert found.mean == pytest.approx(statistics.mean(gain[:9]))
    assert found.error == pytest.approx(statistics.stdev(gain[:9]) / 3)


def test_the_error_has_that_of_the_seeds(lab):
    for seed, level in enumerate((30.0, 31.0, 32.0)):
        record("mri", "unet", "sup", seed, psnr=(level,) * 10)
    record("mri", "modl", "sup", psnr=(29.0,) * 10)
    found = paired.difference(records.Records("small"), ("mri", "unet", "sup"), ("mri", "modl", "sup"))
    assert found.images == 10 and found.mean == pytest.approx(2.0) and found.error == pytest.approx(1 / math.sqrt(3))
    assert paired.difference(records.Records("small"), ("mri", "unet", "sup"), ("mri", "lpd", "sup")) is None


def test_verdicts_are_by_two_standard_errors():
    def verdict(mean, error, threshold=0.0):
        return paired.Difference(mean, error, 10, (1, 1)).verdict(threshold)

    assert [verdict(1.0, 0.4), verdict(-1.0, 0.4), verdict(1.0, 0.6), verdict(0.0, 0.0)] == [
        "holds",
        "fails",
        "undecided",
        "undecided",
    ]
    assert verdict(-0.2, 0.05, -0.5) == "holds" and verdict(-0.7, 0.05, -0.5) == "fails"


def test_old_records_of_deqs_are_left_out_and_marked(lab):
    record("ct", "deq-id", "sup")
    record("ct", "unet", "sup", psnr=(33.33,) * 10)
    known = records.Records("small")
    assert len(known.all) == 1 and len(known.outdated) == 1 and known.state("ct", "deq-id", "sup") == "outdated"
    first = next(line for line in tables.table_1(known, "ct").splitlines() if line.startswith("| supervised"))
    assert first.startswith("| supervised | *old* | *missing* | 33.33 |") and "30.00" not in first
    assert "1 more are *old*" in tables.provenance(known)


def test_a_claim_says_what_it_rests_on(lab):
    for seed in (0, 1):
        record("ct", "deq-id", "sup", seed, psnr=[30.0 + seed, 31.0 + seed] * 5, fixed_point=0.0)
    path = record("ct", "deq-jfb", "sup", psnr=[25.0, 26.5] * 5, fixed_point=0.0)
    borrowed = records.read_record(path)
    borrowed["config"] |= {"settings_from": "small/ct/deq-id/sup", "lr": 0.5}
    records.write(path, json.dumps(borrowed))
    known = records.Records("small")
    row = next(row for row in claims.rows(known)[0] if row[0] == "ID > JFB")
    assert row[-2:] == ["second", "holds, on one seed, with *older settings*"] and "2 and 1 seeds" in row[2]
    said = tables.provenance(known)
    assert "CT DEQ, JFB (supervised), seed 0, was made with other settings than today's: lr 0.5 instead of" in said
    assert "small/ct/deq-id/sup" in said
    header, body = tables.training_times(known)
    assert body == [["CT", "supervised", "x", "60", *("1.00" if title == "DEQ, JFB" else "" for title in header[4:])]]
    assert "In 3 of 3" in claims.findings(known) and "in 0 of 3 it holds for every image" in claims.findings(known)


def test_cells_that_are_no_fixed_points_are_flagged(lab):
    record("ct", "deq-id", "sup", fixed_point=0.06)
    record("ct", "deq-id", "ei", fixed_point=0.04)
    record("ct", "deq-jfb", "sup", psnr=[29.0, 29.5] * 5, fixed_point=0.01)
    known = records.Records("small")
    assert tables.cell(known, "ct", "deq-id", "sup") == "30.00 **not a fixed point**"
    assert tables.cell(known, "ct", "deq-id", "ei") == "30.00"
    rows = {tuple(row[:2]): row for row in claims.rows(known)[0]}
    assert (
        rows["ID > JFB", "CT: DEQ, ID (supervised) − DEQ, JFB (supervised)"][-1]
        == "holds, on one seed, but **not a fixed point**"
    )
    assert "| 0.060 |" in tables.fixed_points(known) and "| 10 of 10 | 9 of 10 |" in tables.fixed_points(known)


def test_equivariance_is_read_without_deepinvs_floor(lab):
    exact = 91.5
    saturated = -10 * math.log10(10 ** (-exact / 10) + 1e-8)
    assert 79 < saturated < 80 and records.unsaturated(saturated) == pytest.approx(exact, abs=1e-6)
    entry = {"mean": 0.0, "std": 0.0, "all": [saturated] * 10}
    record("ct", "deq-id", "sup", fixed_point=0.0, iteration_equivariance=entry)
    record("ct", "deq-id", "ei", fixed_point=0.0, iteration_equivariance=entry, exact_equivariance=True)
    old, new = (records.Records("small").of("ct", "deq-id", loss)[0] for loss in ("sup", "ei"))
    size = 20 * math.log10(old["config"]["stepsize"])
    assert records.value(old, "iteration_equivariance") == pytest.approx(exact + size)  # of (F - I) / stepsize
    assert records.value(new, "iteration_equivariance") == pytest.approx(saturated + size)


def test_missing_cells_are_said_to_be_missing(lab):
    assert "Nothing was run at scale *small*" in tables.render()
    record("mri", "unet", "sup")
    text = tables.render()
    assert "1 of " in text and "*missing*" in text and "claims have no record yet." in text
    assert text.count("{dropdown}") == text.count("````") / 2


def test_tables_and_plots_of_the_committed_records(tmp_path):
    text = tables.render()
    unet = json.loads((records.RESULTS / "small" / "ct_unet_sup_0.json").read_text())["psnr"]["mean"]
    assert "## Scale small" in text and f"{unet:.2f}" in text and "*36.77*" in text
    assert "(U-Net, best of " in tables.summary()
    drawn = figures.plots(tmp_path, "small")
    assert len(drawn) == 5 and all(path.stat().st_size > 5_000 for path in drawn)


def test_plots_need_no_records(lab):
    drawn = figures.plots(lab, "paper")
    assert all(path.stat().st_size > 1_000 for path in drawn)
    with pytest.raises(SystemExit, match="no model"):
        figure_1.figure_1(lab / "figure.png", "small", lab)


def test_titles_and_labels_are_inside_the_figure(lab, monkeypatch):
    record("ct", "deq-id", "sup", fixed_point=0.0)
    record("ct", "deq-id", "selfdeq", psnr=[29.0, 28.5] * 5, fixed_point=0.0)
    outside = []

    def check(plot, path, dpi=100):
        plot.canvas.draw()
        for axis in plot.axes:
            for label in (axis.title, axis.xaxis.label, axis.yaxis.label, *axis.get_yticklabels()):
                box, named = (
                    label.get_window_extent(),
                    any(map(str.isalpha, label.get_text())),
                )  # unseen ticks have numbers
                if named and (box.x0 < 0 or box.y0 < 0 or box.x1 > plot.bbox.x1 or box.y1 > plot.bbox.y1):
                    outside.append((path.name, label.get_text()))
        return path

    monkeypatch.setattr(figures, "save", check)
    figures.plots(lab, "small")
    assert outside == []


def test_the_matrix_is_the_papers_and_begins_with_what_matters():
    for scale in data.SCALES:
        cells = records.matrix(scale)
        assert len(cells) == len(set(cells)) and cells[0] == ("ct", "deq-id", "sup", 0)
        for task in data.TASKS:
            for method in models.METHODS:
                for loss in ("sup", "ei"):
                    seeds = models.METHODS[method].seeds[scale] if loss in records.losses_of(task, method) else 0
                    assert sum(c[:3] == (task, method, loss) for c in cells) == seeds
            assert (task, "denoiser", "none", 0) in cells
        assert sum(c[:3] == ("ct", "deq-id", "ei") for c in cells) == 3
