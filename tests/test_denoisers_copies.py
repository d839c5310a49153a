r"""Copies and pickles of EquilibriumUNet: everything is kept, or an error says what cannot be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from deepinv_deq import EquilibriumUNet
from deepinv_deq.denoisers import _rebuild

NORMS = ["spectral", "weight", None]


@pytest.mark.parametrize("norm", NORMS)
def test_copies_dtype_and_state(norm):
    net = EquilibriumUNet(1, channels=(4, 8), norm=norm).eval()
    x = torch.rand(1, 1, 8, 8)
    nn.init.normal_(net.Conv_1x1.weight)
    expected = net(x)
    net.Conv_1x1.bias.requires_grad_(False)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(net).double().float()):
        assert not twin.training and not twin.Conv_1x1.bias.requires_grad
        assert all(p.requires_grad for n, p in twin.named_parameters() if n != "Conv_1x1.bias")
        torch.testing.assert_close(twin(x), expected)
    other = EquilibriumUNet(1, channels=(4, 8), norm=norm).eval()
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(x), expected)
    assert pickle.loads(pickle.dumps(net.double()))(x.double()).dtype == torch.float64


class Narrow(EquilibriumUNet):
    r"""A subclass with other constructor arguments."""

    def __init__(self, width, norm="spectral"):
        super().__init__(channels=(width, 2 * width), norm=norm)
        self.note, self.kept = {"width": width}, [self.Conv1]


def forwarded(module, args, out):
    return 2 * out


def through_pickle(net):
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("duplicate", [through_pickle, copy.deepcopy, copy.copy])
def test_copies_keep_everything(norm, duplicate):
    net, x = Narrow(4, norm), torch.rand(1, 1, 8, 8)
    nn.init.normal_(net.Conv_1x1.weight)
    net.Conv1.eval()
    net.Conv2.register_forward_hook(forwarded)
    net.Conv1[0].bias.requires_grad_(False)
    twin = duplicate(net)
    assert type(twin) is Narrow and twin.note == {"width": 4} and twin.settings == net.settings
    assert [m.training for m in twin.modules()] == [m.training for m in net.modules()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in net.parameters()]
    assert [p.stride() for p in twin.parameters()] == [p.stride() for p in net.parameters()]
    shared = [a is b for a, b in zip(twin.parameters(), net.parameters(), strict=True)]
    assert all(shared) if duplicate is copy.copy else not any(shared) and twin.kept[0] is twin.Conv1
    assert len(twin.Conv2._forward_hooks) == 1 and twin.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(twin.eval()(x), net.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_loaded_network_is_normalised_and_can_be_pickled_again(norm):
    net, x = through_pickle(through_pickle(EquilibriumUNet(channels=(4, 8), norm=norm))), torch.rand(1, 1, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) - x.roll(1, -1)).square().sum().backward()
        optimizer.step()
    layers = [m for m in net.modules() if parametrize.is_parametrized(m)]
    assert bool(layers) == (norm is not None) and all(p.grad is not None for p in net.parameters())
    expected = net.eval()(x)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(through_pickle(net)(x), expected)


def test_what_cannot_be_pickled_is_an_error():
    net = EquilibriumUNet(channels=(4, 8))
    net.register_forward_hook(lambda *_: None)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(net)
    net = EquilibriumUNet(channels=(4, 8))
    parametrize.register_parametrization(net.Conv_1x1, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(net)


def test_networks_that_version_0_1_pickled_load():
    net = EquilibriumUNet(channels=(4, 8), contraction=1.0).eval()
    settings = {
        k: v for k, v in net.settings.items() if k in ("in_channels", "out_channels", "channels", "norm", "groups")
    }
    old = _rebuild(EquilibriumUNet, settings, net.state_dict(), False, ["Conv_1x1.bias"])
    assert old.settings == net.settings and not old.training and not old.Conv_1x1.bias.requires_grad
