r"""Every bit of a file, every kind of damage: what this package writes is read back as it was, or refused by name."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from deepinv_deq import files
from deepinv_deq.files import contents_of, digest, digests, load_intact, plain, read_weights, save_intact

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


@pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")
def test_what_is_written_is_read_back(tmp_path):
    path = saved(tmp_path)
    found = load_intact(path, signed=True)
    assert found.keys() == CONTENT.keys() and digest(found) == digest(CONTENT)
    assert torch.load(path, weights_only=True).keys() == {*CONTENT, "_digest"}  # PyTorch reads it, too
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_numpy_values_become_plain_ones(tmp_path):
    path = saved(tmp_path, {"a": np.float64(0.5), "b": [np.arange(3, dtype=np.int32)], "c": {"d": (np.bool_(True), 1)}})
    found = load_intact(path)
    assert type(found["a"]) is float and found["b"][0].tolist() == [0, 1, 2] and found["c"]["d"] == (True, 1)


def equal_pairs():
    x = torch.arange(12.0).reshape(3, 4)
    yield x.t(), x.t().contiguous()
    yield x[:, ::2], x[:, ::2].clone()
    yield torch.conj(x + 1j), torch.conj(x + 1j).resolve_conj()
    yield torch.nn.Parameter(x), x
    yield {"a": [1, (2.0, "x")]}, OrderedDict(a=[1, (2.0, "x")])


def test_equal_contents_have_equal_digests():
    for a, b in equal_pairs():
        assert digest(a) == digest(b)


def test_different_contents_have_different_digests():
    x = torch.zeros(2, 2)
    values = [
        x, x.double(), x.int(), x.reshape(4), x.reshape(1, 4), torch.tensor([[0.0, 0.0], [0.0, 1e-45]]), -x, x.bool(),
        x.to_sparse(), x.to_sparse_csr(), [x], (x,), {"a": x}, {"b": x}, {"a": x, "b": 1}, {"b": 1, "a": x}, [], {}, (), None, 0,
        False, True, 1, 1.0, -0.0, 0.0, "", "0", b"", b"0", "1", [1, 2], [[1], 2], [[1, 2]], [1, [2]], set(), {0}, float("nan"),
        1j, complex(0, 0), torch.float32, torch.float64, torch.device("cpu"), "ab", ["a", "b"], ["ab", ""],
    ]  # fmt: skip
    assert len({digest(v) for v in values}) == len(values)


@pytest.mark.parametrize(
    "value", [object(), len, torch.nn.Linear(1, 1), np.array(["a"]), torch.zeros(2, device="meta")]
)
def test_what_could_not_be_read_back_is_refused_before_writing(tmp_path, value):
    with pytest.raises(TypeError, match=r"settings\['deep'\]\[1\] is a"):
        save_intact({"settings": {"deep": [0, value]}}, tmp_path / "a.pt")
    for content in ([1], {1: 2}, {"_digest": 1}):
        with pytest.raises(TypeError, match="dictionary with string keys"):
            save_intact(content, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("legacy", [False, True])
def test_every_single_bit_of_a_checkpoint(legacy):
    bits_of_a_checkpoint(legacy)


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


class Forged:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


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


def test_files_of_others_are_read_and_those_without_checksums_named(tmp_path):
    content = {"state_dict": {"w": torch.ones(3)}}
    torch.save(content, tmp_path / "new.pt")
    assert digest(load_intact(tmp_path / "new.pt")) == digest(content)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="old.pt has no checksum"):
        load_intact(tmp_path / "old.pt")
    for name in ("new.pt", "old.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be trusted.*it has no digest"):
            load_intact(tmp_path / name, signed=True)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = saved(tmp_path, {"a": 1})
    before = path.read_bytes()
    save = torch.save

    def interrupted(content, file, **kwargs):
        save(content, file, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_intact({"a": 2}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_odd_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/a.pt could not be written .No such file"):
        save_intact({"a": 1}, tmp_path / "nowhere" / "a.pt")
    with pytest.raises(OSError, match="null could not be written .*not a regular file"):
        save_intact({"a": 1}, "/dev/null")
    with pytest.raises(OSError, match="not a regular file"):
        save_intact({"a": 1}, tmp_path)
    target = saved(tmp_path, {"a": 1}, "target.pt")
    (tmp_path / "link.pt").symlink_to(target)
    save_intact({"a": 2}, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and load_intact(target) == {"a": 2}


def test_errors_of_building_from_a_file_name_it():
    with pytest.raises(ValueError, match="x.pt does not hold weights of a model .KeyError: 'settings'"):
        with contents_of("x.pt", "weights of a model"):
            {}["settings"]


def test_numbers_of_numpy_become_plain():
    assert plain([np.int64(1)]) == [1] and type(plain([np.int64(1)])[0]) is int
