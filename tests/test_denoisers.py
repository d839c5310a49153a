r"""EquilibriumUNet: shapes, normalisation, independence of samples."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from deepinv_deq import EquilibriumUNet
from deepinv_deq.datasets import phantoms

NORMS = ["spectral", "weight", None]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels", [(3, 5), (4, 6, 8, 10)])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (16, 16)])
def test_any_number_of_channels_scales_and_any_size(norm, channels, size):
    net = EquilibriumUNet(2, channels=channels, norm=norm)
    x = torch.rand(2, 2, *size)
    assert net(x).shape == x.shape
    assert EquilibriumUNet(2, 3, channels=channels, norm=norm)(x).shape == (2, 3, *size)


def test_samples_do_not_see_each_other():
    net = EquilibriumUNet(1, channels=(4, 8)).eval().double()
    nn.init.normal_(net.Conv_1x1.weight)
    x = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [m for m in net.modules() if isinstance(m, nn.GroupNorm)]


@pytest.mark.parametrize("in_channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [2, 3])
def test_it_starts_as_a_contraction(in_channels, dim):
    net = EquilibriumUNet(in_channels, channels=(4, 8), contraction=0.7, dim=dim)
    x = torch.rand(2, in_channels, *(9, 14, 11)[:dim], requires_grad=True)
    out = net(x)
    torch.testing.assert_close(out, 0.7 * x)
    (product,) = torch.autograd.grad(out, x, torch.ones_like(x))
    torch.testing.assert_close(product, torch.full_like(x, 0.7))
    assert EquilibriumUNet(channels=(4, 8)).settings["contraction"] == 0.9


def test_it_leaves_its_start():
    x, net = torch.rand(2, 1, 32, 32), EquilibriumUNet(channels=(4, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) - x.roll(1, -1)).pow(2).sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n != "Conv1.0.bias")


@pytest.mark.parametrize("norm", NORMS)
def test_normalisation(norm):
    net = EquilibriumUNet(1, channels=(4, 8), norm=norm)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.Conv_1x1]
    assert all(parametrize.is_parametrized(m, "weight") == (norm is not None) for m in convolutions)
    if norm == "spectral":
        for _ in range(400):
            net(torch.rand(1, 1, 8, 8))
        net.eval()
        for m in convolutions:
            assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("pretrained, channels", [("gray", 1), ("complex", 2), ("color", 3)])
def test_pretrained_weights_denoise(pretrained, channels):
    net = EquilibriumUNet(pretrained=pretrained).eval()
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(4, channels, 6, 6, generator=rng)
    x = torch.nn.functional.interpolate(x, size=48, mode="bicubic").clamp(0, 1)
    y = x + 0.1 * torch.randn(x.shape, generator=rng)
    with torch.no_grad():
        assert (net(y) - x).square().mean() < 0.65 * (y - x).square().mean()  # 2 dB: a contraction denoises less
    twin = pickle.loads(pickle.dumps(net))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("pretrained", ["gray", "complex", "color"])
def test_pretrained_weights_without_context_ignore_it_at_first(pretrained):
    plain = EquilibriumUNet(pretrained=pretrained).eval()
    net = EquilibriumUNet(pretrained=pretrained, context_channels=2).eval()
    x, context = torch.rand(2, plain.settings["in_channels"], 13, 16), torch.rand(2, 2, 13, 16)
    torch.testing.assert_close(net(x, context=context), plain(x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (net(x, context=context) - context[:, :1]).square().mean().backward()
    optimizer.step()
    assert (net(x, context=context) - net(x, context=-context)).abs().max() > 0
    twin = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(twin(x, context=context), net(x, context=context))


def test_saturation_keeps_points_near_the_context():
    net = EquilibriumUNet(1, channels=(4, 8), contraction=0.9, context_channels=1, saturation=0.5).double().eval()
    context = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    size = context.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    near, far = context + 1e-4 * torch.randn_like(context), context + 1e3
    # untrained, the network is 0.9 times the image that it sees
    torch.testing.assert_close(net(near, context=context), 0.9 * near, rtol=0, atol=1e-8)
    torch.testing.assert_close(net(far, context=context), 0.9 * (context + 0.5 * size))
    for scale in (1e-30, 1.0, 1e30):  # the radius follows the images
        torch.testing.assert_close(net(scale * far, context=scale * context) / scale, net(far, context=context))
    points = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 1, 8, 8).expand_as(context)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, context=context), points + context)
    assert float(torch.linalg.matrix_norm(jacobian.reshape(192, 192), 2)) <= 0.9


def test_saturation_of_a_zero_image_has_a_finite_gradient():
    net = EquilibriumUNet(1, channels=(4, 8), context_channels=1, saturation=1.0)
    x, context = torch.zeros(1, 1, 8, 8, requires_grad=True), torch.zeros(1, 1, 8, 8, requires_grad=True)
    gradients = torch.autograd.grad(net(x, context=context).sum(), (x, context))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_saturation_is_kept_by_copies():
    net = EquilibriumUNet(pretrained="gray", context_channels=1, saturation=0.5)
    assert pickle.loads(pickle.dumps(net)).saturation == copy.deepcopy(net).saturation == 0.5
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=f"saturation must be positive and finite, got {bad}"):
            EquilibriumUNet(1, channels=(4, 8), context_channels=1, saturation=bad)
    with pytest.raises(ValueError, match="needs a context with the 1 channels of the image, got context_channels=0"):
        EquilibriumUNet(1, channels=(4, 8), saturation=1.0)


def test_wrong_inputs_are_named():
    net, x = EquilibriumUNet(1, channels=(4, 8), context_channels=1), torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match="takes 1 context channels .*got 0"):
        net(x)
    with pytest.raises(ValueError, match="takes 0 context channels .*got 1"):
        EquilibriumUNet(1, channels=(4, 8))(x, context=x)
    with pytest.raises(ValueError, match="shape .B, C, H, W. for dim=2, got .1, 1, 8, 8, 8."):
        EquilibriumUNet(1, channels=(4, 8))(torch.rand(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="contraction must be in .0, 1., got 1.2"):
        EquilibriumUNet(contraction=1.2)
    with pytest.raises(ValueError, match="dim must be 2 .*got 4"):
        EquilibriumUNet(dim=4)
    with pytest.raises(ValueError, match="context_channels must not be negative, got -1"):
        EquilibriumUNet(context_channels=-1)


def test_bad_settings():
    with pytest.raises(ValueError, match="must be one of 'spectral', 'weight', None"):
        EquilibriumUNet(norm="batch")
    with pytest.raises(ValueError, match="at least two scales"):
        EquilibriumUNet(channels=(8,))
    with pytest.raises(FileNotFoundError, match="one of color, complex, gray"):
        EquilibriumUNet(pretrained="colour")
    with pytest.raises(ValueError, match="'channels': .16, 32, 64.*not .*'channels': .4, 8"):
        EquilibriumUNet(channels=(4, 8), pretrained="gray")
    with pytest.raises(ValueError, match="in_channels"):
        EquilibriumUNet(1, pretrained="complex")
    with pytest.raises(ValueError, match="'groups': 8.*not .*'groups': 1"):
        EquilibriumUNet(pretrained="gray", groups=1)
    with pytest.raises(ValueError, match="at least one feature map"):
        EquilibriumUNet(channels=(8, 0))


def test_the_complex_denoiser_removes_noise_and_contracts():
    net = EquilibriumUNet(pretrained="complex").eval()  # the weights say how many channels
    x = torch.cat([phantoms(2, 64), torch.zeros(2, 1, 64, 64)], dim=1)
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (net(noisy) - x).norm() < 0.6 * (noisy - x).norm()
    z = noisy.requires_grad_()
    out, b = net(z), torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(10):
        b = torch.autograd.grad(out, z, b / b.norm(), retain_graph=True)[0]
    assert b.norm() < 1.05
