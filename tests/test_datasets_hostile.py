r"""Reading images: limits of memory, hostile files and changed bits."""

from __future__ import annotations

import io
import os
import pickle
import re
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from deepinv_deq.datasets import load_images
from tests.images import array, write_dicom


def header(shape, dtype="|u1", version=(1, 0)):
    buffer = io.BytesIO()
    write = {(1, 0): np.lib.format.write_array_header_1_0, (2, 0): np.lib.format.write_array_header_2_0}[version]
    write(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.fixture
def tracked():
    tracemalloc.start()
    yield tracemalloc
    tracemalloc.stop()


def test_a_small_file_cannot_ask_for_much_memory(tmp_path, tracked):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w") as file:
            file.write(header((200, 1000, 1000)))
            for _ in range(200):
                file.write(bytes(10**6))
    assert (tmp_path / "bomb.npz").stat().st_size < 10**6
    (tmp_path / "lie.npy").write_bytes(header((10**6, 10**6, 10**3)) + bytes(100))
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("images.npy", header((10**6, 10**6, 10**6), "<f8") + bytes(100))
    Image.fromarray(np.zeros((3000, 3000), np.uint8)).save(tmp_path / "large.png")
    tracked.reset_peak()
    for name in ("bomb.npz", "lie.npy", "lie.npz", "large.png"):
        with pytest.raises(ValueError, match=rf"{name} .*asks for [\d,]+ bytes, more than max_bytes=10,000,000"):
            load_images(tmp_path / name, max_bytes=10**7)
    assert tracked.get_traced_memory()[1] < 10**7
    with pytest.raises(ValueError, match="lie.npz .*asks for .* more than max_bytes=4,294,967,296"):
        load_images(tmp_path / "lie.npz")
    assert load_images(tmp_path / "large.png", 4).shape == (1, 1, 4, 4)


def test_the_images_of_a_folder_share_the_limit(tmp_path):
    for name in "abc":
        Image.fromarray(np.zeros((100, 100), np.uint8)).save(tmp_path / f"{name}.png")
    assert len(load_images(tmp_path, max_bytes=120_000)) == 3
    with pytest.raises(ValueError, match="c.png cannot be read as an image: it asks for 40,000 bytes"):
        load_images(tmp_path, max_bytes=119_999)


# Hostile files ----------------------------------------------------------------------------------------------------------


def npz(content: bytes, name="images.npy", twice=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2 if twice else 1):
            archive.writestr(name, content)
    return buffer.getvalue()


class Forged:
    def __reduce__(self):
        return os.system, ("touch trace",)


GOOD = header((1, 2, 2)) + bytes(4)
HOSTILE = {
    "empty.npy": b"",
    "text.npy": b"plain text",
    "cut.npy": GOOD[:-1],
    "longer.npy": GOOD + b"\0",
    "header.npy": GOOD[:50],
    "version.npy": b"\x93NUMPY\x09\x00" + GOOD[8:],
    "negative.npy": header((-1, 2, 2)) + bytes(4),
    "two negatives.npy": header((-1, -2, 2)) + bytes(4),
    "expression.npy": GOOD.replace(b"'|u1'", b"1 + 1"),
    "pickle.npy": header((1, 1, 1), "|O") + pickle.dumps([Forged()]),
    "complex.npy": header((1, 1, 1), "<c8") + bytes(8),
    "dates.npy": header((1, 1, 1), "<M8[s]") + bytes(8),
    "text array.npy": header((1, 1, 1), "<U1") + bytes(4),
    "nothing.npy": header((1, 1, 1), "|V0"),
    "scalar.npy": header(()) + bytes(1),
    "five axes.npy": header((1, 1, 1, 1, 1)) + bytes(1),
    "npz as.npy": npz(GOOD),
    "npy as.npz": GOOD,
    "cut.npz": npz(GOOD)[:-10],
    "cut inside.npz": npz(GOOD[:-1]),
    "longer.npz": npz(GOOD + bytes(5)),
    "other key.npz": npz(GOOD, "pictures.npy"),
    "twice.npz": npz(GOOD, twice=True),
    "pickle.npz": npz(header((1, 1, 1), "|O") + pickle.dumps([Forged()])),
    "pickle alone.npz": pickle.dumps(Forged()),
    "text.npz": b"plain text",
    "text inside.npz": npz(b"plain text"),
    "checkpoint.npz": npz(b"\x80\x02}q\x00.", "archive/data.pkl"),
    "text.png": b"plain text",
    "cut.png": None,
    "cut.tif": None,
    "frames.tif": None,
    "text.dcm": b"plain text",
    "cut.dcm": None,
    "frames.dcm": None,
    "colours.dcm": None,
    "larger than its pixels.dcm": None,
    "infinite slope.dcm": None,
}


def write_hostile(path):
    if HOSTILE[path.name] is not None:
        path.write_bytes(HOSTILE[path.name])
    elif path.name == "frames.tif":
        image = Image.fromarray(np.zeros((4, 4), np.uint8))
        image.save(path, save_all=True, append_images=[image])
    elif path.suffix == ".dcm":
        from pydicom import dcmread

        write_dicom(path, np.zeros((8, 8)))
        if path.name == "cut.dcm":
            path.write_bytes(path.read_bytes()[:-20])
            return
        change = {
            "frames.dcm": {"NumberOfFrames": 2},
            "colours.dcm": {"SamplesPerPixel": 3},
            "larger than its pixels.dcm": {"Rows": 60000, "Columns": 60000},
            "infinite slope.dcm": {"RescaleSlope": "1e400"},
        }[path.name]
        dataset = dcmread(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, value in change.items():
                setattr(dataset, name, value)
            dataset.save_as(path)
    else:
        Image.fromarray(array(1, 40, 40)[0]).save(path)
        path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, monkeypatch, name):
    if name.endswith("dcm"):
        pytest.importorskip("pydicom")
    monkeypatch.chdir(tmp_path)
    write_hostile(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_images(tmp_path / name)
    if not name.endswith(("npy", "npz")):
        with pytest.raises(ValueError, match=re.escape(name)):
            load_images(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_pipes_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="a.npz is neither a file nor a folder"):
        load_images(tmp_path / "a.npz")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").mkdir()
    with pytest.raises(ValueError, match="b.png cannot be read as an image: it is not a file"):
        load_images(tmp_path / "images")


@pytest.mark.parametrize("suffix", ["npz", "png"])
def test_no_single_bit_changes_images_in_silence(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    data = array(1, 5, 4)
    np.savez(path, images=data) if suffix == "npz" else Image.fromarray(data[0]).save(path)
    whole, expected = path.read_bytes(), load_images(path)
    refused = 0
    for position in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                found = load_images(path)
            except ValueError as error:
                refused += 1
                assert path.name in str(error)
            else:
                assert torch.equal(found, expected), f"bit {bit} of byte {position}"
    assert refused > 4 * len(whole)
