r"""What a training changes in losses, metrics and physics is resumed, too."""

from __future__ import annotations

import warnings

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.physics import GaussianNoise, Inpainting, LinearPhysics
from torch import nn
from torch.utils.data import DataLoader

from deepinv_deq import DEProx, DEQReconstructor
from deepinv_deq.training import ResumableTrainer, latest_checkpoint
from deepinv_deq.training.surroundings import Surroundings
from tests.problems import SmallDenoiser, weights

pytestmark = pytest.mark.usefixtures("run_folders")


class Gain(LinearPhysics):
    r"""A learned operator."""

    def __init__(self, shape=(1, 8, 8)):
        super().__init__()
        self.g = nn.Parameter(torch.full(shape, 0.9))

    def A(self, x, **_):
        return self.g * x

    A_adjoint = A


class Weighted(dinv.loss.SupLoss):
    r"""A learned weight, a counter and something that is never saved."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls, self.last = nn.Parameter(torch.tensor(1.0)), 0, [object()]

    def forward(self, x_net, x, **kwargs):
        self.calls += 1
        return super().forward(x_net=x_net, x=x) * self.weight.square() / (1 + self.calls)


class Tracking(dinv.loss.SupLoss):
    r"""Everything that a loss may keep: of NumPy, created late, trained without being a parameter, and the physics itself."""

    def __init__(self):
        super().__init__()
        self.decay, self.w = np.float64(1.0), torch.tensor(1.0, requires_grad=True)
        self.register_buffer("mean", None)
        self.layer = nn.LazyLinear(1)

    def parameters(self, recurse=True):
        return iter([self.w])

    def forward(self, x_net, x, physics, **kwargs):
        self.count, self.decay, self.physics = getattr(self, "count", 0) + 1, 0.9 * self.decay, physics
        self.mean = x_net.detach().mean() if self.mean is None else 0.5 * self.mean + 0.5 * x_net.detach().mean()
        loss = super().forward(x_net=x_net, x=x) * (self.decay * self.w.square() + self.mean / self.count)
        return loss + 0 * self.layer(x_net.flatten(1)).sum()


class Level(dinv.loss.SupLoss):
    r"""Shares a tensor with the physics, which it changes in place."""

    def forward(self, x_net, x, physics, **kwargs):
        self.level = physics.noise_model.sigma
        self.level.mul_(0.9)
        return super().forward(x_net=x_net, x=x) * self.level.clone()


def unsure():
    return dinv.loss.SureGaussianLoss(0.01, unsure=True, step_size=1.0, rng=torch.Generator().manual_seed(0))


def interleaved():
    return dinv.loss.InterleavedLossScheduler(dinv.loss.MCLoss(), dinv.loss.SupLoss(), Weighted())


def masked():
    return Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8).tril())


def noisy():
    return Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8).tril(), noise_model=GaussianNoise(1.0))


def run(path, loss, physics, epochs, **settings):
    torch.manual_seed(0)
    model, physics, loss = DEQReconstructor(DEProx(SmallDenoiser(), stepsize=0.7)), physics(), loss()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = dinv.datasets.TensorDataset(x=x, y=0.5 * x.tril(), use_dict_output=True)
    trained = [p for part in (model, physics, loss) for p in part.parameters()]
    return ResumableTrainer(
        model,
        physics,
        torch.optim.Adam(trained, lr=1e-2),
        DataLoader(data, 2),
        losses=[loss],
        metrics=[],
        epochs=epochs,
        device="cpu",
        save_path=path,
        verbose=False,
        show_progress_bar=False,
        **settings,
    )


@pytest.mark.parametrize(
    "loss,physics",
    [
        (unsure, masked),
        (interleaved, masked),
        (Weighted, masked),
        (dinv.loss.SupLoss, Gain),
        (Weighted, Gain),
        (Tracking, masked),
        (Tracking, Gain),
        (Level, noisy),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, loss, physics):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The state of")
        whole = run(tmp_path / "a", loss, physics, 4)
        whole.train()
        run(tmp_path / "b", loss, physics, 2).train()
        resumed = run(tmp_path / "b", loss, physics, 4, resume=True)
        resumed.train()
    assert torch.equal(weights(whole.model), weights(resumed.model)) and resumed.loss_history == whole.loss_history


def test_only_what_changed_is_saved(tmp_path):
    trainer = run(tmp_path, Weighted, masked, 1)
    trainer.train()
    content = torch.load(latest_checkpoint(tmp_path), weights_only=True)
    assert set(content["surroundings"]["in place"]) == {"losses[0].weight"}
    assert content["surroundings"]["replaced"] == {"losses[0].calls": 2}


def test_a_run_without_a_place_for_it_is_refused_and_unchanged(tmp_path):
    run(tmp_path, dinv.loss.SupLoss, Gain, 1).train()
    other = run(tmp_path, dinv.loss.SupLoss, lambda: Gain((1, 8, 1)), 2, resume=True)
    before, rng = weights(other.model), torch.get_rng_state()
    with pytest.raises(ValueError, match="does not fit this run"):
        other.train()
    assert torch.equal(weights(other.model), before) and torch.equal(torch.get_rng_state(), rng)


def test_a_trained_tensor_of_no_part_of_the_run_is_named(tmp_path):
    trainer = run(tmp_path, dinv.loss.SupLoss, masked, 1)
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.warns(UserWarning, match=r"a tensor of shape \(3,\) that the optimiser trains.* cannot be saved"):
        trainer.train()


def test_shared_modules_of_the_model_and_attributes_that_are_nan_are_left_out():
    trainer = run(None, Weighted, masked, 1)
    trainer.losses[0].level, trainer.losses[0].network = float("nan"), trainer.model
    state = Surroundings(trainer)
    assert state.changed(trainer) == {"in place": {}, "replaced": {}}
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    trainer.losses[0].level = 2.0
    assert state.changed(trainer) == {"in place": {}, "replaced": {"losses[0].level": 2.0}}
