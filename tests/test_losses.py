r"""Every loss of deepinv trains a DEQ, and moves its weights as it moves those of a fully unrolled solve."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEGrad, TurnedOperatorLoss
from tests.problems import F64, relative_error
from tests.unrolling import SIZE, Unrolled, denoising, images, inpainting, small_deq, trained

QUARTER_TURNS = {"multiples": 90, "positive": True}


def turn(n_trans=1):
    return dinv.transform.Rotate(n_trans=n_trans, **QUARTER_TURNS)


def splitting():
    return dinv.physics.generator.BernoulliSplittingMaskGenerator(SIZE, split_ratio=0.7)


def new_masks():
    return dinv.physics.generator.BernoulliSplittingMaskGenerator(SIZE, split_ratio=0.6, rng=torch.Generator())


def stacked():
    gaussian, poisson = dinv.physics.GaussianNoise(0.05), dinv.physics.PoissonNoise(0.05)
    return dinv.physics.StackedLinearPhysics([inpainting(1), denoising(poisson), denoising(gaussian)])


LOSSES = {
    "Sup": lambda: dinv.loss.SupLoss(),
    "Sup of several metrics": lambda: dinv.loss.SupLoss(metric=dinv.metric.MAE() + dinv.metric.MSE()),
    "MC": lambda: dinv.loss.MCLoss(),
    "EI": lambda: dinv.loss.EILoss(turn()),
    "EI of two transforms": lambda: dinv.loss.EILoss(turn(2)),
    "EI without gradient of the target": lambda: dinv.loss.EILoss(turn(), no_grad=True, apply_noise=False),
    "MOI of a list": lambda: dinv.loss.MOILoss([inpainting(1), inpainting(2)], rng=torch.Generator().manual_seed(0)),
    "MOI of a generator": lambda: dinv.loss.MOILoss(physics_generator=new_masks()),
    "MOEI": lambda: dinv.loss.MOEILoss(turn(), [inpainting(1), inpainting(2)], rng=torch.Generator().manual_seed(0)),
    "SURE": lambda: dinv.loss.SureGaussianLoss(0.1),
    "UNSURE": lambda: dinv.loss.SureGaussianLoss(0.1, unsure=True, step_size=1.0),
    "R2R": lambda: dinv.loss.R2RLoss(),
    "splitting": lambda: dinv.loss.SplittingLoss(mask_generator=splitting()),
    "equivariant splitting": lambda: dinv.loss.EquivariantSplittingLoss(
        mask_generator=splitting(), transform=turn() * dinv.transform.Reflect(dim=[-1])
    ),
    "equivariant splitting with SURE": lambda: dinv.loss.EquivariantSplittingLoss(
        mask_generator=splitting(), transform=turn(), consistency_loss=dinv.loss.SureGaussianLoss(0.05)
    ),
    "augmentation": lambda: dinv.loss.AugmentConsistencyLoss(T_i=dinv.transform.RandomNoise(), T_e=turn()),
    "TV": lambda: dinv.loss.TVLoss(),
    "random schedule": lambda: dinv.loss.RandomLossScheduler(
        dinv.loss.MCLoss(), dinv.loss.EILoss(turn()), generator=torch.Generator().manual_seed(1)
    ),
    "interleaved schedule": lambda: dinv.loss.InterleavedLossScheduler(dinv.loss.MCLoss(), dinv.loss.TVLoss()),
    "schedule by epoch": lambda: dinv.loss.InterleavedEpochLossScheduler(dinv.loss.R2RLoss(), dinv.loss.EILoss(turn())),
    "schedule of several": lambda: dinv.loss.StepLossScheduler(
        dinv.loss.MCLoss(), dinv.loss.EILoss(turn()), epoch_thresh=0
    ),
}
WITH_OTHER_PHYSICS = {
    "Poisson SURE": (lambda: dinv.loss.SurePoissonLoss(0.05), lambda: denoising(dinv.physics.PoissonNoise(0.05))),
    "Poisson-Gaussian SURE": (
        lambda: dinv.loss.SurePGLoss(0.1, 0.05, second_derivative=True),
        lambda: denoising(dinv.physics.PoissonGaussianNoise(gain=0.05, sigma=0.1)),
    ),
    "Poisson-Gaussian UNSURE": (
        lambda: dinv.loss.SurePGLoss(0.1, 0.05, unsure=True, step_size=(1.0, 1.0)),
        lambda: denoising(dinv.physics.PoissonGaussianNoise(gain=0.05, sigma=0.1)),
    ),
    "R2R of counts": (lambda: dinv.loss.R2RLoss(), lambda: denoising(dinv.physics.PoissonNoise(0.05))),
    "Neighbor2Neighbor": (
        lambda: dinv.loss.Neighbor2Neighbor(),
        lambda: denoising(dinv.physics.GaussianNoise(0.1)),
    ),
    "one loss for each of stacked physics": (
        lambda: dinv.loss.StackedPhysicsLoss(
            [dinv.loss.MCLoss(), dinv.loss.SurePoissonLoss(0.05), dinv.loss.SureGaussianLoss(0.05)]
        ),
        stacked,
    ),
    "reduced resolution": (
        lambda: dinv.loss.ReducedResolutionLoss(),
        lambda: dinv.physics.Downsampling(filter="bilinear", factor=2).to(F64),
    ),
}
ALL = {name: (loss, inpainting) for name, loss in LOSSES.items()} | WITH_OTHER_PHYSICS


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ALL)
def test_weights_move_as_those_of_an_unrolled_solve(name):
    loss, physics = ALL[name]
    epochs = 2 if "schedule" in name or "UNSURE" in name else 1  # what they do changes from one epoch to the next
    model = small_deq()
    ours = trained(copy.deepcopy(model), loss(), physics(), epochs)
    exact = trained(Unrolled(model), loss(), physics(), epochs)
    assert sum(change.norm() for change in exact) > 1e-4
    assert relative_error(ours, exact) <= 1e-8  # contract 1


def test_the_turned_operator_loss_of_complex_images_is_real():
    x, scale = torch.randn(2, 1, 4, 4, dtype=torch.complex128), torch.tensor(0.5, dtype=F64, requires_grad=True)
    loss = TurnedOperatorLoss([dinv.physics.Physics()])(x, physics=None, model=lambda y, physics: scale * y)
    torch.testing.assert_close(loss, 0.25 * x.abs().square().mean(dim=(1, 2, 3)))
    loss.sum().backward()
    torch.testing.assert_close(scale.grad, -x.abs().square().mean(dim=(1, 2, 3)).sum())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["EI", "SURE", "R2R", "splitting", "equivariant splitting"])
def test_de_grad_too(name):
    loss, physics = ALL[name]
    model = small_deq(DEGrad)
    ours = trained(copy.deepcopy(model), loss(), physics())
    exact = trained(Unrolled(model, steps=120), loss(), physics())
    assert sum(change.norm() for change in exact) > 1e-4
    assert relative_error(ours, exact) <= 1e-8


@pytest.mark.parametrize(
    "loss",
    [
        lambda: dinv.loss.R2RLoss(eval_n_samples=2),
        lambda: dinv.loss.SplittingLoss(mask_generator=splitting(), eval_n_samples=2),
        lambda: dinv.loss.SplittingLoss(mask_generator=splitting(), eval_n_samples=2, eval_split_output=True),
        lambda: dinv.loss.EquivariantSplittingLoss(mask_generator=splitting(), eval_n_samples=2, transform=turn(4)),
    ],
)
def test_adapted_models_reconstruct_in_evaluation(loss):
    model, physics = small_deq(), inpainting()
    y = physics(images())
    ours, exact = (loss().adapt_model(m).eval() for m in (model, Unrolled(model)))
    torch.manual_seed(0)
    x_hat = ours(y, physics)
    torch.manual_seed(0)
    torch.testing.assert_close(x_hat, exact(y, physics))
    assert not x_hat.requires_grad and x_hat.shape == y.shape
