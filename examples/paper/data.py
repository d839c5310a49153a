r"""
The two tasks: images, operators and measurements
=================================================

A *cell* is one task, method, loss, scale and seed. This file has the tasks and the scales.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from torch import Tensor, nn

from deepinv_deq import IterationEquivariance, PipelineEquivariance
from deepinv_deq.datasets import ct_slice, load_images, mr_slice
from deepinv_deq.physics import SparseLinearPhysics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = ROOT.parent / "shared" / "data"
TASKS = ("ct", "mri")
NOISE = 0.05  # standard deviation in k-space, section 4.1.2
CHANNELS = (16, 32, 64)

# "paper" has the paper's size on CT, and 256 instead of 320 pixels on MRI, "small" is what two CPU cores train in an hour a task. Epochs are such that a
# supervised DEQ takes 3 minutes ("small") or 20 minutes ("paper") of one core.
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "ct": {
            "size": 64,
            "views": 30,
            "channels": CHANNELS,
            "batch": 2,
            "epochs": {"deq": 6, "unet": 80, "unrolled": 12, "modl": 16, "lpd": 24},
        },
        "mri": {
            "size": 96,
            "acceleration": 8,
            "channels": CHANNELS,
            "batch": 2,
            "epochs": {"deq": 5, "unet": 30, "unrolled": 5, "modl": 10, "varnet": 8},
        },
    },
    "paper": {
        "ct": {
            "size": 128,
            "views": 50,
            "channels": CHANNELS,
            "batch": 2,
            "epochs": {"deq": 6, "unet": 200, "unrolled": 30, "modl": 22, "lpd": 34},
        },
        "mri": {
            "size": 256,
            "acceleration": 8,
            "channels": CHANNELS,
            "batch": 2,
            "epochs": {"deq": 4, "unet": 60, "unrolled": 8, "modl": 12, "varnet": 8},
        },
    },
}
FILES = {"ct": "ct100_128.npz", "mri": "cardiac_mr_256.npz"}
SOURCES = {
    "ct": "The 100 CT slices of deepinv's CT100 come from the TCGA-LUAD collection of The Cancer Imaging Archive.",
    "mri": "Use the MR slices of Deep ADMM-Net (NIPS 2016), or a folder of fastMRI .h5 files (fastmri.med.nyu.edu).",
}
TWINS = {"ct": (98, 99)}  # slices of CT100 that are one image


@dataclass
class Task:
    r"""Operator, images and measurements of one inverse problem, with the split by index."""

    name: str
    physics: Any
    sqnorm: float
    x: Tensor
    y: Tensor
    train: slice
    test: slice
    settings: dict[str, Any]

    @property
    def channels(self) -> int:
        return self.x.shape[1]


def make_task(
    name: str,
    scale: str,
    data: Path,
    *,
    validate: bool = False,
    device: str = "cpu",
    other: dict[str, Any] | None = None,
) -> Task:
    r"""Load the images and measure them.

    :param str name: ``"ct"`` or ``"mri"``.
    :param str scale: a key of :data:`SCALES`.
    :param Path data: folder with the ``.npz`` files of :data:`FILES`; for MRI, a folder with fastMRI's ``.h5`` files will do.
    :param bool validate: hold out the last ninth of the training images in the place of the test images.
    :param dict other: settings in the place of those of the scale: ``size``, ``views``, ``acceleration``, or ``file`` for other images.
    :raises FileNotFoundError: if there are no images.
    """
    s = SCALES[scale][name] | (other or {})
    fastmri = name == "mri" and "file" not in s and list(data.glob("*.h5"))
    images = _fastmri(data, s["size"]) if fastmri else _images(name, data, s["size"], s.get("file", FILES[name]))
    n_test = len(images) // 10
    stop = len(images) - n_test
    train, test = slice(0, stop), slice(stop, len(images))
    if validate:
        train, test = slice(0, stop - n_test), slice(stop - n_test, stop)
    if name == "ct":
        physics, sqnorm = tomography(s["size"], s["views"], device=device)
        x = images.to(device)
        with torch.no_grad():
            y = physics.A(x)
    else:
        shape = (s["size"], s["size"])
        rng = torch.Generator().manual_seed(0)
        mask = mask_generator(s["size"], s["acceleration"], rng).step()["mask"]

        def operator(on: str, seed: int) -> Any:
            noise = dinv.physics.GaussianNoise(NOISE, rng=torch.Generator(on).manual_seed(seed))
            return dinv.physics.MRI(mask=mask.to(on), img_size=(2, *shape), noise_model=noise, device=on)

        # measured on the CPU: mask and noise are the same for all cells, whatever they are trained on
        measured = operator("cpu", 0)
        x = images if images.shape[1] == 2 else torch.cat([images, torch.zeros_like(images)], dim=1)
        with torch.no_grad():
            x, y = x.to(device), measured(x).to(device)
        sqnorm, physics = 1.0, measured if torch.device(device).type == "cpu" else operator(device, 1)
    return Task(name, physics, sqnorm, x, y, train, test, s)


def shipped_slice(task: Task) -> tuple[Tensor, Tensor]:
    r"""An image that comes with pydicom (a vertebra) or Matplotlib (a head), of the size of the task's own, and its measurements."""
    size = task.x.shape[-1]
    if task.name == "ct":
        x = ct_slice(size)
    else:
        magnitude = nn.functional.interpolate(mr_slice(), size=(size, size), mode="area")
        x = torch.cat([magnitude, torch.zeros_like(magnitude)], dim=1)
    with torch.no_grad():
        return x, task.physics(x)


