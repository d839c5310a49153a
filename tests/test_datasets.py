r"""Reading images: what is accepted, and what every kind of bad file says."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from deepinv_deq.datasets import ct_slice, load_images, mr_slice, phantoms


def array(n=3, h=6, w=6, dtype=np.uint8):
    scale = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (np.random.default_rng(0).random((n, h, w)) * scale).astype(dtype)


def write_dicom(path, hounsfield):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = hounsfield.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = (hounsfield + 1024).astype(np.uint16).tobytes()
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_npz(tmp_path, dtype):
    data = array(dtype=dtype)
    np.savez(tmp_path / "a.npz", images=data)
    images = load_images(tmp_path / "a.npz")
    scale = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    assert images.shape == (3, 1, 6, 6) and images.dtype == torch.float32
    np.testing.assert_allclose(images[:, 0].numpy(), data / scale, atol=1e-6)


@pytest.mark.parametrize(
    "suffix,dtype", [("png", np.uint8), ("png", np.uint16), ("tif", np.uint16), ("TIFF", np.float32)]
)
def test_raster_folder_in_the_order_of_names(tmp_path, suffix, dtype):
    data = array(dtype=dtype)
    for i in (2, 0, 1):
        Image.fromarray(data[i]).save(tmp_path / f"{i}.{suffix}")
    (tmp_path / "notes.txt").write_text("not an image, and not taken for one")
    scale = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    np.testing.assert_allclose(load_images(tmp_path)[:, 0].numpy(), data / scale, atol=1e-6)


def test_colours_are_averaged(tmp_path):
    Image.fromarray(np.dstack([np.full((4, 4), v, np.uint8) for v in (0, 51, 204)])).save(tmp_path / "a.png")
    torch.testing.assert_close(load_images(tmp_path), torch.full((1, 1, 4, 4), 1 / 3))


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_palettes_and_transparency_are_not_grey_values(tmp_path, mode):
    Image.fromarray(np.full((4, 4), 100, np.uint8)).convert("RGB").convert(mode).save(tmp_path / "a.png")
    torch.testing.assert_close(load_images(tmp_path), torch.full((1, 1, 4, 4), 100 / 255), atol=2e-2, rtol=0)


def test_dicom_folder(tmp_path):
    pytest.importorskip("pydicom")
    write_dicom(tmp_path / "a.dcm", np.array([[-1024, -1000], [0, 3000]]))
    torch.testing.assert_close(load_images(tmp_path), torch.tensor([[[[0.0, 0.0], [0.5, 1.0]]]]))


def test_resizing_cuts_the_central_square_and_averages(tmp_path):
    data = np.zeros((1, 4, 8), np.float32)
    data[:, :, 2:4], data[:, :2, 4:6] = 1.0, 0.5
    np.savez(tmp_path / "a.npz", images=data)
    torch.testing.assert_close(load_images(tmp_path / "a.npz", 2), torch.tensor([[[[1.0, 0.5], [1.0, 0.0]]]]))


def test_missing():
    with pytest.raises(FileNotFoundError, match="No data at nowhere.npz: give a .npz file with the key 'images'"):
        load_images("nowhere.npz")


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="No image in the folder"):
        load_images(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"plain text"])
def test_broken_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="a.npz is no .npz file"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"pictures": array()}, r"keys \['pictures'\], but no 'images'"),
        ({"images": array()[0]}, r"must be \(N, H, W\)"),
        ({"images": array()[:0]}, "at least one image"),
        ({"images": array(dtype=np.float32) * 2000 - 1000}, r"scale them to \[0, 1\]"),
        ({"images": np.full((1, 2, 2), np.nan)}, r"scale them to \[0, 1\]"),
        ({"images": np.full((1, 2, 2), "a")}, "not grey images"),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "a.npz")


def test_unequal_sizes_name_the_files(tmp_path):
    for name, side in (("a", 4), ("b", 5)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"a.png is \(4, 4\), b.png is \(5, 5\). Give size="):
        load_images(tmp_path)


def test_a_size_makes_unequal_images_equal(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a", (8, 10)), ("b", (6, 6)), ("c", (12, 8))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    images = load_images(tmp_path, size=4)
    alone = [load_images(tmp_path / f"{name}.png", size=4) for name in "abc"]
    assert images.shape == (3, 1, 4, 4) and torch.equal(images, torch.cat(alone))


def test_averages_do_not_hide_values_outside_of_the_range(tmp_path):
    Image.fromarray(np.array([[0.0, 2.0], [0.0, 0.0]], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"values in \[0, 2\]"):
        load_images(tmp_path, size=1)


@pytest.mark.parametrize("suffix", ["png", "tiff", "dcm"])
def test_files_that_are_not_images_are_named(tmp_path, suffix):
    pytest.importorskip("pydicom")
    (tmp_path / f"bad.{suffix}").write_text("not an image")
    with pytest.raises(ValueError, match=f"bad.{suffix} cannot be read as an image"):
        load_images(tmp_path)


def test_phantoms_are_seeded_and_leave_numpy_alone():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    a, b, c = phantoms(2, 16, seed=1), phantoms(2, 16, seed=1), phantoms(2, 16, seed=2)
    assert np.random.rand() == expected
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (2, 1, 16, 16) and a.min() >= 0 and a.max() <= 1


def test_slices_that_come_with_other_packages():
    for image, side in ((mr_slice(), 256), (ct_slice(), 128)):
        assert image.shape == (1, 1, side, side) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() == 1 and image.std() > 0.1


def test_the_ct_slice_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom.data", None)
    with pytest.raises(ImportError, match=r"deepinv-deq\[dicom\]"):
        ct_slice()


# Single files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ">f8", ">u2", np.bool_, np.float16])
def test_npy(tmp_path, dtype, order):
    data = np.asarray(array(dtype=np.float64) > 0.5, dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", data)
    scale = np.iinfo(data.dtype).max if np.issubdtype(data.dtype, np.integer) else 1
    np.testing.assert_array_equal(load_images(tmp_path / "a.npy")[:, 0].numpy(), (data / scale).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint64])
def test_integers_are_divided_by_the_largest_of_their_type(tmp_path, dtype):
    top = np.iinfo(dtype).max
    data = np.array([[[0, top // 3, top // 2, top]]], dtype=dtype)
    np.savez_compressed(tmp_path / "a.npz", images=data)
    expected = np.array([int(v) / int(top) for v in data.flat], np.float32)
    np.testing.assert_array_equal(load_images(tmp_path / "a.npz").flatten().numpy(), expected)


@pytest.mark.parametrize("suffix", ["png", "tif", "dcm"])
def test_one_image(tmp_path, suffix):
    pytest.importorskip("pydicom")
    file = tmp_path / f"a.{suffix}"
    if suffix == "dcm":
        write_dicom(file, np.array([[-1000, 0, 1000]]))
    else:
        Image.fromarray(np.array([[0, 128, 255]], np.uint8)).save(file)
    torch.testing.assert_close(load_images(file), torch.tensor([[[[0.0, 0.5, 1.0]]]]), atol=3e-3, rtol=0)


def test_a_size_that_is_none(tmp_path):
    np.save(tmp_path / "a.npy", array())
    with pytest.raises(ValueError, match="size must be a positive number of pixels, got 0"):
        load_images(tmp_path / "a.npy", 0)


# Limits of memory -------------------------------------------------------------------------------------------------------


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
