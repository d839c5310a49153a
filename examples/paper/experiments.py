r"""
The experiments of the paper: two tasks, their methods and losses
=================================================================

What :mod:`run`, :mod:`search` and :mod:`tables` share. A *cell* is one task, method, loss, scale and seed.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from torch import Tensor, nn

from deepinv_deq import (
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    IterationEquivariance,
    ModularIDHook,
    PipelineEquivariance,
    Solver,
)
from deepinv_deq.datasets import load_images
from deepinv_deq.losses import BicubicRotate, ContractionLoss, RampFilteredError, TurnedOperatorLoss
from deepinv_deq.physics import SparseLinearPhysics

HERE = Path(__file__).parent
TASKS = ("ct", "mri")
METHODS = ("deq-id", "deq-jfb", "unet", "unrolled-1", "unrolled-3", "unrolled-5", "unrolled-7", "denoiser")
LOSSES = ("sup", "ei", "ei-sure", "ei-fixed", "ei-turned", "split", "none")
FIXED = ("ei-fixed", "ei-turned")  # equivariant imaging whose target is fixed
BEST = {"ct": "ei-turned", "mri": "ei-fixed"}  # of those that need no ground truth, on validation images
NOISE = 0.05  # standard deviation in k-space, section 4.1.2

# paper's size, but for MRI, whose images here have 256 pixels and not 320; and one that two CPU cores can train
EPOCHS = dict.fromkeys(("deq", "unet", "unrolled"), 200)
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "ct": {"size": 128, "views": 50, "channels": (64, 128, 256), "batch": 4, "epochs": EPOCHS},
        "mri": {"size": 256, "acceleration": 8, "channels": (64, 128, 256), "batch": 4, "epochs": EPOCHS},
    },
    # unrolled networks train for at least as many epochs as DEQs, the U-Net for more: each in ten minutes
    "small": {
        "ct": {
            "size": 64,
            "views": 30,
            "channels": (16, 32, 64),
            "batch": 2,
            "epochs": {"deq": 6, "unet": 80, "unrolled": 12},
        },
        "mri": {
            "size": 96,
            "acceleration": 8,
            "channels": (16, 32, 64),
            "batch": 2,
            "epochs": {"deq": 5, "unet": 30, "unrolled": 5},
        },
    },
}
FILES = {"ct": "ct100_128.npz", "mri": "cardiac_mr_256.npz"}
SOURCES = {
    "ct": "The 100 CT slices of deepinv's CT100 come from the TCGA-LUAD collection of The Cancer Imaging Archive.",
    "mri": "Use the MR slices of Deep ADMM-Net (NIPS 2016), or a folder of fastMRI .h5 files (fastmri.med.nyu.edu).",
}
SHIPPED = {1: "gray", 2: "complex"}  # denoisers of 16-32-64 feature maps


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


def make_task(name: str, scale: str, data: Path, *, validate: bool = False, device: str = "cpu") -> Task:
    r"""Load the images and measure them.

    :param str name: ``"ct"`` or ``"mri"``.
    :param str scale: ``"small"`` or ``"full"``.
    :param Path data: folder with the ``.npz`` files of :data:`FILES`; for MRI, a folder with fastMRI's ``.h5`` files will do.
    :param bool validate: hold out the last ninth of the training images in the place of the test images.
    :raises FileNotFoundError: if there are no images.
    """
    s = SCALES[scale][name]
    images = _fastmri(data, s["size"]) if name == "mri" and list(data.glob("*.h5")) else _images(name, data, s["size"])
    n_test = len(images) // 10
    stop = len(images) - n_test
    train, test = slice(0, stop), slice(stop, len(images))
    if validate:
        train, test = slice(0, stop - n_test), slice(stop - n_test, stop)
    rng = torch.Generator().manual_seed(0)  # mask and noise are the same for all cells
    if name == "ct":
        physics, sqnorm = tomography(s["size"], s["views"], device=device)
        x = images.to(device)
        with torch.no_grad():
            y = physics.A(x)
    else:
        shape = (s["size"], s["size"])
        mask = dinv.physics.generator.GaussianMaskGenerator(shape, acceleration=s["acceleration"], rng=rng).step()
        noise = dinv.physics.GaussianNoise(NOISE, rng=torch.Generator(device).manual_seed(0))
        physics = dinv.physics.MRI(mask=mask["mask"], img_size=(2, *shape), noise_model=noise, device=device)
        sqnorm, x = 1.0, images.to(device)
        x = x if x.shape[1] == 2 else torch.cat([x, torch.zeros_like(x)], dim=1)
        with torch.no_grad():
            y = physics(x)
    return Task(name, physics, sqnorm, x, y, train, test, s)


def tomography(size: int, views: int, *, turn: float = 0.0, device: Any = "cpu") -> tuple[Any, float]:
    r"""The normalised operator of CT, and the square of the norm that it was divided by.

    :param float turn: by how many degrees the views are turned.
    """
    angles = torch.arange(views) * (180 / views) + turn
    original = dinv.physics.Tomography(
        angles=angles, img_width=size, normalize=True, adjoint_via_backprop=True, device=device
    )
    on_cpu = torch.device(device).type == "cpu"
    physics = SparseLinearPhysics.from_physics(original, (1, size, size)) if on_cpu else original
    return physics, float(original.operator_norm) ** 2


def _images(name: str, data: Path, size: int) -> Tensor:
    path = data / FILES[name] if data.is_dir() else data
    try:
        return load_images(path, size)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {SOURCES[name]} --data takes the folder of {FILES[name]}.") from error


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


def metrics(task: Task) -> dict[str, Any]:
    r"""What images are measured by, all of the magnitude for MRI: PSNR, SSIM, and equivariance (Tables 2 and 3)."""
    options = {"complex_abs": True} if task.name == "mri" else {}
    return {
        "psnr": dinv.metric.PSNR(**options),
        "ssim": dinv.metric.SSIM(**options),
        "pipeline_equivariance": PipelineEquivariance(**options),
        "iteration_equivariance": IterationEquivariance(**options),
    }


def settings_of(task: str, method: str, loss: str, scale: str, found: dict[str, Any]) -> dict[str, Any]:
    r"""Hyperparameters of a cell: the defaults, what the search found for it, and the sizes of the scale."""
    s = dict(SCALES[scale][task])
    s |= {"lr": 3e-4, "alpha": 100.0 if task == "ct" else 1.0, "n_trans": 1}
    s |= {"stepsize": 1 / 51, "data_weight": 50.0} if task == "ct" else {"stepsize": 1.0, "data_weight": 1.0}
    # Tolerances are relative errors in units of the image (while training, and in tests), and of the cotangent. The last three belong to DEQs: the largest norm
    # of the contractive part that costs nothing, the weight of the penalty, and whether the network sees the linear reconstruction.
    s |= (
        {"forward_tol": 1e-4, "test_tol": 2e-5, "backward_tol": 3e-2}
        if task == "ct"
        else {"forward_tol": 1e-3, "test_tol": 2e-4, "backward_tol": 3e-2}
    )
    s |= (
        {"bound": 0.85, "contraction_weight": 0.1, "context": True}
        if task == "ct"
        else {"bound": 0.75, "contraction_weight": 1.0, "context": True}
    )
    # Gradients are clipped to this norm. The search also asks for 1e-6: then all have the same one, and the few that are a hundred
    # times the others decide nothing. It is needed where one hidden view measures an image, noisily.
    s |= {"max_iter": 80, "grad_clip": 3e-3 if loss == "split" else 1.0}
    s |= {"alpha": 1.0} if loss in FIXED else {}  # both their terms are errors of images
    if method.startswith("unrolled"):
        s |= {"stepsize": 1.0, "data_weight": 1.0}  # a few steps must get somewhere; deepinv trains the stepsize
    s["epochs"] = s["epochs"].get(method.split("-")[0], 0)
    if method == "denoiser":
        s |= {"iterations": 30}
    return s | found.get(scale, {}).get(task, {}).get(family(method), {}).get(loss, {})


def family(method: str) -> str:
    r"""Methods that share hyperparameters: all unrolled depths do, ID and JFB do not."""
    return "unrolled" if method.startswith("unrolled") else method


class Refinement(dinv.models.Reconstructor):
    r"""A network after the fast linear reconstruction, :math:`D_\theta(A^\dagger y)` (section 4.2.3)."""

    def __init__(self, denoiser: nn.Module, start: Callable[..., Tensor]):
        super().__init__()
        self.denoiser, self.start = denoiser, start

    def forward(self, y: Tensor, physics: Any, **kwargs: Any) -> Tensor:
        return self.denoiser(self.start(y, physics))


def start(y: Tensor, physics: Any) -> Tensor:
    r"""Where every method starts: filtered back-projection, or the zero-filled image. Differentiable in ``y``."""
    return physics.fbp(y) if hasattr(physics, "fbp") else physics.A_adjoint(y)


def make_model(task: Task, method: str, s: dict[str, Any], weights: dict[str, str]) -> nn.Module:
    r"""Build a method.

    :param dict s: hyperparameters, see :func:`settings_of`.
    :param dict weights: files of the pretrained ``"unet"`` and ``"dncnn"``.
    """
    w, eta = s["data_weight"], s["stepsize"]
    grad = task.name == "ct"
    kind = dinv.optim.GD if grad else dinv.optim.PGD
    prior = dinv.optim.RED if grad else dinv.optim.PnP
    if method == "denoiser":  # PnP for MRI, RED for CT, section 4.2.4
        state = torch.load(weights["dncnn"], map_location="cpu", weights_only=True)
        net = dinv.models.DnCNN(**state["settings"], pretrained=None).eval()
        net.load_state_dict(state["state_dict"])
        return kind(
            prior=prior(_WithoutSigma(net)),
            data_fidelity=dinv.optim.L2(sigma=w**-0.5),
            stepsize=eta,
            lambda_reg=1.0,
            max_iter=s["iterations"],
            early_stop=True,
            thres_conv=1e-5,
            custom_init=start,
        )
    denoiser = EquilibriumUNet(task.channels, pretrained=weights["unet"])
    if method == "unet":
        return Refinement(denoiser, start)
    if method.startswith("unrolled"):
        return kind(
            prior=prior(_WithoutSigma(denoiser)),
            data_fidelity=dinv.optim.L2(sigma=w**-0.5),
            stepsize=eta,
            lambda_reg=1.0,
            max_iter=int(method.split("-")[1]),
            unfold=True,
            trainable_params=["stepsize"],
            custom_init=start,
        )
    if s["context"]:
        denoiser = EquilibriumUNet(task.channels, pretrained=weights["unet"], context_channels=task.channels)
    iteration = (DEGrad if grad else DEProx)(denoiser, stepsize=eta, data_weight=w)
    return DEQReconstructor(
        iteration,
        solver=Solver("anderson", max_iter=s["max_iter"], tol=s["forward_tol"], history=8, on_failure="ignore"),
        hook=ModularIDHook(
            Solver("gmres", max_iter=s["max_iter"], tol=s["backward_tol"], on_failure="ignore"),
            mode="implicit" if method == "deq-id" else "jfb",
        ),
    )


class _WithoutSigma(nn.Module):
    r"""deepinv hands every denoiser a noise level; these are blind."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Any = None, **kwargs: Any) -> Tensor:
        return self.denoiser(x)


