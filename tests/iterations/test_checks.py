r"""What an evaluation and a user may do to tensors between forward and backward."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import GaussianNoise, Inpainting
from torch import nn

from deepinv_deq import DEProx
from deepinv_deq.iterations.checks import OwnInput, Watch
from deepinv_deq.iterations.replica import Replica
from tests.problems import F64, deq, random_mask, relative_error


@pytest.mark.parametrize("training", [False, True])
def test_watch_accepts_what_an_evaluation_does_to_its_own_buffers(training):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("other", torch.zeros(1))

        def forward(self, x):
            self.mean.mul_(0.9).add_(0.1 * x.mean())
            return x

    layer = Counts().train(training)
    replica = Replica([layer])
    watch = Watch(replica.found.values(), ())
    replica.roots[0](torch.ones(3))
    watch.evaluated()
    layer(torch.ones(3))  # another pass through the model, as in equivariant imaging
    watch.check()
    layer.other.fill_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        watch.check()


def test_watch_compares_values_where_only_the_memory_is_another():
    layer = nn.Conv2d(1, 2, 3)
    watch = Watch(Replica([layer]).found.values(), ())
    layer.weight.data = layer.weight.data.clamp(-10, 10)
    layer.to(memory_format=torch.channels_last)
    watch.check()
    layer.weight.data = 2 * layer.weight.data
    with pytest.raises(RuntimeError, match="changed in place"):
        watch.check()


@pytest.mark.parametrize("inplace", [False, True])
def test_own_input_tells_from_one_evaluation_whether_copies_are_necessary(inplace):
    network, guard, x = nn.ReLU(inplace=inplace), OwnInput(), torch.randn(5)
    network.register_forward_pre_hook(guard, with_kwargs=True)
    kept = x.clone()
    for _ in range(3):
        assert torch.equal(network(x), kept.relu()) and torch.equal(x, kept)
    assert guard.writes is inplace


def test_the_memory_of_a_subclass_of_tensors_is_watched():
    class Own(torch.Tensor):
        pass

    t = torch.ones(3).as_subclass(Own)
    watch = Watch([], (t,))
    watch.check()
    t.data = torch.zeros(3)
    with pytest.raises(RuntimeError, match="changed in place"):
        watch.check()


class Denoiser(nn.Module):
    r"""Contracts; ``does`` is what an evaluation does besides."""

    def __init__(self, does):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.gain.offset = 0.1
        self.register_buffer("count", torch.zeros((), dtype=F64))
        self.plain, self.does = torch.zeros((), dtype=F64), does

    def forward(self, x, *_):
        self.does(self)
        return torch.tanh(self.gain * x) + (self.gain.offset if isinstance(self.gain, nn.Parameter) else 0.0)


def nothing(network):
    pass


def count_in_a_buffer(network):
    network.count.add_(1)


def count_in_a_tensor(network):
    network.plain += 1


def clamp(network):
    network.gain.data = network.gain.data.clamp(-0.9, 0.9)


def gradient(does, training, between=nothing):
    r"""Of the loss of equivariant imaging, whose two passes come before the one backward pass."""
    physics = Inpainting((1, 6, 6), mask=random_mask(1, 6, 6), noise_model=GaussianNoise(0.1))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(0)))
    model = deq(DEProx(Denoiser(does), stepsize=0.7)).train(training)
    x = model(y, physics)
    loss = x.square().sum() + model(physics.A(x.flip(-1)), physics).square().sum()
    between(physics)
    return torch.autograd.grad(loss, [model.iteration.denoiser.gain])[0]


def fill_noise_level(physics):
    physics.noise_model.sigma.fill_(0.2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("does", [count_in_a_buffer, count_in_a_tensor, clamp])
def test_what_does_not_change_the_map_is_no_error(does, training):
    assert relative_error(gradient(does, training), gradient(nothing, training)) < 1e-12


def test_the_noise_level_of_the_physics_may_change_before_the_backward_pass():
    assert relative_error(gradient(nothing, False, fill_noise_level), gradient(nothing, False)) < 1e-12
