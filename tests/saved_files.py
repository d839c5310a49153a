r"""A small checkpoint, and every change of one bit of a file."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from deepinv_deq import files
from deepinv_deq.files import digest, digests, save_intact

CONTENT = {
    "state_dict": OrderedDict(w=torch.linspace(-1, 1, 6).reshape(2, 3), b=torch.zeros(0)),
    "epoch": 3,
    "rng": {"python": (3, (1, 2**70), None), "generators": {"loader.generator": {"kind": "torch", "state": [1, 2]}}},
    "config": {"alpha": 1.0, "name": "é", "on": True, "nothing": None, "z": 1j, "raw": b"\0"},
    "half": torch.arange(3, dtype=torch.bfloat16),
    "sparse": torch.eye(2).to_sparse(),
    "csr": torch.eye(2).to_sparse_csr(),
    "csc": torch.eye(2).to_sparse_csc(),
    "dtype": torch.float64,
    "set": {1, 2, 3},
}


def saved(tmp_path, content=CONTENT, name="a.pt"):
    save_intact(content, tmp_path / name)
    return tmp_path / name


def every_flip(data: bytes):
    changed = bytearray(data)
    for position in range(len(data)):
        for bit in range(8):
            changed[position] ^= 1 << bit
            yield position, bytes(changed)
            changed[position] ^= 1 << bit


def flips(data: bytes, expected: str) -> tuple[int, int]:
    r"""Numbers of single-bit changes of a file that are detected, and that change nothing which is read."""
    detected = harmless = 0
    for position, changed in every_flip(data):
        try:
            found = files._verified(changed, Path("a.pt"), False)
            found["state_dict"]  # what every reader of checkpoints looks for, and names if it is not there
        except Exception:
            detected += 1
        else:
            assert digest(found) == expected, f"a bit of byte {position} changes the contents in silence"
            harmless += 1
    return detected, harmless


@pytest.mark.filterwarnings("ignore")
def bits_of_a_checkpoint(legacy):
    r"""Turn every bit of a small checkpoint: how many were noticed, and how many have no effect."""
    content = {"state_dict": {"w": torch.tensor([0.5, -1.0])}, "epoch": 3, "rng": {"python": (3, (1, 2), None)}}
    buffer = io.BytesIO()
    signed = content | {"_digest": digests(content)}
    torch.save(signed, buffer, _use_new_zipfile_serialization=not legacy)  # which has no checksums in the old format
    data = buffer.getvalue()
    assert data.count(b"_digest") == 1
    detected, harmless = flips(data, digest(content))
    assert detected + harmless == 8 * len(data) > 8 * 600 and detected > harmless > 0
    return detected, harmless
