r"""Which checkpoint a run resumes from, and that a full disk or a read-only folder loses nothing."""

from __future__ import annotations

import errno
import importlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from deepinv_deq.training import latest_checkpoint
from deepinv_deq.training.checkpoints import read_checkpoint
from tests.problems import weights
from tests.training.checkpoints import finished, run, whole  # noqa: F401
from tests.training.test_resuming import trainer

pytestmark = pytest.mark.usefixtures("run_folders")
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


# Which checkpoint -------------------------------------------------------------------------------------------------------


def test_foreign_names_are_no_checkpoints(tmp_path):
    path = Path(whole(tmp_path))
    for name in "ckp_3_old.pth.tar ckp_9.pth.tar.part ckp_9.pth.tar.1.part ckp_best.pth.tar xckp_9.pth.tar ckp_x.pth.tar".split():
        shutil.copy(path, path.with_name(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) == latest_checkpoint(path.parent) == str(path)
        assert latest_checkpoint(tmp_path / "nowhere") is None is latest_checkpoint(path)


def test_the_largest_epoch_is_a_number(tmp_path):
    whole(tmp_path, 9)
    tenth = whole(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == tenth


def test_the_run_that_was_started_last(tmp_path):
    old, new = whole(tmp_path, 9, "24-01-31-23:59:59"), whole(tmp_path, 2, "24-02-01-00:00:00")
    for path in (new, os.path.dirname(new)):
        os.utime(path, (0, 0))  # copied, for example
    assert latest_checkpoint(tmp_path) == new
    whole(tmp_path, 3, "23-12-31-00_00_00")  # as on Windows
    assert latest_checkpoint(tmp_path) == new
    Path(new).write_bytes(b"broken")
    with pytest.warns(UserWarning, match=f"Passing over the broken checkpoint {re.escape(new)}"):
        assert latest_checkpoint(tmp_path) == old


def test_folders_that_are_not_named_by_a_time_count_by_their_oldest_checkpoint(tmp_path):
    first, second = whole(tmp_path, 5, "b"), whole(tmp_path, 1, "a")
    os.utime(first, (100, 100)), os.utime(second, (200, 200))
    assert latest_checkpoint(tmp_path) == second


def test_vanished_dangling_and_odd_entries_are_passed_over(tmp_path, monkeypatch):
    good = whole(tmp_path, 1)
    folder = Path(good).parent
    (folder / "ckp_7.pth.tar").symlink_to(tmp_path / "nowhere")
    (folder / "ckp_8.pth.tar").symlink_to(folder / "ckp_8.pth.tar")  # to itself
    (folder / "ckp_6.pth.tar").mkdir()
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "ckp_5.pth.tar")
    with pytest.warns(UserWarning) as caught:
        assert latest_checkpoint(tmp_path) == good
    named = [re.search(r"ckp_\d", str(w.message))[0] for w in caught]
    assert named == ["ckp_8", "ckp_7", "ckp_6", "ckp_5"]
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda f: [*listed(f), "ckp_99.pth.tar"])  # gone before it was opened
    with pytest.warns(UserWarning, match="ckp_99.pth.tar, which is not there anymore"):
        assert latest_checkpoint(tmp_path) == good


# A full disk, a read-only folder ----------------------------------------------------------------------------------------


def count_folders():
    count = itertools.count()
    importlib.import_module("deepinv.training.trainer").get_timestamp = lambda: f"24-01-01-00:00:{next(count):02d}"


@pytest.fixture
def small_disk(tmp_path):
    r"""A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # at once, whatever still looks at it


needs_mount = pytest.mark.skipif(
    not is_root or shutil.which("mount") is None, reason="needs the right to mount a tmpfs"
)


@needs_mount
def test_a_full_disk_loses_nothing(small_disk, tmp_path, finished):
    runs, full = full_disk_runs(small_disk, tmp_path, finished)
    print(f"{runs} runs, {full} on a full disk, all resumed bit for bit")


def full_disk_runs(small_disk, tmp_path, finished, rooms=None):
    r"""Trainings with little room on their disk, resumed with more: how many, and how many found it full."""
    size = Path(latest_checkpoint(finished)).stat().st_size
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    rng, full, filler = random.Random(0), 0, small_disk / "filler"
    rooms = rooms or [0, 1, 4096, size - 4096, size, *(rng.randrange(2 * size) for _ in range(5))]
    for i, room in enumerate(rooms):  # of a run that has saved one checkpoint
        folder = small_disk / str(i)
        trainer(folder, 2).train()
        (good,) = folder.rglob("ckp_*")
        before = good.read_bytes()
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(max(0, free - room - 4096)))
        failed = trainer(folder, 4, resume=True)
        try:
            failed.train()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert "No space left on device" in str(error)
            full += 1
        assert not list(small_disk.rglob("*.part")) and good.read_bytes() == before
        newest = latest_checkpoint(folder)
        assert read_checkpoint(newest)["epoch"] >= 1
        filler.unlink()
        resumed = trainer(folder, 4, resume=True)
        resumed.train()
        assert torch.equal(weights(resumed.model), weights(whole.model)) and resumed.loss_history == whole.loss_history
        shutil.rmtree(folder)
    assert full >= len(rooms) // 2
    return len(rooms), full


def without_rights(folder: str) -> None:
    r"""As a user without rights, meet a folder of root's. For a process of its own."""
    count_folders()
    torch.set_num_threads(1)
    root = Path(folder)
    run = trainer(root / "a", 2)
    run.train()
    good = Path(latest_checkpoint(root / "a"))
    before, state = good.read_bytes(), weights(run.model)
    hidden = root / "b" / "24-01-01-00:00:00" / "ckp_1.pth.tar"
    hidden.parent.mkdir(parents=True)
    shutil.copy(good, hidden)
    hidden.chmod(0)
    os.chmod(root, 0o755)
    os.seteuid(65534)
    try:
        run.save_model(good.name, 5)
        raise AssertionError("it was saved")
    except PermissionError as error:
        assert f"{good} could not be written (Permission denied)" in str(error), error
        assert "make the folder writable" in str(error)
    assert good.read_bytes() == before and torch.equal(weights(run.model), state)
    assert latest_checkpoint(root / "a") == str(good)
    try:
        trainer(root / "a", 4, resume=True).train()
        raise AssertionError("it was trained")
    except PermissionError:
        pass
    elsewhere = trainer(None, 3, ckpt_pretrained=str(good))
    elsewhere.train()  # what can be read can be used
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert latest_checkpoint(root / "b") is None
    assert any("Passing over the broken checkpoint" in str(w.message) for w in caught), [str(w.message) for w in caught]
    os.seteuid(0)
    assert good.read_bytes() == before and not list(root.rglob("*.part"))
    resumed = trainer(root / "a", 4, resume=True)
    resumed.train()
    whole = trainer(None, 4)
    whole.train()
    assert torch.equal(weights(resumed.model), weights(whole.model))
    print("nothing lost")


@pytest.mark.skipif(not is_root, reason="needs root, to drop its rights")
def test_a_read_only_folder_loses_nothing():
    folder = tempfile.mkdtemp()  # not under pytest's own, which other users may not enter
    try:
        code = f"from tests.training.test_checkpoints import without_rights; without_rights({folder!r})"
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0 and "nothing lost" in run.stdout, run.stderr
    finally:
        shutil.rmtree(folder)