class LeaveOneViewOut(dinv.physics.generator.PhysicsGenerator):
    r"""Masks of sinograms ``(1, detectors, views)`` that hide one random view of each sample."""

    def __init__(self, img_size: tuple[int, ...], rng: torch.Generator):
        super().__init__(rng=rng, device=rng.device)
        self.img_size = img_size

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        r"""Draw the masks.

        :param int batch_size: number of samples.
        :param int seed: seed, if the generator is to start anew.
        :return: ``mask`` of shape ``(B, 1, detectors, views)``.
        """
        self.rng_manual_seed(seed)
        mask = torch.ones(batch_size, *self.img_size, device=self.rng.device)
        hidden = torch.randint(self.img_size[-1], (batch_size,), generator=self.rng, device=self.rng.device)
        mask[torch.arange(batch_size, device=mask.device), ..., hidden] = 0.0
        return {"mask": mask}


def turned_operators(task: Task) -> list[Any]:
    r"""The operator of CT turned by 1, 2, ... degrees, up to the next view: by more, it would measure the same views again."""
    size, views = task.settings["size"], task.settings["views"]
    degrees = range(1, math.ceil(180 / views))
    return [tomography(size, views, turn=float(turn), device=task.x.device)[0] for turn in degrees]


def make_losses(task: Task, method: str, loss: str, s: dict[str, Any], seed: int) -> list[Any]:
    r"""The losses a cell is trained with; those of a DEQ end with the penalty that keeps its fixed point unique."""
    losses = data_losses(task, loss, s, seed)
    if method.startswith("deq") and s["contraction_weight"]:
        rng = torch.Generator().manual_seed(seed)
        losses.append(ContractionLoss(s["bound"], weight=s["contraction_weight"], rng=rng))
    return losses


