r"""Reading images: what is accepted, and what every kind of bad file says."""

from __future__ import annotations

import sys

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
    with pytest.raises(ValueError, match=r"a.png is \(4, 4\), b.png is \(5, 5\). Crop or resize"):
        load_images(tmp_path)


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
