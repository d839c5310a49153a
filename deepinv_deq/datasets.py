r"""Grey images for the examples: from a file, a folder, or generated."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
import torch
from deepinv.utils import load_dicom
from deepinv.utils.phantoms import generate_random_phantom
from torch import Tensor
from torch.nn.functional import interpolate

# palette indices and transparency are no grey values
_PLAIN_MODES = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBX": "RGB", "CMYK": "RGB", "LA": "L", "La": "L"}
_HOUNSFIELD = (-1000.0, 1000.0)  # air to dense bone: what DICOM slices are clipped to


def load_images(path: str | os.PathLike[str], size: int | None = None, *, max_bytes: int = 4 * 2**30) -> Tensor:
    r"""Read grey images in :math:`[0, 1]`.

    A ``.npz`` file has them under the key ``images``, of shape ``(N, H, W)``; a ``.npy`` file is such an array. A folder has
    one image per PNG, TIFF or DICOM file, in the order of their names; one such file can be given, too. Integers are divided
    by the largest value of their type; DICOM slices are clipped to Hounsfield units in [-1000, 1000]. Colours are averaged.

    :param str, os.PathLike path: file or folder.
    :param int, None size: side to which the central square of each image is resized, by averaging areas; ``None`` keeps all.
    :param int max_bytes: memory that the images may take, 4 GiB by default. A file that asks for more is refused before any
        of it is allocated. A small compressed or forged file can otherwise request unlimited memory.
    :return: tensor of shape ``(N, 1, H, W)``, ``float32``.
    :raises FileNotFoundError: if there is nothing at ``path``, or no image in the folder.
    :raises ValueError: if a file is not an image, is broken, or takes more than ``max_bytes``, the sizes differ, or values are
        outside of [0, 1]; or if ``size`` is not positive.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No data at {path}: give a .npz file with the key 'images', or a folder of images.")
    if size is not None and size < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size}.")
    if path.is_dir():
        images = _load_folder(path, max_bytes, size)
    elif not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder.")
    elif path.suffix.lower() in _READERS:
        images = _load_image(path, max_bytes)[None, None]
    else:
        images = _load_arrays(path, max_bytes)
    _check_range(images, path)
    return images if size is None else _square(images, size)


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


def _load_arrays(path: Path, max_bytes: int) -> Tensor:
    kind = ".npy" if path.suffix.lower() == ".npy" else ".npz"
    write = "numpy.save(path, array)" if kind == ".npy" else "numpy.savez(path, images=array)"
    try:
        if kind == ".npy":
            with open(path, "rb") as file:
                array = _read_array(file, max_bytes)
                if file.read(1):
                    raise ValueError("there is more in it than its header says")
        else:
            with ZipFile(path) as archive:
                keys = [name.removesuffix(".npy") for name in archive.namelist()]
                array = None
                if keys.count("images") > 1:
                    raise ValueError("it has 'images' twice")
                if "images" in keys:
                    with archive.open(archive.namelist()[keys.index("images")]) as file:
                        array = _read_array(file, max_bytes)
                        if file.read(1):  # to the end, where the checksum is verified
                            raise ValueError("there is more in it than its header says")
    except Exception as error:  # a broken file fails in as many ways as there are bytes in it
        raise ValueError(f"{path} is no {kind} file that can be read ({error}). Write one with {write}.") from error
    if array is None:
        raise ValueError(f"{path} has the keys {keys}, but no 'images'. Write it with {write}.")
    if array.ndim != 3 or array.size == 0:
        what = path if kind == ".npy" else f"'images' in {path}"
        raise ValueError(f"{what} has shape {array.shape}: it must be (N, H, W) with at least one image.")
    return _to_unit(array, path)[:, None]


