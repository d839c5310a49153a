r"""Wrong inputs to templates, and what their errors and warnings say."""

from __future__ import annotations

import itertools

import pytest
import torch
from deepinv.physics import MRI, Inpainting, LinearPhysics, Physics, Tomography
from deepinv.utils import TensorList
from torch import nn

from deepinv_deq import (
    DEADMM,
    DEHQS,
    ConvergenceWarning,
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    FixedPointIteration,
    Solver,
)
from tests.problems import F64, MatrixPhysics, SmallDenoiser, imaging


def test_bad_construction():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        DEProx(torch.tanh)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="stepsize must be positive"):
            DEGrad(nn.Identity(), stepsize=bad)
        with pytest.raises(ValueError, match="data_weight must be positive"):
            DEGrad(nn.Identity(), data_weight=bad)
    with pytest.raises(NotImplementedError, match="must implement forward"):
        FixedPointIteration(nn.Identity())(torch.zeros(1), None)


def test_a_physics_without_adjoint():
    with pytest.raises(
        TypeError, match="which Physics is not. Use a deepinv.physics.LinearPhysics, or deepinv_deq.FromOptim"
    ):
        DEProx(nn.Identity()).bind(torch.zeros(1, 1, 4, 4), Physics(A=torch.sin))


class InParts(MatrixPhysics):
    r"""Not a stacked physics, as deepinv's over several processes, and its measurements are a list."""

    def A(self, x, **kwargs):
        return TensorList(list(super().A(x).split(3, dim=1)))

    def A_adjoint(self, y, **kwargs):
        return super().A_adjoint(torch.cat(list(y), dim=1))


@pytest.mark.parametrize("template", [DEHQS, DEADMM])
def test_measurements_in_parts_are_for_templates_that_need_their_adjoint_only(template):
    torch.manual_seed(0)
    denoiser, physics = SmallDenoiser().double(), InParts(torch.randn(6, 16, dtype=F64) / 8, 4)
    y = physics.A(torch.rand(2, 1, 4, 4, dtype=F64))
    with pytest.raises(TypeError, match="InParts are a TensorList of 2 parts. Use DEGrad or DEProx"):
        template(denoiser).bind(y, physics)
    whole, x = MatrixPhysics(physics.matrix, 4), torch.rand(2, 1, 4, 4, dtype=F64)
    for other in (DEGrad, DEProx):
        iteration = other(denoiser, stepsize=0.5)
        exact = iteration.bind(torch.cat(list(y), dim=1), whole)(x)
        torch.testing.assert_close(iteration.bind(y, physics)(x), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 9), (1,)])
def test_measurements_of_a_wrong_shape(shape):
    model, physics, _, _ = imaging()
    with pytest.raises(ValueError, match="do not fit MatrixPhysics"):
        model(torch.zeros(shape, dtype=F64), physics)


def test_measurements_that_would_broadcast():
    physics = LinearPhysics(A=lambda x, **_: x[..., :1, :], A_adjoint=lambda y, **_: y.expand(-1, -1, 4, -1))
    with pytest.raises(ValueError, match=r"to measurements of shape \(1, 1, 1, 4\)"):
        DEProx(nn.Identity()).bind(torch.zeros(1, 1, 4, 4), physics)


def test_tomography_with_other_angles():
    physics = Tomography(angles=8, img_width=16, normalize=True)
    other = Tomography(angles=9, img_width=16, normalize=True)
    with pytest.raises(ValueError, match="angles"):
        DEGrad(nn.Identity()).bind(other.A(torch.zeros(1, 1, 16, 16)), physics)


@pytest.mark.parametrize("template,remedy", [(DEProx, "use stepsize=0.25"), (DEGrad, "use stepsize=0.2")])
def test_a_stepsize_that_diverges_is_explained(template, remedy):
    physics = MatrixPhysics(2 * torch.eye(16), 4)  # squared norm 4
    model = DEQReconstructor(template(nn.Identity(), stepsize=1.0), solver=Solver("fixed_point_iter", max_iter=30))
    with pytest.warns(ConvergenceWarning, match=f"diverges for this operator, whose squared norm is 4 .*{remedy}"):
        model(torch.rand(2, 16), physics)


CALLS = []


class Lookup(LinearPhysics):
    r"""Reads its gain by a method of a dictionary."""

    def __init__(self):
        super().__init__()
        self.look = {"gain": 2.0}.get

    def A(self, x, **_):
        CALLS.append(1)
        return self.look("gain") * x

    A_adjoint = A


