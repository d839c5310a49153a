r"""deepinv's own tests, with a deep equilibrium model in the place of their models (:mod:`tests.deepinv_plugin`).

By default one of each kind; ``DEEPINV_DEQ_SUITE=full`` runs all of them (some minutes). ``-rP`` shows what passed and what was skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import deepinv
import pytest

ROOT = Path(__file__).parents[1]
THEIRS = Path(deepinv.__file__).parent / "tests"
FULL = os.environ.get("DEEPINV_DEQ_SUITE") == "full"
pytestmark = pytest.mark.skipif(not THEIRS.exists(), reason="deepinv was installed without its tests")

# file, what of it is about models, and the part of that which runs by default
PARTS = {
    "losses": (
        "test_loss.py",
        "test_losses or test_measplit or test_sure or test_r2r or test_reducedresolution_shapes",
        "test_reducedresolution_shapes or (test_measplit and Inpainting and imsize0)",
    ),
    "trainer": (
        "test_trainer.py",
        "test_dataloader_formats or test_early_stop or test_model_forward_passes or test_gradient_norm or test_out_dir"
        " or test_trained_model",
        "(test_model_forward_passes and 4-True-True) or test_trained_model or test_out_dir",
    ),
    "unfolded": ("test_unfolded.py", "test_DEQ", "True-True-True and PGD"),
    "models": (
        "test_models.py",
        "(test_denoiser_color or test_denoiser_gray or test_denoiser_1_channel or test_restoration_models) and not True",
        "(test_denoiser and unet) or (test_restoration_models and whsize0 and 1-)",
    ),
}
# what deepinv asks of one model and not of models
PECULIAR = {
    "test_reducedresolution_shapes[device0-blurfft]": "asks for at most 50 dB, and a DEQ around the identity deblurs",
    "test_losses[device0-vortex]": "asks that a PSNR rises by a loss that any map has least which takes shifted images alike, a constant"
    " one too; an untrained autoencoder can only gain by it, 30 unrolled layers of our U-Net lose as much as the DEQ does",
    "pansharpen_circular-ram": "RAM takes images of any number of channels",
    "-None-ram": "RAM reconstructs without a physics",
}
# reasons that are not ours: what a machine lacks, and what deepinv skips for every model
SKIPS = ("could not import", "requires", "Skipping", "only available", "Skipped due to network error", "not supported")


@pytest.mark.parametrize("part", PARTS)
def test_deepinvs_own_tests_pass(part, tmp_path):
    name, whole, some = PARTS[part]
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.deepinv_plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "-W",
        "ignore",
    ]
    command += ["--rootdir", str(tmp_path), f"--junitxml={report}", "-o", "junit_family=xunit1", str(THEIRS / name)]
    command += ["-k", whole if FULL else f"({whole}) and ({some})"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DEEPINV_TEST_DEVICE": "cpu"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert report.exists(), run.stdout + run.stderr
    passed, skipped, failed, peculiar = [], {}, {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
        why = next((PECULIAR[part] for part in PECULIAR if part in case.get("name")), None)
        if outcome is None:
            passed.append(case.get("name"))
        elif why is not None and outcome.tag != "skipped":
            peculiar[case.get("name")] = why
        else:
            (skipped if outcome.tag == "skipped" else failed)[case.get("name")] = outcome.get("message") or ""
    print(f"{name}: {len(passed)} passed, {len(skipped)} skipped, {len(peculiar)} for another model only")
    print(*(f"  passed {case}" for case in passed), sep="\n")
    print(*(f"  not passed {case}: {reason}" for case, reason in (skipped | peculiar).items()), sep="\n")
    assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items()) + run.stdout[-6000:]
    assert passed
    strange = {k: v for k, v in skipped.items() if not any(reason in v for reason in SKIPS)}
    assert not strange
