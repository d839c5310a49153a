r"""
The losses: with and without ground truth
=========================================

:data:`LOSSES` has one line for each loss. A new loss is a function that builds it, and such a line.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import deepinv as dinv
import torch
from data import NOISE, TASKS, Task, mask_generator, turned_operators
from deepinv.physics.generator import GaussianSplittingMaskGenerator, MultiplicativeSplittingMaskGenerator
from models import METHODS
from torch import Tensor

from deepinv_deq.losses import BicubicRotate, ContractionLoss, RampFilteredError, TurnedOperatorLoss


@dataclass(frozen=True)
class Loss:
    r"""A loss of the tables.

    - ``build``: function of the task, the hyperparameters and the seed; ``None`` where nothing is trained.
    - ``defaults``: hyperparameters before any search that differ from those of the task.
    - ``weighted``: whether the search varies the weight ``alpha`` of a second term, and by which factors.
    - ``of_images``: whether ``alpha`` weighs an error of images.
    - ``of_measurements``: whether errors are those of measurements by an operator of norm 1, not brought to the scale of images.
    - ``excludes``: methods that the loss does not work with, and why.
    """

    title: str
    build: Callable[[Task, dict[str, Any], int], list[Any]] | None
    tasks: tuple[str, ...] = TASKS
    defaults: dict[str, Any] = field(default_factory=dict)
    weighted: tuple[float, ...] = ()
    of_images: bool = False
    of_measurements: bool = False
    excludes: dict[str, str] = field(default_factory=dict)


def make_losses(task: Task, method: str, loss: str, s: dict[str, Any], seed: int) -> list[Any]:
    r"""The losses a cell is trained with; those of a DEQ end with the penalty that keeps its fixed point unique."""
    build = LOSSES[loss].build
    losses = [] if build is None else build(task, s, seed)
    if METHODS[method].is_deq and s["contraction_weight"]:
        weight = s["contraction_weight"] * image_weight(task, loss, s)
        # a Jacobian-free gradient is that of one step, which has the size of the stepsize; that of the penalty is exact
        weight *= s["stepsize"] if METHODS[method].jacobian_free else 1.0
        options = {"rng": torch.Generator().manual_seed(seed), "probability": s.get("contraction_probability", 1.0)}
        losses.append(ContractionLoss(s["bound"], weight=weight, **options))
    return losses


def image_weight(task: Task, loss: str, s: dict[str, Any]) -> float:
    r"""The weight of an error of images in a loss. That of the penalty is proportional to it, so its share is the same in all losses."""
    weight = max(1.0, s["alpha"]) if LOSSES[loss].of_images or LOSSES[loss].of_measurements else 1.0
    return weight / task.sqnorm if LOSSES[loss].of_measurements else weight


def _supervised(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    return [dinv.loss.SupLoss()]


def _ei(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""Equivariant imaging, eq. (3). The paper's weight belongs to an operator that is not normalised, whose squared error is
    the squared norm times ours."""
    rotations = dinv.transform.Rotate(**_group(task, s, seed), interpolation_mode="bilinear")
    return [dinv.loss.MCLoss(), dinv.loss.EILoss(rotations, weight=s["alpha"] / task.sqnorm)]


