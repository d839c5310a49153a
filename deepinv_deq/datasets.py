r"""Grey images for the examples: from a file, a folder, or generated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from deepinv.utils import load_dicom
from deepinv.utils.phantoms import generate_random_phantom
from torch import Tensor
from torch.nn.functional import interpolate

# palette indices and transparency are no grey values
_PLAIN_MODES = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBX": "RGB", "CMYK": "RGB", "LA": "L", "La": "L"}
_HOUNSFIELD = (-1000.0, 1000.0)  # air to dense bone: what DICOM slices are clipped to


def load_images(path: str | os.PathLike[str], size: int | None = None) -> Tensor:
    r"""Read grey images in :math:`[0, 1]`.

    A ``.npz`` file has them under the key ``images``, of shape ``(N, H, W)``. A folder has one image per PNG, TIFF or
    DICOM file, in the order of their names. Integers are divided by the largest value of their type; DICOM slices are
    clipped to Hounsfield units in [-1000, 1000]. Colours are averaged.

    :param str, os.PathLike path: file or folder.
    :param int, None size: side to resize to, by averaging areas, after the central square is cut out; ``None`` keeps all.
    :return: tensor of shape ``(N, 1, H, W)``, ``float32``.
    :raises FileNotFoundError: if there is nothing at ``path``, or no image in the folder.
    :raises ValueError: if a file is not an image, the sizes differ, or values are outside of [0, 1].
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No data at {path}: give a .npz file with the key 'images', or a folder of images.")
    images = _load_folder(path) if path.is_dir() else _load_npz(path)
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"The images of {path} have values in [{low:.3g}, {high:.3g}]: scale them to [0, 1].")
    if size is None:
        return images
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    return interpolate(images[..., top : top + side, left : left + side], size=(size, size), mode="area")


def phantoms(n: int, size: int, seed: int = 0) -> Tensor:
    r"""Random ellipse phantoms of deepinv, the same for the same seed, without touching NumPy's global generator.

    :param int n: number of images.
    :param int size: side in pixels.
    :param int seed: seed.
    :return: tensor of shape ``(n, 1, size, size)`` in :math:`[0, 1]`.
    """
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        return torch.stack([generate_random_phantom(size) for _ in range(n)])[:, None]
    finally:
        np.random.set_state(state)


def mr_slice() -> Tensor:
    r"""A sagittal MR slice of a head, which Matplotlib ships as sample data.

    :return: tensor of shape ``(1, 1, 256, 256)`` in :math:`[0, 1]`.
    """
    from matplotlib.cbook import get_sample_data

    sample: Any = get_sample_data("s1045.ima.gz")
    with sample as file:
        values = np.frombuffer(file.read(), np.uint16).reshape(1, 1, 256, 256).astype(np.float32)
    return torch.from_numpy(values / values.max())


def ct_slice(size: int = 128) -> Tensor:
    r"""A transversal CT slice, which pydicom ships for its tests, cut to the circle that a scanner sees.

    :param int size: side in pixels, to which the slice is resized by averaging areas.
    :return: tensor of shape ``(1, 1, size, size)`` in :math:`[0, 1]`, from air to dense bone.
    :raises ImportError: without pydicom, which the extra ``dicom`` installs.
    """
    try:
        from pydicom.data import get_testdata_file
    except ImportError as error:
        raise ImportError("The CT slice comes with pydicom: pip install pydicom, or deepinv-deq[dicom].") from error
    image = _read_dicom(Path(str(get_testdata_file("CT_small.dcm", download=False))))[None, None]
    axis = torch.linspace(-1, 1, size)
    return interpolate(image, size=(size, size), mode="area") * (axis[:, None] ** 2 + axis**2 < 0.95)


def _load_npz(path: Path) -> Tensor:
    try:
        with np.load(path) as file:
            keys = list(file)
            array = file["images"] if "images" in keys else None
    except (ValueError, OSError, EOFError, AttributeError, BadZipFile) as error:
        raise ValueError(
            f"{path} is no .npz file ({error}). Write one with numpy.savez(path, images=array)."
        ) from error
    if array is None:
        raise ValueError(f"{path} has the keys {keys}, but no 'images'. Write it with numpy.savez(path, images=array).")
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"'images' in {path} has shape {array.shape}: it must be (N, H, W) with at least one image.")
    return _to_unit(array, path)[:, None]


def _load_folder(path: Path) -> Tensor:
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in _READERS)
    if not files:
        raise FileNotFoundError(f"No image in the folder {path}: it needs files with {', '.join(sorted(_READERS))}.")
    images = []
    for file in files:
        try:
            images.append(_READERS[file.suffix.lower()](file))
        except ImportError:
            raise
        except Exception as error:  # every reader has its own kinds of error for a broken file
            raise ValueError(f"{file} cannot be read as an image: {error}. Repair or remove it.") from error
        if images[-1].shape != images[0].shape:
            first, other = tuple(images[0].shape), tuple(images[-1].shape)
            raise ValueError(
                f"The images of {path} have different sizes: {files[0].name} is {first}, {file.name} is {other}. "
                "Crop or resize them to one size first."
            )
    return torch.stack(images)[:, None]


def _read_raster(file: Path) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        plain = _PLAIN_MODES.get(image.mode)
        array = np.asarray(image.convert(plain) if plain else image)
    values = _to_unit(array, file)
    return values.mean(dim=2) if values.ndim == 3 else values


def _read_dicom(file: Path) -> Tensor:
    low, high = _HOUNSFIELD
    return (load_dicom(file, apply_rescale=True)[0].clamp(low, high) - low) / (high - low)


def _to_unit(array: np.ndarray, source: Path) -> Tensor:
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        return torch.from_numpy(array.astype(np.float32))
    if np.issubdtype(array.dtype, np.integer):
        return torch.from_numpy((array / np.iinfo(array.dtype).max).astype(np.float32))
    raise ValueError(f"{source} holds values of type {array.dtype}, not grey images.")


_READERS: dict[str, Callable[[Path], Tensor]] = {
    ".png": _read_raster,
    ".tif": _read_raster,
    ".tiff": _read_raster,
    ".dcm": _read_dicom,
}
