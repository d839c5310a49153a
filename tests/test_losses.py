r"""Every loss of deepinv trains a DEQ, and moves its weights as it moves those of a fully unrolled solve."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch
from deepinv.datasets import TensorDataset
from torch import nn
from torch.utils.data import DataLoader

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver
from tests.problems import F64, TEMPLATES, imaging, relative_error, unrolled

SIZE = (1, 8, 8)
QUARTER_TURNS = {"multiples": 90, "positive": True}


class Contracting(EquilibriumUNet):
    r"""A U-Net that says something from the start, and pulls points together."""

    def __init__(self):
        super().__init__(1, channels=(2, 4))
        nn.init.normal_(self.Conv_1x1.weight, std=0.01)

    def forward(self, x, sigma=None, **kwargs):
        return 0.4 * super().forward(x)


class Unrolled(dinv.models.Reconstructor):
    r"""The fixed point of a DEQ by plain iteration under autograd, with the DEQ's own weights."""

    def __init__(self, model, steps=45):
        super().__init__()
        self.model, self.steps = model, steps

    @property
    def iteration(self):
        return self.model.iteration

    def forward(self, y, physics, **kwargs):
        return unrolled(self.model, y, physics, self.steps)


def small_deq(template=DEProx):
    torch.manual_seed(1)
    return DEQReconstructor(
        template(Contracting(), stepsize=0.7),
        solver=Solver("anderson", max_iter=200, tol=1e-13),
        hook=ModularIDHook(Solver("gmres", max_iter=100, tol=1e-13)),
    ).to(F64)


