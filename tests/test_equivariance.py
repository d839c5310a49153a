r"""The measures of Tables 2 and 3, on systems whose equivariance is known."""

from __future__ import annotations

import pytest
import torch
from deepinv.loss.metric import PSNR
from deepinv.optim import ADMM, L2, PnP
from deepinv.physics import MRI, Denoising, Inpainting
from deepinv.transform import Rotate, Shift
from torch import nn

from deepinv_deq import DEADMM, DEProx, DEQReconstructor, FromOptim, IterationEquivariance, PipelineEquivariance

CEILING = 80.0  # deepinv's PSNR of identical images


class Shade(nn.Module):
    r"""Adds a ramp along the columns: as little equivariant to rotations as can be computed by hand."""

    def __init__(self, n, height=0.1):
        super().__init__()
        self.register_buffer("ramp", height * torch.linspace(-1, 1, n).expand(n, n).clone())

    def forward(self, x, sigma=None):
        return x + self.ramp


def by_hand(n, height=0.1):
    ramp = Shade(n, height).ramp[None, None]
    return PSNR()(torch.rot90(ramp, 1, (-2, -1)), ramp)


def test_pipeline_of_a_known_model():
    x, physics = torch.rand(3, 1, 8, 8), Denoising()
    identity = PipelineEquivariance()(x, x, physics=physics, model=lambda y, physics: y)
    assert identity.shape == (3,) and torch.allclose(identity, torch.full((3,), CEILING))
    shade = Shade(8)
    value = PipelineEquivariance()(x, x, physics=physics, model=lambda y, physics: shade(y))
    torch.testing.assert_close(value, by_hand(8).expand(3))


def test_pipeline_measures_the_operator_too():
    mask = torch.ones(1, 8, 8)
    mask[:, :, :4] = 0
    x = torch.rand(2, 1, 8, 8)
    value = PipelineEquivariance()(x, x, physics=Inpainting((1, 8, 8), mask=mask), model=lambda y, physics: y)
    turned = torch.rot90(x, 1, (-2, -1))
    torch.testing.assert_close(value, PSNR()(turned * mask, torch.rot90(x * mask, 1, (-2, -1))))


def test_iteration_of_a_known_operator():
    x, physics = torch.rand(3, 1, 8, 8), Denoising()
    model = DEQReconstructor(DEProx(nn.Identity(), stepsize=0.5))
    exact = IterationEquivariance()(x, x, physics=physics, model=model)
    assert torch.allclose(exact, torch.full((3,), CEILING))
    model = DEQReconstructor(DEProx(Shade(8), stepsize=0.5))
    torch.testing.assert_close(
        IterationEquivariance()(x, x, physics=physics, model=model), by_hand(8).expand(3), rtol=1e-4, atol=0
    )


def test_iterations_of_several_variables():
    x, physics = torch.rand(2, 1, 8, 8), Denoising()
    admm = ADMM(prior=PnP(Shade(8)), data_fidelity=L2(), stepsize=0.5)
    for iteration in (DEADMM(Shade(8), stepsize=0.5), FromOptim(admm)):
        found = IterationEquivariance()(x, x, physics=physics, model=DEQReconstructor(iteration))
        torch.testing.assert_close(found, by_hand(8).expand(2), rtol=1e-3, atol=0)


def test_other_transforms_use_one_element_for_both_sides():
    x, physics = torch.rand(2, 1, 8, 8), Denoising()
    for transform in (Shift(), Rotate(multiples=90, positive=True)):
        value = PipelineEquivariance(transform)(x, x, physics=physics, model=lambda y, physics: y)
        assert torch.allclose(value, torch.full((2,), CEILING))
    fixed = PipelineEquivariance(Rotate(multiples=90), params={"theta": [180]})
    ramp = Shade(8).ramp[None, None]
    value = fixed(x, x, physics=physics, model=lambda y, physics: y + ramp)
    torch.testing.assert_close(value, PSNR()(torch.rot90(ramp, 2, (-2, -1)), ramp).expand(2))


def test_magnitudes_of_two_channels_are_compared_after_the_physics():
    x = torch.rand(2, 2, 8, 8)
    mask = torch.ones(1, 2, 8, 8)
    physics = MRI(mask=mask, img_size=(2, 8, 8))
    flip = lambda y, physics: physics.A_adjoint(y) * torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)  # noqa: E731
    value = PipelineEquivariance(complex_abs=True)(x, x, physics=physics, model=flip)
    assert torch.allclose(value, torch.full((2,), CEILING), atol=1.0)


def test_the_default_is_90_degrees_counterclockwise():
    x = torch.rand(1, 1, 6, 6)
    metric = PipelineEquivariance()
    torch.testing.assert_close(metric.transform.transform(x, **metric.params), torch.rot90(x, 1, (-2, -1)))


def test_without_ground_truth_or_iteration_it_is_nan():
    x, physics = torch.rand(2, 1, 8, 8), Denoising()
    assert PipelineEquivariance()(x, None, physics=physics, model=lambda y, physics: y).isnan().all()
    assert IterationEquivariance()(x, x, physics=physics, model=lambda y, physics: y).isnan().all()


def test_bad_input():
    x = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match="needs physics= and model="):
        PipelineEquivariance()(x, x)
    with pytest.raises(TypeError, match="deepinv.transform.Transform"):
        PipelineEquivariance(torch.flip)


def test_reduction_and_direction_are_deepinvs():
    x = torch.rand(2, 1, 8, 8)
    metric = PipelineEquivariance(reduction="mean")
    assert not metric.lower_better
    assert metric(x, x, physics=Denoising(), model=lambda y, physics: y).shape == ()
