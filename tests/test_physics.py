r"""SparseLinearPhysics against the operators it stands for."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch

from deepinv_deq.physics import SparseLinearPhysics
from tests.problems import MatrixPhysics, relative_error

SIZE = (1, 16, 16)
OPERATORS = {
    "parallel": lambda: dinv.physics.Tomography(9, 16, normalize=True),
    "unnormalised": lambda: dinv.physics.Tomography(9, 16, normalize=False),
    "odd": lambda: dinv.physics.Tomography(9, 16, normalize=True, parallel_computation=False),
    "circle": lambda: dinv.physics.Tomography(9, 16, normalize=True, circle=True),
    "fan": lambda: dinv.physics.Tomography(
        9, 16, normalize=True, fan_beam=True, fan_parameters={"n_detector_pixels": 30}
    ),
    "unmatched": lambda: dinv.physics.Tomography(9, 16, normalize=True, adjoint_via_backprop=False),
    "boundary": lambda: dinv.physics.Tomography(9, 16, normalize=True, fbp_interpolate_boundary=True),
    "blur": lambda: dinv.physics.Blur(torch.rand(1, 1, 3, 3), padding="circular"),
    "inpainting": lambda: dinv.physics.Inpainting(SIZE, mask=0.5),
    "downsampling": lambda: dinv.physics.Downsampling(img_size=SIZE, factor=2),
}


@pytest.fixture(params=sorted(OPERATORS))
def pair(request):
    torch.manual_seed(0)
    physics = OPERATORS[request.param]()
    return physics, SparseLinearPhysics.from_physics(physics, SIZE), request.param


def test_it_is_the_operator_to_1e6(pair):
    physics, sparse, name = pair
    x = torch.randn(3, *SIZE)
    y = physics.A(x)
    assert isinstance(sparse, dinv.physics.LinearPhysics) and sparse.A(x).shape == y.shape
    assert relative_error(sparse.A(x), y) <= 1e-6
    if name != "unmatched":
        assert relative_error(sparse.A_adjoint(y), physics.A_adjoint(y)) <= 2e-6
    if name in ("parallel", "unnormalised", "odd", "fan", "boundary"):
        assert relative_error(sparse.fbp(y), physics.fbp(y)) <= 1e-5
    assert hasattr(sparse, "fbp") == hasattr(physics, "fbp")


def test_the_adjoint_is_exact(pair):
    _, sparse, _ = pair
    x = torch.randn(1, *SIZE)
    y = torch.randn_like(sparse.A(x))
    lhs, rhs = (sparse.A(x).double() * y).sum(), (x.double() * sparse.A_adjoint(y)).sum()
    assert abs(lhs - rhs) <= 1e-6 * sparse.A(x).norm() * y.norm()


def test_derivatives():
    sparse = SparseLinearPhysics.from_physics(MatrixPhysics(torch.randn(7, 9), 3), (1, 3, 3)).double()
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparse.A, x) and torch.autograd.gradgradcheck(sparse.A, x)
    y = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparse.A_adjoint, y)


def test_noise_model_and_normalisation_are_kept():
    noisy = dinv.physics.Tomography(9, 16, normalize=True, noise_model=dinv.physics.GaussianNoise(0.1))
    sparse = SparseLinearPhysics.from_physics(noisy, SIZE)
    assert sparse.noise_model is noisy.noise_model
    assert sparse.compute_sqnorm(torch.randn(1, *SIZE), verbose=False).item() == pytest.approx(1, abs=1e-2)
    x = torch.rand(1, *SIZE)
    assert (sparse(x) - sparse.A(x)).std().item() == pytest.approx(0.1, rel=0.3)


def test_copies_and_dtype():
    sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    x = torch.rand(1, *SIZE)
    twin = copy.deepcopy(sparse)
    torch.testing.assert_close(twin.A(x), sparse.A(x))
    torch.testing.assert_close(twin.fbp(twin.A(x)), sparse.fbp(sparse.A(x)))
    assert copy.deepcopy(sparse).double().A(x.double()).dtype == torch.float64
    assert sparse.clone().A(x).shape == sparse.A(x).shape


def test_cache(tmp_path):
    file, physics = tmp_path / "deep" / "matrix.pt", OPERATORS["parallel"]()
    first = SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    second = SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    x = torch.rand(1, *SIZE)
    assert torch.equal(first.A(x), second.A(x)) and [f.name for f in file.parent.iterdir()] == ["matrix.pt"]
    for other in (dinv.physics.Tomography(8, 16, normalize=True), OPERATORS["unnormalised"]()):
        with pytest.raises(ValueError, match="matrix of another operator"):
            SparseLinearPhysics.from_physics(other, SIZE, cache=file)


def test_bad_input():
    sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    with pytest.raises(ValueError, match=r"Expected shape \(B, 1, 16, 16\), got \(1, 1, 8, 8\)"):
        sparse.A(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="fixed angles: call SparseLinearPhysics.from_physics again"):
        sparse.update(angles=torch.arange(9.0))
    sparse.update(sigma=torch.tensor(0.1), unrelated=torch.tensor(1.0))
    with pytest.raises(ValueError, match="real images"):
        SparseLinearPhysics.from_physics(dinv.physics.stack(sparse, sparse), SIZE)
    with pytest.raises(ValueError, match="does not act as a matrix"):
        SparseLinearPhysics.from_physics(dinv.physics.LinearPhysics(A=lambda x, **_: x.square()), SIZE)
    with pytest.raises(ValueError, match="the sizes ask for"):
        SparseLinearPhysics(sparse.matrix, (1, 4, 4), (2,))


def test_an_operator_in_double_precision_gives_a_matrix_in_double_precision():
    physics = dinv.physics.Tomography(
        torch.arange(9, dtype=torch.float64) * 20, 16, normalize=False, adjoint_via_backprop=True, dtype=torch.float64
    )
    x = torch.rand(2, *SIZE, dtype=torch.float64)
    for operator in (physics, MatrixPhysics(torch.rand(30, 256, dtype=torch.float64), 16)):
        sparse = SparseLinearPhysics.from_physics(operator, SIZE)
        y = operator.A(x)
        assert sparse.A(x).dtype == torch.float64 and relative_error(sparse.A(x), y) <= 1e-13
        assert relative_error(sparse.A_adjoint(y), operator.A_adjoint(y)) <= 1e-13


def test_autocast_leaves_the_products_alone():
    sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    x = torch.rand(2, *SIZE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse.A(x)
        (g,) = torch.autograd.grad(sparse.A_adjoint(y).sum(), x)
    assert y.dtype == g.dtype == torch.float32
    torch.testing.assert_close(y, sparse.A(x), rtol=0, atol=0)