def mask_generator(size: int, acceleration: float, rng: torch.Generator) -> Any:
    r"""Random masks of MRI: full lines, the low frequencies more densely."""
    shape = (size, size)
    return dinv.physics.generator.GaussianMaskGenerator(shape, acceleration=acceleration, rng=rng, device=rng.device)


def tomography(size: int, views: int, *, turn: float = 0.0, device: Any = "cpu") -> tuple[Any, float]:
    r"""The normalised operator of CT, and the square of the norm that it was divided by.

    :param float turn: by how many degrees the views are turned.
    """
    angles = torch.arange(views) * (180 / views) + turn
    original = dinv.physics.Tomography(angles=angles, img_width=size, normalize=True, adjoint_via_backprop=True)
    physics = SparseLinearPhysics.from_physics(original, (1, size, size)).to(device)
    return physics, float(original.operator_norm) ** 2


def turned_operators(task: Task) -> list[Any]:
    r"""The operator of CT turned by 1, 2, ... degrees, up to the next view: by more, it would measure the same views again."""
    size, views = task.settings["size"], task.settings["views"]
    degrees = range(1, math.ceil(180 / views))
    return [tomography(size, views, turn=float(turn), device=task.x.device)[0] for turn in degrees]


class ExactPSNR(dinv.metric.PSNR):
    r"""PSNR without the 1e-8 that deepinv adds to the mean squared error: not limited to 80 dB."""

    def metric(self, x_net: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        r"""Compute the PSNR of every image, in dB."""
        error = (x_net.double() - x.double()).square().flatten(1).mean(dim=1)
        return -10 * torch.log10(error.clamp_min(torch.finfo(error.dtype).tiny))


class ExactPipelineEquivariance(PipelineEquivariance, ExactPSNR):
    r"""Equivariance of the pipeline (Table 2), not limited to 80 dB."""


class ExactIterationEquivariance(IterationEquivariance, ExactPSNR):
    r"""Equivariance of F (Table 3), not limited to 80 dB."""


def metrics(task: Task) -> dict[str, Any]:
    r"""What images are measured by, all of the magnitude for MRI: PSNR, SSIM, and equivariance (Tables 2 and 3)."""
    options = {"complex_abs": True} if task.name == "mri" else {}
    return {
        "psnr": dinv.metric.PSNR(**options),
        "ssim": dinv.metric.SSIM(**options),
        "exact_psnr": ExactPSNR(**options),
        "pipeline_equivariance": ExactPipelineEquivariance(**options),
        "iteration_equivariance": ExactIterationEquivariance(**options),
    }


def _images(name: str, data: Path, size: int, file: str) -> Tensor:
    path = data / file if data.is_dir() else data
    try:
        return load_images(path, size)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {SOURCES[name]} --data takes the folder of {file}.") from error


def _fastmri(folder: Path, size: int) -> Tensor:
    r"""The magnitude images of a fastMRI folder, cut to a central square, each scaled to a largest value of 1."""
    dataset = dinv.datasets.FastMRISliceDataset(root=folder, slice_index="middle")
    out = []
    for i in range(len(dataset)):
        target = dataset[i][0][None]
        side = min(target.shape[-2:])
        top, left = (target.shape[-2] - side) // 2, (target.shape[-1] - side) // 2
        square = target[..., top : top + side, left : left + side]
        out.append(nn.functional.interpolate(square / square.max(), size=(size, size), mode="area"))
    return torch.cat(out)
