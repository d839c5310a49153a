r"""What this package writes is read back as it was, and every change of one bit is detected."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch

from deepinv_deq.files import contents_of, digest, load_intact, plain, save_intact
from tests.saved_files import CONTENT, bits_of_a_checkpoint, saved


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


@pytest.mark.parametrize("legacy", [False, True])
def test_every_single_bit_of_a_checkpoint(legacy):
    bits_of_a_checkpoint(legacy)


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
