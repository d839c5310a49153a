r"""Hostile and forged files are refused by name, and run no code."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from deepinv_deq.files import load_intact, read_weights, save_intact
from tests.problems import Forged
from tests.saved_files import saved


def central(data: bytes, record: str) -> int:
    r"""Where the directory of a zip file describes a record."""
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    return next(i for i in starts if record.encode() in data[i + 46 : i + 46 + 64])


@pytest.mark.parametrize("signed", [True, False])
def test_a_record_marked_as_a_directory_is_refused(tmp_path, signed):
    path = tmp_path / "a.pt"
    content = {"state_dict": {"w": torch.full((1000,), 0.5)}}
    save_intact(content, path) if signed else torch.save(content, path)
    data = bytearray(path.read_bytes())
    data[central(data, "data/0") + 38] ^= 0x10  # PyTorch 2.14 leaves the tensor uninitialised, and says nothing
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.pt cannot be trusted.*directory entry of .*data/0 is damaged"):
        load_intact(path)


def test_a_changed_value_with_right_checksums_is_refused(tmp_path):
    path = saved(tmp_path, {"state_dict": {"w": torch.ones(3)}, "settings": {"lr": 0.1}, "rng": [1, 2, 3]})
    for key, change in {
        "state_dict": lambda c: c["state_dict"]["w"].__setitem__(1, 1 + 1e-7),
        "settings": lambda c: c["settings"].update(lr=0.2),
        "rng": lambda c: c["rng"].__setitem__(0, 2),
    }.items():
        content = torch.load(path, weights_only=True)
        change(content)
        for legacy in (False, True):
            torch.save(content, tmp_path / "b.pt", _use_new_zipfile_serialization=not legacy)
            with pytest.raises(ValueError, match=f"b.pt cannot be trusted.*the digest of '{key}' is wrong"):
                load_intact(tmp_path / "b.pt")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"added": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="the digest of 'added' is wrong"):
        load_intact(tmp_path / "b.pt")
    del content["rng"]  # to drop what is not needed is no damage
    torch.save(content, tmp_path / "b.pt")
    assert load_intact(tmp_path / "b.pt").keys() == {"state_dict", "settings"}


def hostile(folder: Path) -> dict[str, bytes]:
    r"""Files of every kind that are no checkpoint, no weights and no cache, by name."""
    rng = random.Random(0)
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(100)}, "epoch": 1}, buffer)
    whole = buffer.getvalue()
    found = {f"cut-{n}": whole[:n] for n in (0, 1, 2, 4, 30, len(whole) // 2, len(whole) - 1)}
    found |= {f"noise-{i}": rng.randbytes(200 * i) for i in range(1, 6)}
    found |= {f"zip of noise {i}": b"PK\x03\x04" + rng.randbytes(100) for i in range(3)}
    found["text"], found["png"] = b"not a checkpoint", b"\x89PNG\r\n\x1a\n" + bytes(50)
    found["doubled"] = whole + whole
    found["shifted"] = b"junk" + whole
    for i in range(10):  # a byte inside of a record
        data = bytearray(whole)
        data[whole.index(b"\x00\x00\x80\x3f" * 8) + rng.randrange(300)] ^= 1 << rng.randrange(8)
        found[f"weight-{i}"] = bytes(data)
    for name, content in (("code", Forged(f"touch {folder}/trace")), ("class", Path("x")), ("function", print)):
        found[f"pickle of {name}"] = pickle.dumps(content)
        for legacy in (False, True):
            buffer = io.BytesIO()
            torch.save({"state_dict": content}, buffer, _use_new_zipfile_serialization=not legacy)
            found[f"{name}, legacy {legacy}"] = buffer.getvalue()
    for name, change in (("deflated", zipfile.ZIP_DEFLATED), ("twice", None), ("no pickle", None)):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(buffer, "w") as target:
            for record in source.infolist():
                if not (name == "no pickle" and record.filename.endswith(".pkl")):
                    target.writestr(record.filename, source.read(record), change)
                if name == "twice" and record.filename.endswith("data/0"):
                    with pytest.warns(UserWarning, match="Duplicate name"):
                        target.writestr(record.filename, bytes(400))
        found[name] = buffer.getvalue()
    with zipfile.ZipFile(io.BytesIO(whole)) as source:  # asks for a thousand times the numbers that are there
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as target:
            for record in source.infolist():
                target.writestr(record.filename, source.read(record).replace(b"Kd", b"M\xff\xff"))
        found["larger than its record"] = buffer.getvalue()
    return found


@pytest.mark.filterwarnings("ignore:.*pickle protocol", "ignore:.*no checksum")
def test_hostile_files_are_refused_by_name_and_run_nothing(tmp_path):
    kinds = hostile(tmp_path)
    assert len(kinds) >= 40
    for i, (name, data) in enumerate(kinds.items()):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"/{i}.pt cannot be trusted"):
            print(name, load_intact(path))
        with pytest.raises(ValueError, match=f"/{i}.pt holds no weights"):
            print(name, read_weights(path))
    assert not (tmp_path / "trace").exists()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name} cannot be trusted.*not a regular file"):
            load_intact(tmp_path / name)
    for name in ("link", "nowhere"):
        with pytest.raises(FileNotFoundError, match=name):
            load_intact(tmp_path / name)