def images(n=2):
    return torch.rand(n, *SIZE, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.1


def mask(seed=0):
    return (torch.rand(1, *SIZE[1:], generator=torch.Generator().manual_seed(seed)) > 0.3).to(F64)


def inpainting(seed=0):
    return dinv.physics.Inpainting(SIZE, mask=mask(seed), noise_model=dinv.physics.GaussianNoise(0.05))


def denoising(noise):
    return dinv.physics.Denoising(noise)


def trained(model, loss, physics, epochs=1):
    r"""How deepinv's Trainer moves the weights of a model, with the same random numbers every time."""
    torch.manual_seed(0)
    before = [p.detach().clone() for p in model.parameters()]
    dinv.Trainer(
        model,
        physics,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(TensorDataset(x=images(), use_dict_output=True), batch_size=2),
        online_measurements=True,
        losses=[loss],
        metrics=[],
        epochs=epochs,
        device="cpu",
        save_path=None,
        verbose=False,
        show_progress_bar=False,
    ).train()
    return [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]


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


# Norms of Jacobians ------------------------------------------------------------------------------------------------


def norm_of_iteration(model, x_hat, y, physics, steps=40):
    r"""How much one step of the iteration can pull two points near the reconstruction apart."""
    f = model.iteration.bind(y, physics)
    return dinv.loss.JacobianSpectralNorm(max_iter=steps)(f(x_hat), x_hat)


def norm_of_denoiser(model, x_hat, y, physics):
    return dinv.loss.JacobianSpectralNorm(max_iter=40)(model.iteration.denoise(x_hat), x_hat)


def firm_norm_of_denoiser(model, x_hat, y, physics):
    return dinv.loss.FNEJacobianSpectralNorm(max_iter=40)(x_hat, None, model.iteration.denoise)


@pytest.mark.parametrize("penalty", [norm_of_iteration, norm_of_denoiser, firm_norm_of_denoiser])
@pytest.mark.parametrize("through", [True, False])
def test_the_norm_of_a_jacobian_at_the_fixed_point_is_a_penalty(penalty, through):
    model, physics, _, y = imaging()

    def gradient(reconstruct):
        torch.manual_seed(0)  # of the power iteration
        x_hat = reconstruct(y, physics)
        x_hat = x_hat if through else x_hat.detach().requires_grad_()
        return torch.autograd.grad(penalty(model, x_hat, y, physics), list(model.parameters()), materialize_grads=True)

    exact = gradient(lambda y, physics: unrolled(model, y, physics))
    assert sum(g.norm() for g in exact) > 1e-2
    assert relative_error(gradient(model), exact) <= 1e-8


def test_the_penalty_is_the_norm_of_the_dense_jacobian():
    model, physics, _, y = imaging(batch=1)
    x_hat = model(y, physics).detach().requires_grad_()
    dense = torch.autograd.functional.jacobian(model.iteration.bind(y, physics), x_hat).reshape(16, 16)
    torch.manual_seed(0)
    norm = norm_of_iteration(model, x_hat, y, physics, steps=300)
    assert norm.item() == pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_penalty_trains_with_deepinvs_trainer():
    class Penalty(dinv.loss.Loss):
        def forward(self, x_net, y, physics, model, **kwargs):
            return norm_of_iteration(model, x_net, y, physics)

    model = small_deq()
    ours = trained(copy.deepcopy(model), Penalty(), inpainting())
    exact = trained(Unrolled(model), Penalty(), inpainting())
    assert sum(change.norm() for change in exact) > 1e-4
    assert relative_error(ours, exact) <= 1e-8


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_norm_of_the_jacobian_of_the_whole_reconstruction_is_a_penalty(template):
    model, physics, _, y = imaging(template)

    def penalty(reconstruct):
        torch.manual_seed(0)  # of the power iteration
        measured = y.clone().requires_grad_()
        norm = dinv.loss.JacobianSpectralNorm(max_iter=3)(reconstruct(measured, physics), measured)
        return norm, torch.autograd.grad(norm, list(model.parameters()))

    norm, gradient = penalty(model)
    exact, exact_gradient = penalty(lambda y, physics: unrolled(model, y, physics, 120))
    assert relative_error(norm, exact) <= 1e-8
    assert relative_error(gradient, exact_gradient) <= 1e-8


# Divergences by finite differences ---------------------------------------------------------------------------------


def divergence(model, physics, y, tau, seed=0):
    r"""The part of SURE that divides a difference of two reconstructions by ``tau``."""
    torch.manual_seed(seed)
    y1 = physics.A(model(y, physics))
    return dinv.loss.sure.mc_div(y1, y, model, physics, tau).mean()


def error_of_divergence(template, tau, tol, warm):
    r"""Relative error of its gradient, for solves to ``tol``, from starts that have nothing in common if ``warm``."""
    model, physics, x, y = imaging(template, side=8)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(divergence(lambda y, p: unrolled(model, y, p), physics, y, tau), parameters)
    model = DEQReconstructor(
        model.iteration,
        solver=Solver("anderson", max_iter=200, tol=tol),
        hook=ModularIDHook(Solver("gmres", max_iter=200, tol=tol)),
        warm_starts=2 if warm else 0,
    )
    epochs = [(1.01, 2), (1.01, 1), (1.0, 0)] if warm else [(1.0, 0)]  # scale of the weights, and random numbers
    values = [p.detach().clone() for p in parameters]
    for scale, seed in epochs:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(scale * value)
        loss = divergence(model, physics, y, tau, seed)
    return relative_error(torch.autograd.grad(loss, parameters), exact)


@pytest.mark.parametrize("template", [DEProx, DEGrad])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("tau", [1e-1, 1e-2, 1e-3])
def test_a_divergence_is_as_accurate_as_the_tolerance_is_small_against_its_step(template, tau, warm):
    accuracy = 1e-4
    assert error_of_divergence(template, tau, tol=accuracy * tau, warm=warm) <= 2 * accuracy


def test_a_tolerance_that_is_not_small_against_the_step_of_a_divergence_is_not_enough():
    assert error_of_divergence(DEGrad, tau=1e-3, tol=1e-3, warm=True) > 0.1
