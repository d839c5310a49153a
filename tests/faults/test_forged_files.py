r"""Truncated, changed and forged checkpoints."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from deepinv_deq.training import latest_checkpoint
from tests.faults.common import (
    DAMAGED,
    TRIED,
)
from tests.faults.runs import faulty_run, unique_folders
from tests.problems import Forged


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    unique_folders(monkeypatch)
    trainer, _ = faulty_run(tmp_path / "run", epochs=2)
    trainer.train()
    return Path(latest_checkpoint(tmp_path / "run"))


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def fresh(path, **kwargs):
    trainer, _ = faulty_run(ckpt_pretrained=str(path), **kwargs)
    trainer.setup_train()
    return trainer


def test_a_truncated_checkpoint_is_refused(checkpoint):
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    for length in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(10))]:
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no checkpoint that can be trusted: it was cut off or changed"):
            fresh(checkpoint)
        TRIED[DAMAGED] += 1


def test_a_changed_byte_is_noticed(checkpoint):
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    content = torch.load(checkpoint, weights_only=True)
    with zipfile.ZipFile(checkpoint) as archive:
        records = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size >= 8]
    name = len(records[0].filename)
    inside = [i.header_offset + 30 + name + 64 + i.file_size // 2 for i in records if i.file_size > 1000]
    refused = 0
    for position in inside + [rng.randrange(len(whole)) for _ in range(40)]:
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.randrange(8)
        checkpoint.write_bytes(changed)
        try:
            fresh(checkpoint)
        except ValueError as error:
            assert "can be trusted" in str(error)
            refused += 1
        else:  # a byte that means nothing, such as the date of a record
            assert same(torch.load(checkpoint, weights_only=True), content)
            assert position not in inside
        TRIED[DAMAGED] += 1
    assert refused > 20


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(checkpoint, tmp_path, legacy):
    content = torch.load(checkpoint, weights_only=True)
    trace = tmp_path / "trace"
    content["config"] = Forged(f"touch {trace}")
    torch.save(content, checkpoint, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="more in it than tensors and plain values"):
        fresh(checkpoint)
    with pytest.warns(UserWarning, match="Passing over the broken checkpoint"):
        assert latest_checkpoint(tmp_path / "run") != str(checkpoint)
    buffer = io.BytesIO()
    pickle.dump(Forged(f"touch {trace}"), buffer)
    checkpoint.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="can be trusted"):
        fresh(checkpoint)
    assert not trace.exists()
    TRIED[DAMAGED] += 2


def test_other_files_are_no_checkpoints(checkpoint, tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "dict.pt")
    for name in ("list.pt", "dict.pt"):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint of a Trainer: it has no state_dict"):
            fresh(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fresh(tmp_path / "nowhere.pt")
    content = torch.load(checkpoint, weights_only=True)
    del content["rng"]  # as deepinv's own Trainer writes it
    torch.save(content, checkpoint)
    assert fresh(checkpoint).epoch_start == 2
    trainer, _ = faulty_run(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="was not saved by a ResumableTrainer.*ckpt_pretrained"):
        trainer.train()
