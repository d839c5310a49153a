r"""Which checkpoint a run resumes from, what a forged one says, and that a full disk or a read-only folder loses nothing."""

from __future__ import annotations

import errno
import importlib
import io
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

from deepinv_deq.files import DIGEST, digest
from deepinv_deq.training import _read, latest_checkpoint
from tests.saved_files import flips
from tests.training.test_resuming import trainer, weights

FULL = os.environ.get("DEEPINV_DEQ_FAULTS") == "full"
pytestmark = pytest.mark.usefixtures("run_folders")
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    r"""The folder of a run of three epochs."""
    folder = tmp_path_factory.mktemp("finished")
    trainer(folder, 3).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def whole(folder, epoch=1, started="24-01-01-00:00:00", **content):
    r"""A small checkpoint, in the folder of a run that was started at a given time."""
    (folder / started).mkdir(parents=True, exist_ok=True)
    path = folder / started / f"ckp_{epoch}.pth.tar"
    torch.save({"state_dict": {}, "epoch": epoch} | content, path)
    return str(path)


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


# Forged and foreign checkpoints -----------------------------------------------------------------------------------------


def rewrite(path, change):
    content = torch.load(path, weights_only=True)
    del content[DIGEST]
    change(content)
    torch.save(content, path)


WRONG = {
    "weights that are no tensors": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): 3}),
    "a list of weights": lambda c: c.update(state_dict=[torch.zeros(1)]),
    "numbered weights": lambda c: c.update(state_dict={1: torch.zeros(1)}),
    "an epoch that is no number": lambda c: c.update(epoch="2"),
    "a negative epoch": lambda c: c.update(epoch=-1),
    "an epoch of nothing": lambda c: c.update(epoch=None),
    "an optimiser that is a number": lambda c: c.update(optimizer=1),
    "a scheduler that is a list": lambda c: c.update(scheduler=[]),
    "histories that are numbers": lambda c: c.update(loss={"MCLoss": 1.0}),
    "a config that is a string": lambda c: c.update(config="alpha"),
    "generators that are a tensor": lambda c: c.update(rng=torch.zeros(3)),
    "a scaler that is nothing": lambda c: c.update(scaler=None),
}
MISFITS = {
    "another shape": lambda c: c["state_dict"].update(
        {k: torch.zeros(7) for k in c["state_dict"] if k.endswith("weight")}
    ),
    "weights that are missing": lambda c: c["state_dict"].popitem(),
    "an optimiser without groups": lambda c: c["optimizer"].update(param_groups=[]),
    "an optimiser of nothing": lambda c: c.update(optimizer={}),
    "a state of NumPy of another kind": lambda c: c["rng"].update(numpy={"bit_generator": "PCG64", "state": {}}),
    "a state of PyTorch that is too short": lambda c: c["rng"].update(torch=torch.zeros(3, dtype=torch.uint8)),
    "a state of Python that is too short": lambda c: c["rng"].update(python=(3, (1, 2), None)),
    "no state of NumPy": lambda c: c["rng"].pop("numpy"),
    "a private state of another type": lambda c: next(iter(c["rng"]["generators"].values())).update(state="x"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_values_of_a_wrong_type_name_the_file(run, kind):
    path = latest_checkpoint(run)
    rewrite(path, WRONG[kind])
    with pytest.raises(ValueError, match="ckp_2.pth.tar is no checkpoint of a Trainer"):
        _read(path)
    with pytest.raises(ValueError, match="ckp_2.pth.tar is no checkpoint of a Trainer"):
        trainer(None, 5, ckpt_pretrained=path).train()
    with pytest.warns(UserWarning, match="broken checkpoint .*ckp_2"):
        assert latest_checkpoint(run).endswith("ckp_1.pth.tar")


def test_histories_of_another_form_in_a_foreign_checkpoint_do_not_matter(run):
    path = latest_checkpoint(run)
    rewrite(path, lambda c: (c.pop("rng"), c.update(loss=[0.5], eval_metrics=3)))
    tuned = trainer(None, 4, ckpt_pretrained=path)
    tuned.train()
    assert len(tuned.loss_history["MCLoss"]) == 1  # from the fourth epoch on


def everything(run):
    return digest([run.model.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict(), run.loss_history])


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_names_the_file_and_changes_nothing(run, kind, monkeypatch):
    path = latest_checkpoint(run)
    rewrite(path, MISFITS[kind])
    resumed, before = trainer(run, 5, resume=True), []
    load = type(resumed).load_model

    def watched(self, *args, **kwargs):
        before.append((everything(self), torch.get_rng_state()))
        return load(self, *args, **kwargs)

    monkeypatch.setattr(type(resumed), "load_model", watched)
    with pytest.raises(ValueError, match="ckp_2.pth.tar does not fit this run"):
        resumed.train()
    assert everything(resumed) == before[0][0] and resumed.epoch_start == 0
    assert torch.equal(torch.get_rng_state(), before[0][1])


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "loss", "scaler"])
def test_a_run_is_not_resumed_without_a_part_of_its_state(run, key):
    rewrite(latest_checkpoint(run), lambda c: c.pop(key))
    with pytest.raises(ValueError, match=f"was not saved by a ResumableTrainer: it has no {key} to resume from"):
        trainer(run, 5, resume=True).train()


def test_a_changed_weight_generator_or_setting_is_refused(run):
    path = latest_checkpoint(run)
    whole = torch.load(path, weights_only=True)
    for key, change in {
        "state_dict": lambda c: next(iter(c["state_dict"].values())).flatten()[:1].mul_(1 + 1e-15),
        "rng": lambda c: c["rng"]["torch"][100:101].bitwise_xor_(1),
        "optimizer": lambda c: c["optimizer"]["param_groups"][0].update(lr=2e-3),
        "config": lambda c: c["config"].update(alpha=1),
    }.items():
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"can be trusted.*digest of '{key}' is wrong"):
            _read(path)
        torch.save(whole, path)
    _read(path)


@pytest.mark.skipif(not FULL, reason="half a million files take minutes: DEEPINV_DEQ_FAULTS=full")
@pytest.mark.filterwarnings("ignore")
def test_every_single_bit_of_the_checkpoint_of_a_run(run):
    data = Path(latest_checkpoint(run)).read_bytes()
    content = torch.load(io.BytesIO(data), weights_only=True)
    del content[DIGEST]
    detected, harmless = flips(data, digest(content))
    print(f"{8 * len(data)} bits: {detected} detected, {harmless} harmless")
    assert detected + harmless == 8 * len(data)


def test_settings_that_could_not_be_saved_are_named_before_training(tmp_path):
    with pytest.raises(TypeError, match=r"config\['loss'\] is a builtins.builtin_function_or_method"):
        trainer(tmp_path, 2, config={"loss": print}).train()
    run = trainer(tmp_path, 2)
    run.optimizer.param_groups[0]["lr"] = __import__("numpy").float64(1e-3)
    with pytest.raises(TypeError, match=r"optimizer.state_dict\(\)\['param_groups'\]\[0\]\['lr'\] is a numpy.float64"):
        run.train()
    run = trainer(tmp_path, 2)
    run.train()
    with pytest.raises(TypeError, match=r"state\['mine'\] is a builtins.object"):
        run.save_model("mine.pth.tar", 1, {"mine": object()})
    run.save_model("mine.pth.tar", 1, {"mine": 3})
    assert _read(Path(run.save_path) / "mine.pth.tar")["mine"] == 3
    assert not list(tmp_path.rglob("*.part"))


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
        assert _read(newest)["epoch"] >= 1
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