def _read_array(file: IO[bytes], max_bytes: int) -> np.ndarray:
    r"""One array of NumPy's format, after its header was read: no memory is allocated that was not agreed to."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its format has version {version}")
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read: that could run code")
    if any(n < 0 for n in shape):
        raise ValueError(f"its header says that it has shape {shape}")
    numbers = math.prod(shape)
    _check_size(numbers, dtype.itemsize, max_bytes)
    data = file.read(numbers * dtype.itemsize)
    if len(data) != numbers * dtype.itemsize:
        raise ValueError(f"it was cut off: {len(data)} of {numbers * dtype.itemsize} bytes are there")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def _check_size(numbers: int, itemsize: int, max_bytes: int) -> None:
    needed = numbers * max(itemsize, 4)  # they become float32
    if needed > max_bytes:
        raise ValueError(f"it asks for {needed:,} bytes, more than max_bytes={max_bytes:,}")


def _check_range(images: Tensor, source: Path) -> None:
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"The images of {source} have values in [{low:.3g}, {high:.3g}]: scale them to [0, 1].")


def _square(images: Tensor, size: int) -> Tensor:
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    return interpolate(images[..., top : top + side, left : left + side], size=(size, size), mode="area")


def _load_folder(path: Path, max_bytes: int, size: int | None) -> Tensor:
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in _READERS)
    if not files:
        raise FileNotFoundError(f"No image in the folder {path}: it needs files with {', '.join(sorted(_READERS))}.")
    images: list[Tensor] = []
    for file in files:
        images.append(_load_image(file, max_bytes - sum(image.nbytes for image in images)))
        if size is not None:
            _check_range(images[-1], file)  # averages hide values outside of the range
            images[-1] = _square(images[-1][None, None], size)[0, 0]
        if images[-1].shape != images[0].shape:
            first, other = tuple(images[0].shape), tuple(images[-1].shape)
            raise ValueError(
                f"The images of {path} have different sizes: {files[0].name} is {first}, {file.name} is {other}. "
                "Give size=, to which the central square of each is resized."
            )
    return torch.stack(images)[:, None]


def _load_image(file: Path, max_bytes: int) -> Tensor:
    try:
        if not file.is_file():  # a folder, or a pipe that would be waited for
            raise ValueError("it is not a file")
        image = _READERS[file.suffix.lower()](file, max_bytes)
        if image.ndim != 2 or image.numel() == 0:
            raise ValueError(f"it has shape {tuple(image.shape)}, not (H, W)")
        return image
    except ImportError:
        raise
    except Exception as error:  # every reader has its own kinds of error for a broken file
        raise ValueError(f"{file} cannot be read as an image: {error}. Repair or remove it.") from error


def _read_raster(file: Path, max_bytes: int) -> Tensor:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_bytes is the limit
        with Image.open(file) as image:
            image.verify()  # the checksums of a PNG, which are not looked at otherwise
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} frames, of which only one could be used")
            _check_size(image.width * image.height, 4 * len(image.getbands()), max_bytes)
            plain = _PLAIN_MODES.get(image.mode)
            array = np.asarray(image.convert(plain) if plain else image)
    values = _to_unit(array, file)
    return values.mean(dim=2) if values.ndim == 3 else values


def _read_dicom(file: Path, max_bytes: int = 4 * 2**30) -> Tensor:
    from pydicom import dcmread

    header = dcmread(file, stop_before_pixels=True)
    frames, channels = int(getattr(header, "NumberOfFrames", None) or 1), int(getattr(header, "SamplesPerPixel", 1))
    if frames != 1 or channels != 1:
        raise ValueError(f"it has {frames} frames and {channels} channels, not one grey image")
    _check_size(int(header.Rows) * int(header.Columns), 8, max_bytes)  # pydicom rescales in double precision
    low, high = _HOUNSFIELD
    values = load_dicom(file, apply_rescale=True)[0]
    if not bool(torch.isfinite(values).all()):
        raise ValueError("it has values that are NaN or Inf")
    return (values.clamp(low, high) - low) / (high - low)


def _to_unit(array: np.ndarray, source: Path) -> Tensor:
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        return torch.from_numpy(array.astype(np.float32))
    if np.issubdtype(array.dtype, np.integer):
        # in single precision where that holds every value: double precision would take eight times the memory of bytes
        exact = np.float32 if array.dtype.itemsize <= 2 else np.float64
        return torch.from_numpy(np.divide(array, np.iinfo(array.dtype).max, dtype=exact).astype(np.float32, copy=False))
    raise ValueError(f"{source} holds values of type {array.dtype}, not grey images.")


_READERS: dict[str, Callable[[Path, int], Tensor]] = {
    ".png": _read_raster,
    ".tif": _read_raster,
    ".tiff": _read_raster,
    ".dcm": _read_dicom,
}