def _ei_sure(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""EI whose first term does not fit the noise."""
    return [_without_noise(task, s, seed), _ei(task, s, seed)[1]]


def _ei_fixed(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""EI whose rotated reconstruction is a fixed target, rotated by bicubic interpolation."""
    rotations = BicubicRotate(**_group(task, s, seed))
    return [_without_noise(task, s, seed), dinv.loss.EILoss(rotations, weight=_weight(task, s), no_grad=True)]


def _ei_turned(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""EI with the operator turned in the place of the image; the second reconstruction must agree with the measurements, too."""
    operators, error = turned_operators(task), _image_error(task)
    turned = TurnedOperatorLoss(operators, weight=s["alpha"], consistency=error, rng=_rng("cpu", seed))
    return [_without_noise(task, s, seed), turned]


def _moi(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""deepinv's multi-operator imaging (Tachella et al. 2022) with the same turned operators: its target is not fixed."""
    moi = dinv.loss.MOILoss(turned_operators(task), weight=s["alpha"], rng=_rng("cpu", seed))
    return [_without_noise(task, s, seed), moi]


def _hidden_views(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""A view that the model was not given is predicted from the others."""
    masks = HiddenViews(tuple(task.y.shape[1:]), 1, _rng(task.x.device, seed))
    return [dinv.loss.SplittingLoss(_image_error(task), mask_generator=masks, eval_split_input=False)]


def _selfdeq(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""Measurement splitting as in SelfDEQ (Gan et al. 2023): a DEQ that is given one part of the measurements predicts the other,
    with weights that make up for how often each frequency is measured. CT: half of the views, with the ramp filter as the weight.
    MRI: half of the lines, with the weights of deepinv's ``WeightedSplittingLoss`` (Millard and Chiew 2023)."""
    if task.name == "ct":
        masks = HiddenViews(tuple(task.y.shape[1:]), task.y.shape[-1] // 2, _rng(task.x.device, seed))
        return [dinv.loss.SplittingLoss(_image_error(task), mask_generator=masks, eval_split_input=False)]
    size, rng = task.settings["size"], _rng(task.x.device, seed)
    halves = MultiplicativeSplittingMaskGenerator(tuple(task.x.shape[1:]), mask_generator(size, 2, rng), task.x.device)
    measured = mask_generator(size, task.settings["acceleration"], _rng(task.x.device, seed))
    return [dinv.loss.mri.WeightedSplittingLoss(halves, measured)]


def _equivariant_splitting(task: Task, s: dict[str, Any], seed: int) -> list[Any]:
    r"""deepinv's ``EquivariantSplittingLoss`` (Sechaud et al. 2026). A tenth of the measurements is hidden. With noise, only its
    prediction term is used: of the consistency terms that do not fit the noise, SURE draws another split for its second reconstruction, and
    ``R2RLoss`` does not pass on which split was drawn (deepinv 0.5.0). Tests give the model all measurements, as for all losses."""
    rng, shape = _rng(task.x.device, seed), tuple(task.y.shape[1:])
    if task.name == "ct":
        masks: Any = HiddenViews(shape, max(1, shape[-1] // 10), rng)
        error = dinv.loss.MCLoss(_image_error(task))
        consistency, group = error, BicubicRotate(**_group(task, s, seed))
    else:
        centre = max(1, task.settings["size"] // 24)
        masks = GaussianSplittingMaskGenerator(shape, 0.9, center_block=centre, device=task.x.device, rng=rng)
        error = dinv.loss.MCLoss()
        consistency = NoConsistency()
        group = dinv.transform.Rotate(n_trans=1, multiples=90, positive=True, rng=_rng(task.x.device, seed))
    return [
        dinv.loss.EquivariantSplittingLoss(
            mask_generator=masks, consistency_loss=consistency, prediction_loss=error, transform=group, eval_n_samples=1
        )
    ]


def _rng(device: Any, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _group(task: Task, s: dict[str, Any], seed: int) -> dict[str, Any]:
    r"""Rotations by whole degrees."""
    return {"n_trans": s["n_trans"], "multiples": 1, "positive": True, "rng": _rng(task.x.device, seed)}


def _image_error(task: Task) -> RampFilteredError:
    return RampFilteredError(task.physics, tuple(task.x.shape[1:]), device=task.x.device)


def _without_noise(task: Task, s: dict[str, Any], seed: int) -> Any:
    r"""The first term of the losses with a fixed target: SURE where there is noise, else the error of views as one of images."""
    if task.name == "mri":
        return dinv.loss.SureGaussianLoss(sigma=NOISE, tau=s.get("tau", 0.05), rng=_rng(task.x.device, seed))
    return dinv.loss.MCLoss(_image_error(task))


def _weight(task: Task, s: dict[str, Any]) -> float:
    return s["alpha"] if task.name == "ct" else s["alpha"] / task.sqnorm


class NoConsistency(dinv.loss.Loss):
    r"""A consistency term that is zero."""

    def forward(self, x_net: Tensor, **kwargs: Any) -> Tensor:
        return x_net.new_zeros(())


class HiddenViews(dinv.physics.generator.PhysicsGenerator):
    r"""Masks of sinograms ``(1, detectors, views)`` that hide ``count`` random views of each sample."""

    def __init__(self, img_size: tuple[int, ...], count: int, rng: torch.Generator):
        super().__init__(rng=rng, device=rng.device)
        self.img_size, self.count = img_size, count

    def step(self, batch_size: int = 1, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        r"""Draw the masks.

        :param int batch_size: number of samples.
        :param int seed: seed, if the generator is to start anew.
        :return: ``mask`` of shape ``(B, 1, detectors, views)``.
        """
        self.rng_manual_seed(seed)
        order = torch.rand(batch_size, self.img_size[-1], generator=self.rng, device=self.rng.device)
        shown = order.argsort(dim=1).argsort(dim=1) >= self.count
        return {"mask": shown.float()[:, None, None].expand(batch_size, *self.img_size).clone()}


_NEEDS_MASK = {"varnet": "VarNet reads the mask of the operator, and the rotated operator of this loss has none"}
LOSSES = {
    "sup": Loss("supervised", _supervised),
    # reconstructions that may follow the loss collapse at larger weights
    "ei": Loss("EI", _ei, weighted=(0.3, 1.0, 3.0), of_measurements=True),
    "ei-sure": Loss("EI + SURE", _ei_sure, ("mri",), weighted=(0.3, 1.0, 3.0), of_measurements=True),
    "ei-fixed": Loss("EI, fixed targets", _ei_fixed, defaults={"alpha": 1.0}, weighted=(1.0, 10.0), of_images=True),
    "ei-turned": Loss("EI, turned operator", _ei_turned, ("ct",), {"alpha": 1.0}, (1.0, 10.0), of_images=True),
    "moi": Loss("multi-operator imaging", _moi, ("ct",), {"alpha": 1.0}, (0.3, 1.0, 3.0), of_images=True),
    # one hidden view measures an image noisily, so most gradients are clipped
    "split": Loss("hidden views", _hidden_views, ("ct",), {"grad_clip": 3e-3}),
    "es": Loss("equivariant splitting", _equivariant_splitting, excludes=_NEEDS_MASK),
    "selfdeq": Loss("SelfDEQ splitting", _selfdeq),
    "none": Loss("none", None),
}
BEST = {"ct": "ei-turned", "mri": "ei-fixed"}  # of those without ground truth, on validation images
