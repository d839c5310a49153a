r"""SparseLinearPhysics against the operators it stands for."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEGrad, DEQReconstructor, ModularIDHook, Solver
from deepinv_deq.physics import SparseLinearPhysics
from tests.operators import OPERATORS, SIZE, pair  # noqa: F401
from tests.problems import MatrixPhysics, relative_error


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


def dense_and_sparse():
    torch.manual_seed(0)
    dense = torch.randn(5, 4, dtype=torch.float64).relu()
    return dense, SparseLinearPhysics(dense.to_sparse_csr(), (1, 2, 2), (5,))


def test_forward_mode_and_vmap():
    dense, sparse = dense_and_sparse()
    x, v = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    expected = v.flatten(1) @ dense.T
    torch.testing.assert_close(torch.func.jvp(sparse.A, (x,), (v,))[1], expected)
    torch.testing.assert_close(torch.func.jvp(sparse.A_adjoint_A, (x,), (v,))[1].flatten(1), expected @ dense)
    torch.testing.assert_close(torch.vmap(sparse.A, in_dims=1, out_dims=1)(torch.stack([x, v], dim=1))[:, 1], expected)
    torch.testing.assert_close(torch.func.jacfwd(sparse.A)(x[:1]).reshape(5, 4), dense)
    torch.testing.assert_close(torch.func.jacrev(sparse.A)(x[:1]).reshape(5, 4), dense)
    assert torch.autograd.gradcheck(sparse.A, x.requires_grad_(), check_forward_ad=True)


def test_tangents_and_gradients_of_a_model_agree():
    _, sparse = dense_and_sparse()
    iteration = DEGrad(torch.nn.Conv2d(1, 1, 1, bias=False).double(), stepsize=0.1)
    solver = Solver("gmres", tol=1e-12)
    model = DEQReconstructor(iteration, solver=Solver("anderson", tol=1e-12), hook=ModularIDHook(solver))
    with torch.no_grad():
        iteration.denoiser.weight.fill_(0.3)
    y, v, w = torch.randn(3, 1, 5, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(y, v), sparse)
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    (gradient,) = torch.autograd.grad(
        model(y.requires_grad_(), sparse), y, (w @ sparse.matrix.to_dense()).reshape(1, 1, 2, 2)
    )
    torch.testing.assert_close((tangent.flatten(1) @ sparse.matrix.to_dense().T * w).sum(), (gradient * v).sum())


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


def test_bad_input():
    sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    with pytest.raises(ValueError, match=r"Expected shape \(B, 1, 16, 16\), got \(1, 1, 8, 8\)"):
        sparse.A(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="fixed angles: call SparseLinearPhysics.from_physics again"):
        sparse.update(angles=torch.arange(9.0))
    measured = sparse.measurement_size
    for call, size in ((sparse, SIZE), (sparse.A, SIZE), (sparse.A_adjoint, measured), (sparse.fbp, measured)):
        with pytest.raises(ValueError, match="fixed angles"):  # the result would be of the old angles
            call(torch.zeros(1, *size), angles=torch.arange(9.0))
    sparse.update(sigma=torch.tensor(0.1), unrelated=torch.tensor(1.0))
    torch.testing.assert_close(sparse.A(torch.ones(1, *SIZE), sigma=0.1, tol=1e-3), sparse.A(torch.ones(1, *SIZE)))
    with pytest.raises(ValueError, match="real images"):
        SparseLinearPhysics.from_physics(dinv.physics.stack(sparse, sparse), SIZE)
    with pytest.raises(ValueError, match="does not act as a matrix"):
        SparseLinearPhysics.from_physics(dinv.physics.LinearPhysics(A=lambda x, **_: x.square()), SIZE)
    with pytest.raises(ValueError, match="the sizes ask for"):
        SparseLinearPhysics(sparse.matrix, (1, 4, 4), (2,))


# Inverses, geometries ---------------------------------------------------------------------------------------------------


def test_least_squares_and_proximal_points(pair):
    physics, sparse, name = pair
    y = physics.A(torch.rand(2, *SIZE))
    if hasattr(physics, "max_iter"):  # settings of the solver are the original's
        assert (sparse.max_iter, sparse.tol, sparse.solver) == (physics.max_iter, physics.tol, physics.solver)
    sparse = sparse.double()
    y = y.double()
    dense = sparse.matrix.to_dense()
    z = torch.rand(2, *SIZE, dtype=torch.float64)
    exact = torch.linalg.solve(
        3.0 * dense.T @ dense + torch.eye(256).double(), (3.0 * y.flatten(1) @ dense + z.flatten(1)).T
    ).T
    found = sparse.prox_l2(z, y, 3.0, max_iter=2000, tol=1e-12)
    assert relative_error(found.flatten(1), exact) <= 1e-6
    same = dinv.physics.LinearPhysics(
        A=lambda x, **_: (x.flatten(1) @ dense.T).reshape(y.shape),
        A_adjoint=lambda y, **_: (y.flatten(1) @ dense).reshape(x.shape),
        img_size=SIZE,
    )
    x = sparse.A_dagger(y, max_iter=20, tol=1e-12)  # with more, rounding grows along the directions that A barely sees
    assert relative_error(x, same.A_dagger(y, max_iter=20, tol=1e-12)) <= 1e-6
    assert (sparse.A(x) - y).norm() <= 0.05 * y.norm()
    if hasattr(sparse, "fbp"):
        assert torch.equal(sparse.A_dagger(y, fbp=True), sparse.fbp(y))


GEOMETRIES = {
    "limited angle": {"angles": torch.linspace(0, 60, 7)},
    "beyond half a turn": {"angles": torch.linspace(-200, 500, 11)},
    "one view": {"angles": torch.tensor([33.0])},
    "many views": {"angles": 40},
    "limited angle, circle": {"angles": torch.linspace(20, 80, 5), "circle": True},
    "fan": {"angles": 9, "fan_beam": True},
    "fan of few detectors": {"angles": 9, "fan_beam": True, "fan_parameters": {"n_detector_pixels": 7}},
    "narrow fan": {
        "angles": torch.linspace(0, 90, 6), "fan_beam": True,
        "fan_parameters": {"source_radius": 2.0, "detector_radius": 3.0, "n_detector_pixels": 21, "detector_spacing": 0.05},
    },
    "limited fan, circle": {"angles": torch.linspace(0, 45, 4), "fan_beam": True, "circle": True},
    "fan, view by view": {"angles": 9, "fan_beam": True, "parallel_computation": False},
    "limited angle, view by view": {"angles": torch.linspace(0, 60, 7), "parallel_computation": False},
}  # fmt: skip


@pytest.mark.parametrize("side", [15, 16])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, side, monkeypatch):
    import deepinv_deq.physics as module

    settings = {"normalize": True} | GEOMETRIES[name]
    physics = dinv.physics.Tomography(img_width=side, **settings)
    monkeypatch.setattr(module, "by_columns", None)  # assembled from its grids, not measured column by column
    sparse = SparseLinearPhysics.from_physics(physics, (1, side, side))
    x = torch.randn(2, 1, side, side)
    y = physics.A(x)
    assert relative_error(sparse.A(x), y) <= 1e-5
    assert relative_error(sparse.A_adjoint(y), physics.A_adjoint(y)) <= 1e-5
    assert relative_error(sparse.fbp(y), physics.fbp(y)) <= 1e-5
    assert torch.equal(sparse._csr("adjoint")().to_dense(), sparse.matrix.to_dense().T)