def data_losses(task: Task, loss: str, s: dict[str, Any], seed: int) -> list[Any]:
    r"""The losses that fit the data.

    - ``"sup"``: supervised;
    - ``"ei"``: equivariant imaging, eq. (3);
    - ``"ei-sure"``: with the noise taken out of its first term by SURE;
    - ``"ei-fixed"``: with the rotated reconstruction as a fixed target, so that it does not lose what is hard to reconstruct only
      because that is hard, rotated by bicubic interpolation; with SURE where there is noise, else with the error of views told as
      one of images;
    - ``"ei-turned"``: with the operator turned in the place of the image, see :class:`TurnedOperatorLoss`;
    - ``"split"``: a view that the model was not given is predicted from the others.
    """
    if loss == "sup":
        return [dinv.loss.SupLoss()]
    if loss == "split":
        mask_generator = LeaveOneViewOut(tuple(task.y.shape[1:]), torch.Generator(task.x.device).manual_seed(seed))
        return [
            dinv.loss.SplittingLoss(
                RampFilteredError(task.physics, tuple(task.x.shape[1:]), device=task.x.device),
                mask_generator=mask_generator,
                eval_split_input=False,
            )
        ]
    # the paper's weight belongs to an operator that is not normalised, whose squared error is |A|^2 times ours
    consistency, weight = dinv.loss.MCLoss(), s["alpha"] / task.sqnorm
    fixed = loss in FIXED
    if loss == "ei-sure" or (fixed and task.name == "mri"):
        rng = torch.Generator(task.x.device).manual_seed(seed)
        consistency = dinv.loss.SureGaussianLoss(sigma=NOISE, tau=s.get("tau", 0.05), rng=rng)
    elif fixed:
        consistency, weight = (
            dinv.loss.MCLoss(RampFilteredError(task.physics, tuple(task.x.shape[1:]), device=task.x.device)),
            s["alpha"],
        )
    if loss == "ei-turned":
        return [
            consistency,
            TurnedOperatorLoss(
                turned_operators(task), weight=weight, apply_noise=True, rng=torch.Generator().manual_seed(seed)
            ),
        ]
    rng = torch.Generator(task.x.device).manual_seed(seed)
    group = {"n_trans": s["n_trans"], "multiples": 1, "positive": True, "rng": rng}
    rotations = BicubicRotate(**group) if fixed else dinv.transform.Rotate(**group, interpolation_mode="bilinear")
    return [consistency, dinv.loss.EILoss(rotations, weight=weight, no_grad=fixed)]


def check_name(what: str, name: str, valid: Iterable[str]) -> None:
    r"""Stop with the valid names where one is unknown."""
    if name not in valid:
        sys.exit(f"error: unknown {what} {name!r}: must be one of {', '.join(valid)}.")


def check(task: str, method: str, loss: str, scale: str) -> None:
    r"""Stop where a name is unknown, or a combination makes no sense."""
    check_name("task", task, TASKS)
    check_name("method", method, METHODS)
    check_name("loss", loss, LOSSES)
    check_name("scale", scale, SCALES)
    if (method == "denoiser") != (loss == "none"):
        sys.exit(
            "error: --method denoiser is not trained and goes with --loss none, the other methods with any other loss."
        )
    if loss == "split" and task != "ct":
        sys.exit("error: --loss split leaves out views of a sinogram: it is for ct.")
    if loss == "ei-turned" and task != "ct":
        sys.exit("error: --loss ei-turned turns the views of a sinogram: it is for ct.")
    if loss == "ei-sure" and task != "mri":
        sys.exit("error: --loss ei-sure is for measurements with noise, and those of ct have none: use --loss ei.")
