r"""Reading images: what is accepted, and what errors say."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from deepinv_deq.datasets import ct_slice, load_images, mr_slice, phantoms
from tests.images import array, write_dicom


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
