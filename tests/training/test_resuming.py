r"""Runs that are killed and resumed equal uninterrupted ones; checkpoints are never lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.datasets import TensorDataset
from torch.utils.data import DataLoader

from deepinv_deq.training import ResumableTrainer, latest_checkpoint
from tests.problems import imaging, weights


class Jitter(dinv.transform.Transform):
    r"""Draws from every generator there is, so that a forgotten one shows."""

    def _get_params(self, x):
        return {"shift": torch.randn(1, generator=self.rng) + torch.randn(1) + np.random.randn() + random.random()}

    def _transform(self, x, shift, **_):
        return x.roll(1, -1) + 0.01 * shift.to(x.dtype)


def trainer(folder, epochs, **kwargs):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    model, physics, x, _ = imaging(batch=6, tol=1e-6)
    loader = DataLoader(
        TensorDataset(y=physics.A(x), use_dict_output=True), 2, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return ResumableTrainer(
        model,
        physics,
        optimizer,
        loader,
        epochs=epochs,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        losses=[dinv.loss.MCLoss(), dinv.loss.EILoss(Jitter(rng=torch.Generator().manual_seed(2)))],
        metrics=None,
        device="cpu",
        save_path=folder,
        verbose=False,
        **kwargs,
    )


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "a", 5)
    whole.train()
    trainer(tmp_path / "b", 3).train()
    time.sleep(1.1)  # deepinv names the folder of a run by the second
    resumed = trainer(tmp_path / "b", 5, resume=True)
    resumed.train()
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert resumed.loss_history == whole.loss_history
    fresh = trainer(tmp_path / "c", 5, resume=True)  # nothing to resume: starts anew
    fresh.train()
    assert torch.equal(weights(whole.model), weights(fresh.model))


def test_only_a_resumed_run_takes_over_the_generators(tmp_path):
    trainer(tmp_path / "a", 3).train()
    tuned = trainer(tmp_path / "b", 4, ckpt_pretrained=latest_checkpoint(tmp_path / "a"))
    tuned.losses = [dinv.loss.MCLoss()]  # fewer generators than the checkpoint has
    tuned.train()
    assert len(tuned.loss_history["MCLoss"]) == 1


def test_the_best_model_is_not_what_a_run_resumes_from(tmp_path):
    run = trainer(tmp_path, 2)
    run.train()
    newest = Path(latest_checkpoint(tmp_path))
    newest.rename(newest.with_name("ckp_best.pth.tar"))
    assert latest_checkpoint(tmp_path) != str(newest.with_name("ckp_best.pth.tar"))


def test_checkpoints_are_plain_and_atomic(tmp_path, monkeypatch):
    run = trainer(tmp_path, 2)
    run.train()
    path = latest_checkpoint(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    torch.load(path, weights_only=True)
    good = Path(path).read_bytes()

    def torn(state, file, **_):
        Path(file).write_bytes(good[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        run.save_model(Path(path).name, 1)
    assert Path(path).read_bytes() == good


def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path):
    run = trainer(tmp_path, 3)
    run.train()
    newest = Path(latest_checkpoint(tmp_path))
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=f"broken checkpoint .*{newest.name}"):
        older = latest_checkpoint(tmp_path)
    assert older != str(newest) and latest_checkpoint(tmp_path / "nowhere") is None


def test_another_runs_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, 2, config={"alpha": 1.0}).train()
    time.sleep(1.1)  # deepinv names the folder of a run by the second
    other = trainer(tmp_path, 2, resume=True, config={"alpha": 2.0})
    before = weights(other.model)
    with pytest.raises(ValueError, match="alpha was 1.0, is 2.0"):
        other.train()
    assert torch.equal(before, weights(other.model))


# The demo, as a user runs it -----------------------------------------------------------------------------------------

DEMO = Path(__file__).parents[2] / "examples" / "ct" / "demo_sparse_view_ct.py"
TINY = ["--size", "16", "--views", "8", "--epochs", "4", "--batch-size", "8", "--device", "cpu"]


def demo(*arguments, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, str(DEMO), *map(str, arguments)], capture_output=True, text=True, env=environment, **kwargs
    )


def final_weights(folder):
    return torch.load(latest_checkpoint(folder), weights_only=True)["state_dict"]


def test_the_demo_killed_and_resumed_equals_the_uninterrupted_one(tmp_path):
    whole = demo(*TINY, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    last = whole.stdout.strip().splitlines()[-1]
    assert last.startswith("PSNR on unseen images: FBP ") and last.endswith(" dB") and ", DEQ " in last
    for name in ("reconstructions.png", "residuals.png", "record.json"):
        assert (tmp_path / "whole" / name).stat().st_size > 0

    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    killed = subprocess.Popen(
        [sys.executable, str(DEMO), *TINY, "--out", str(tmp_path / "cut")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    while killed.poll() is None and latest_checkpoint(tmp_path / "cut") is None:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resumed = demo(*TINY, "--out", tmp_path / "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip().splitlines()[-1] == last
    expected = final_weights(tmp_path / "whole")
    assert all(torch.equal(expected[k], v) for k, v in final_weights(tmp_path / "cut").items())

    other = demo(*TINY, "--alpha", "3", "--out", tmp_path / "cut", "--resume")
    assert other.returncode != 0 and "alpha was 100.0, is 3.0" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize("loss,backward", [("sup", "implicit"), ("ei", "jfb")])
def test_the_demos_other_modes_on_a_users_images(tmp_path, loss, backward):
    np.savez(tmp_path / "a.npz", images=(255 * np.random.default_rng(0).random((12, 20, 20))).astype(np.uint8))
    run = demo(
        "--data", tmp_path / "a.npz", "--out", tmp_path / "out", "--loss", loss, "--backward", backward,
        *TINY[:4], "--epochs", 1, "--device", "cpu",
    )  # fmt: skip
    assert run.returncode == 0 and "PSNR on unseen images" in run.stdout, run.stderr


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--data", "nowhere.npz"], "error: No data at nowhere.npz"),
        (["--loss", "gan"], "invalid choice: 'gan'"),
        (["--epochs", "0"], "must be at least 1"),
    ],
)
def test_the_demos_errors_are_one_line(tmp_path, arguments, message):
    run = demo(*arguments, "--out", tmp_path)
    assert run.returncode != 0 and message in run.stderr and "Traceback" not in run.stderr
