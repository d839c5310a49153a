r"""A finished run of three epochs, and small checkpoints without one."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.training.test_resuming import trainer


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
