r"""Checks of measurements, noise levels and layers; what is remembered of a physics is forgotten with it."""

from __future__ import annotations

import gc

import pytest
import torch
from deepinv.physics import Inpainting, LinearPhysics
from torch import nn

from deepinv_deq import DEProx
from deepinv_deq.iterations.checks import OwnInput, Watch, fits
from deepinv_deq.iterations.replica import Replica


class Broadcasts(LinearPhysics):
    r"""Its adjoint takes measurements of any height, its measurements have the height of the gain."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("gain", torch.ones(rows, 1))

    def A(self, x, **_):
        return x[..., :1, :] * self.gain

    def A_adjoint(self, y, **_):
        return y.expand(-1, -1, 4, -1) if y.shape[-2] == 1 else y


def test_another_physics_at_the_same_address_is_checked_again():
    y = torch.zeros(1, 1, 1, 4)
    for _ in range(20):
        right = Broadcasts(1)
        DEProx(nn.Identity()).bind(y, right)
        del right
        gc.collect()
        wrong = Broadcasts(3)
        with pytest.raises(ValueError, match="to measurements of shape"):
            DEProx(nn.Identity()).bind(y, wrong)
        del wrong


def test_a_physics_whose_tensors_change_shape_is_checked_again():
    y, physics = torch.zeros(1, 1, 1, 4), Broadcasts(1)
    iteration = DEProx(nn.Identity())
    iteration.bind(y, physics)
    physics.gain = torch.ones(3, 1)
    with pytest.raises(ValueError, match="to measurements of shape"):
        iteration.bind(y, physics)


def test_the_check_costs_one_evaluation_for_each_shape(monkeypatch):
    calls, original = [], Inpainting.A
    monkeypatch.setattr(Inpainting, "A", lambda self, x, **k: calls.append(len(x)) or original(self, x, **k))
    physics, iteration = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4)), DEProx(nn.Identity())
    for batch in (2, 2, 3, 2):
        iteration.bind(torch.zeros(batch, 1, 4, 4), physics)
    assert calls == [2, 3]
    count = len(fits._known)
    del physics
    gc.collect()
    assert len(fits._known) < count


def test_watch_accepts_what_layers_do_to_their_own_buffers():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x):
            self.mean.mul_(0.9).add_(0.1 * x.mean())
            return x

    layer = Counts()
    replica = Replica([layer])
    watch = Watch(replica.found.values(), ())
    replica.roots[0](torch.ones(3))
    watch.evaluated()
    watch.check()
    layer.mean.fill_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        watch.check()
    layer.eval()
    watch = Watch(Replica([layer]).found.values(), ())
    layer(torch.ones(3))
    watch.evaluated()
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