def test_a_physics_with_a_builtin_function_is_measured_once():
    physics, iteration, x = Lookup(), DEGrad(nn.Identity()), torch.rand(2, 1, 8, 8)
    counts = [0]
    for _ in range(3):
        iteration.bind(x, physics).preconditioner(x)
        counts.append(len(CALLS))
    first, second, third = (after - before for before, after in itertools.pairwise(counts))
    assert second == third < first


def test_the_diagnosis_leaves_the_random_generators_alone_and_never_crashes():
    physics = MatrixPhysics(2 * torch.eye(16), 4)
    model = DEQReconstructor(DEProx(nn.Identity()), solver=Solver("fixed_point_iter", max_iter=3))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.warns(ConvergenceWarning, match="diverges"):
        model(torch.ones(2, 16), physics)
    assert torch.rand(1) == expected
    mask = (torch.rand(3, 2, 8, 8) > 0.5).float()  # one mask per sample, as deepinv's generators make them
    mri = MRI(mask=mask, img_size=(2, 8, 8))
    model = DEQReconstructor(DEProx(nn.Identity(), stepsize=3.0), solver=Solver("fixed_point_iter", max_iter=3))
    with pytest.warns(ConvergenceWarning, match="use stepsize=1"):
        model(mri.A(torch.rand(3, 2, 8, 8)), mri, init=torch.ones(3, 2, 8, 8))


DRAWS = []


class DrawsMeanwhile(MatrixPhysics):
    r"""Draws random numbers, as another thread may do at the same time."""

    def A_adjoint_A(self, x, **kwargs):
        DRAWS.append(torch.rand(1).item())
        return super().A_adjoint_A(x, **kwargs)


def test_the_diagnosis_does_not_seed_the_random_generators():
    DRAWS.clear()
    torch.manual_seed(0)
    y = torch.ones(2, 16)  # a bound map does not keep it alive
    f = DEProx(nn.Identity(), stepsize=3.0).bind(y, DrawsMeanwhile(torch.eye(16), 4))
    for _ in range(2):
        assert "squared norm is 1" in f.diagnose()
    assert len(set(DRAWS)) == len(DRAWS) >= 4


def test_a_failure_that_is_not_the_stepsizes_is_not_blamed_on_it():
    model, physics, _, y = imaging()
    model.solver = Solver("anderson", max_iter=2, tol=1e-12)
    with pytest.warns(ConvergenceWarning) as caught:
        model(y, physics)
    assert "stepsize" not in str(caught[0].message)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1), nn.Dropout(0.5)])
def test_layers_that_make_the_fixed_point_ill_defined_warn_once(layer):
    physics = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    y = physics.A(torch.rand(2, 1, 4, 4))
    iteration = DEProx(nn.Sequential(layer, nn.Tanh()))
    with pytest.warns(UserWarning, match="training mode"):
        iteration.bind(y, physics)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iteration.bind(y, physics)
        DEProx(nn.Sequential(layer, nn.Tanh())).eval().bind(y, physics)
        DEProx(EquilibriumUNet(channels=(2, 4))).bind(y, physics)


class Broken(DEProx):
    def constants(self, y, physics):
        return (self.missing,)


def test_errors_of_user_code_are_not_those_of_measurements():
    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'missing'"):
        Broken(nn.Identity()).bind(torch.rand(1, 16), MatrixPhysics(torch.eye(16), 4))


def test_measurements_of_another_dtype_after_the_right_ones():
    physics = MatrixPhysics(torch.eye(16), 4)
    DEProx(nn.Identity()).bind(torch.rand(1, 16), physics)
    with pytest.raises(ValueError, match="Measurements of shape .* do not fit MatrixPhysics"):
        DEProx(nn.Identity()).bind(torch.rand(1, 16, dtype=F64), physics)


@pytest.mark.parametrize("template", [DEProx, DEGrad, DEHQS, DEADMM])
def test_measurements_must_be_tensors(template):
    physics = MatrixPhysics(torch.eye(16), 4)
    for y, message in ((torch.rand(1, 16).numpy(), "got ndarray. Use torch.from_numpy"), (None, "got NoneType")):
        with pytest.raises(TypeError, match=f"measurements must be a tensor, {message}"):
            template(nn.Identity()).bind(y, physics)
        with pytest.raises(TypeError, match=f"measurements must be a tensor, {message}"):
            DEQReconstructor(template(nn.Identity()))(y, physics)
