r"""Group norm: values, keys and all derivatives are those of PyTorch's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from deepinv_deq import EquilibriumUNet
from deepinv_deq.group_norm import GroupNorm, _GroupNorm


def pair(dtype=torch.float64, channels=8, groups=4, eps=1e-3):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(groups, channels, eps), nn.GroupNorm(groups, channels, eps)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())  # the same keys
    return ours.to(dtype), theirs.to(dtype)


def gradients(norm, x, g):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), g)


@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (1, 8, 7), (2, 8, 3, 4, 5), (3, 8, 1, 1)])
def test_values_and_gradients(shape):
    ours, theirs = pair()
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    assert torch.equal(ours(x.requires_grad_()), theirs(x))
    for a, b in zip(gradients(ours, x, g), gradients(theirs, x, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_single_precision_with_a_large_mean_and_channels_last():
    ours, theirs = pair(torch.float32, channels=16, groups=8)
    x = (torch.randn(2, 16, 32, 32) + 30).to(memory_format=torch.channels_last)
    g = torch.randn(2, 16, 32, 32).to(memory_format=torch.channels_last)
    exact = gradients(theirs.double(), x.double(), g.double())
    found = gradients(ours, x, g)
    assert found[0].stride() == x.stride()
    pytorch = gradients(theirs.float(), x, g)
    for a, b, e in zip(found, pytorch, exact, strict=True):
        assert (a - e).norm() <= 2 * (b - e).norm() + 1e-6 * e.norm()


def test_derivatives_of_every_kind():
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 4, dtype=torch.float64).requires_grad_().unbind()

    def norm(*tensors):
        return _GroupNorm.apply(*tensors, 2, 1e-3)[0]

    both = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(norm, (x, weight, bias), check_forward_ad=True, **both)
    assert torch.autograd.gradgradcheck(norm, (x, weight, bias), check_fwd_over_rev=True, **both)


def test_transforms_of_torch_func():
    ours, theirs = pair()
    x, v = torch.randn(2, 2, 8, 2, 2, dtype=torch.float64)

    def loss(norm):
        return lambda t: norm(t).pow(3).sum()

    for transformed in (
        lambda f: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1],
        lambda f: torch.func.grad(lambda t: torch.func.jvp(f, (t,), (v,))[1])(x),
        lambda f: torch.vmap(torch.func.grad(f))(torch.stack([x, v])),
        lambda f: torch.func.jacfwd(f)(x),
    ):
        torch.testing.assert_close(transformed(loss(ours)), transformed(loss(theirs)), rtol=1e-10, atol=1e-10)


def test_tangent_of_a_gradient_without_its_graph():
    ours, _ = pair()
    x, v = torch.randn(2, 2, 8, 2, 2, dtype=torch.float64)
    exact = torch.func.jvp(torch.func.grad(lambda t: ours(t).pow(3).sum()), (x,), (v,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), v)
        (gradient,) = torch.autograd.grad(ours(dual).pow(3).sum(), dual)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, exact)


def test_pytorch_s_own_function_where_the_formula_is_not_for():
    ours, theirs = pair(torch.float32)
    x = torch.randn(2, 8, 4, 4)
    assert ours(x.detach()).grad_fn.name() != theirs(x).grad_fn.name()  # the weights want gradients
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).grad_fn.name() == theirs(x).grad_fn.name() and ours(x).dtype == theirs(x).dtype
    assert ours.bfloat16()(x.bfloat16()).grad_fn.name() == theirs.bfloat16()(x.bfloat16()).grad_fn.name()
    compiled = torch.compile(pair(torch.float32)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), pair(torch.float32)[1](x))


def test_networks_keep_their_keys_and_can_be_copied():
    net = EquilibriumUNet(1, channels=(4, 8))
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert norms and all(type(m) is GroupNorm for m in norms)
    assert {"Conv1.1.weight", "Conv1.1.bias"} <= net.state_dict().keys()
    x = torch.randn(1, 1, 8, 8)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
