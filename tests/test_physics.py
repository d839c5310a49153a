r"""SparseLinearPhysics against the operators it stands for."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEGrad, DEQReconstructor, ModularIDHook, Solver
from deepinv_deq.files import digests
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


# Types, devices ---------------------------------------------------------------------------------------------------------


def test_integers_are_converted_to_the_type_of_the_matrix():
    sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    x = torch.randint(0, 256, (2, *SIZE), generator=torch.Generator().manual_seed(0))
    y = sparse.A(x.float())
    counts = (1000 * y).round()
    for dtype in (torch.uint8, torch.int16, torch.int64):
        assert torch.equal(sparse.A(x.to(dtype)), y)
    assert torch.equal(sparse.A(x > 128), sparse.A((x > 128).float()))
    for method in (sparse.A_adjoint, sparse.fbp, sparse.A_dagger, lambda y: sparse.prox_l2(0.0, y, 1.0)):
        assert torch.equal(method(counts.int()), method(counts)) and method(counts.int()).dtype == torch.float32
    assert torch.equal(sparse.prox_l2(x, counts.int(), 1.0), sparse.prox_l2(x.float(), counts, 1.0))


def test_complex_images_are_multiplied_part_by_part():
    dense = torch.randn(7, 9, dtype=torch.float64)
    sparse = SparseLinearPhysics.from_physics(MatrixPhysics(dense, 3), (1, 3, 3)).double()
    x = torch.randn(2, 1, 3, 3, dtype=torch.complex128, requires_grad=True)
    y = sparse.A(x)
    torch.testing.assert_close(y, x.flatten(1) @ dense.T.to(x.dtype))
    torch.testing.assert_close(sparse.A_adjoint(y).flatten(1), y @ dense.to(x.dtype))
    assert torch.autograd.gradcheck(sparse.A, x)
    tomograph = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    x = torch.randn(2, *SIZE, dtype=torch.complex64)
    y = tomograph.A(x)
    torch.testing.assert_close(tomograph.fbp(y), torch.complex(tomograph.fbp(y.real), tomograph.fbp(y.imag)))
    prox = tomograph.prox_l2(x, y, 2.0, max_iter=200, tol=1e-7)
    normal = prox - x + 2.0 * tomograph.A_adjoint(tomograph.A(prox) - y)
    assert normal.abs().max() <= 1e-5 and relative_error(prox, x) <= 1e-5  # y = Ax: x is its own proximal point


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 5e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-13)])
def test_other_precisions_lose_no_more_than_they_must(dtype, bound):
    dense = torch.rand(30, 256, dtype=torch.float64)
    for made in (dense, dense.float()):
        sparse = SparseLinearPhysics.from_physics(MatrixPhysics(made, 16), SIZE)
        x = torch.rand(2, *SIZE, dtype=torch.float64)
        y = x.flatten(1) @ made.double().T
        for operator in (sparse, copy.deepcopy(sparse).to(dtype)):
            found = operator.A(x.to(dtype))
            assert found.dtype == dtype
            held = operator.matrix.dtype  # no input is rounded to the type of the matrix
            assert relative_error(found.double(), y) <= max(
                bound, 5e-3 if held == torch.float16 else 0, 3e-2 * (held == torch.bfloat16)
            )


@pytest.mark.parametrize("name", ["parallel", "unnormalised", "odd", "circle", "fan", "boundary", "unmatched"])
def test_fbp_follows_moves_and_leaves_the_original_alone(name):
    physics = OPERATORS[name]()
    tensors = {k: (v.dtype, v.data_ptr()) for k, v in physics.named_buffers()}
    sparse = SparseLinearPhysics.from_physics(physics, SIZE)
    y = physics.A(torch.rand(2, *SIZE))
    expected = sparse.fbp(y)
    assert expected.dtype == torch.float32
    assert relative_error(sparse.half().fbp(y.half()).float(), expected) <= 2e-2
    sparse = SparseLinearPhysics.from_physics(physics, SIZE).double()
    found = sparse.fbp(y.double())
    assert found.dtype == torch.float64 and relative_error(found, expected.double()) <= 1e-5
    assert relative_error(copy.deepcopy(sparse).fbp(y.double()), found) == 0
    assert {k: (v.dtype, v.data_ptr()) for k, v in physics.named_buffers()} == tensors


def test_fbp_in_double_precision_is_that_of_an_operator_in_double_precision():
    angles = torch.arange(9) * 20.0
    made = {"normalize": False, "adjoint_via_backprop": True}
    exact = dinv.physics.Tomography(angles.double(), 16, dtype=torch.float64, **made)
    y = exact.A(torch.rand(2, *SIZE, dtype=torch.float64))
    sparse = SparseLinearPhysics.from_physics(exact, SIZE)
    assert relative_error(sparse.fbp(y), exact.fbp(y)) <= 1e-12
    moved = SparseLinearPhysics.from_physics(dinv.physics.Tomography(angles, 16, **made), SIZE).double()
    assert relative_error(moved.fbp(y), exact.fbp(y)) <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
def test_devices(made_on):
    physics = dinv.physics.Tomography(9, 16, normalize=True, device=made_on)
    sparse = SparseLinearPhysics.from_physics(physics, SIZE)
    assert sparse.matrix.device.type == made_on
    x = torch.rand(2, *SIZE)
    y = physics.A(x.to(made_on)).cpu()
    for device in ("cuda", "cpu", "cuda"):
        sparse = sparse.to(device)
        assert relative_error(sparse.A(x.to(device)).cpu(), y) <= 1e-5
        assert relative_error(sparse.fbp(y.to(device)).cpu(), physics.fbp(y.to(made_on)).cpu()) <= 1e-4
        assert sparse.A_dagger(y.to(device)).device.type == device
        assert sparse.A_adjoint(y.to(device)).device.type == device


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


# Size -------------------------------------------------------------------------------------------------------------------


def test_matrices_that_are_too_large_are_refused_before_they_are_built(monkeypatch):
    import deepinv_deq._sparse_matrices as module

    physics, built = dinv.physics.Tomography(64, 32, normalize=False), []
    view = module._view
    monkeypatch.setattr(module, "_view", lambda *args: built.append(args) or view(*args))
    whole = SparseLinearPhysics.from_physics(physics, (1, 32, 32))
    assert len(built) == 64 + 8
    built.clear()
    with pytest.raises(ValueError, match=r"matrix of Tomography has at least [\d,]+ entries.*max_bytes = 0.0 GiB. Use"):
        SparseLinearPhysics.from_physics(physics, (1, 32, 32), max_bytes=2**20)
    assert len(built) == 8
    with pytest.raises(ValueError, match="matrix of MatrixPhysics has at least"):
        SparseLinearPhysics.from_physics(MatrixPhysics(torch.randn(300, 256), 16), SIZE, max_bytes=2**20)
    needed = whole.matrix._nnz() * 48
    SparseLinearPhysics.from_physics(physics, (1, 32, 32), max_bytes=int(1.1 * needed))


def test_512_pixels_and_180_views_are_refused_at_the_default_size():
    physics = dinv.physics.Tomography(4, 512, normalize=False, adjoint_via_backprop=True)
    from deepinv_deq import _sparse_matrices as module

    per_view = sum(module._view(physics, i)[1].numel() for i in range(4)) / 4
    with pytest.raises(ValueError, match="to build it takes [45]\\.. GiB, more than max_bytes = 2.0 GiB"):
        module.check_memory(physics, (180 * 725, 512**2), int(180 * per_view), torch.float32, 2 * 2**30)


# Caches -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    physics, file = OPERATORS["parallel"](), tmp_path / "matrix.pt"
    SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    return physics, file


def test_a_cache_with_one_weight_altered_is_refused(cached):
    physics, file = cached
    content = torch.load(file, weights_only=True)
    content["values"][37] *= 1 + 1e-6  # no measurement of an image shows it
    torch.save(content, file)
    with pytest.raises(ValueError, match="matrix.pt cannot be trusted.*digest of 'values' is wrong"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    content["_digest"] = digests({k: v for k, v in content.items() if k != "_digest"})
    content["values"][content["values"].argmax()] *= (
        1.5  # a forger may compute the digest, too: then the operator itself is asked
    )
    content["_digest"] = digests({k: v for k, v in content.items() if k != "_digest"})
    torch.save(content, file)
    with pytest.raises(ValueError, match="matrix of another operator"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)


def forge(**changes):
    def apply(content):
        content = {k: v for k, v in content.items() if k != "_digest"} | changes
        return content | {"_digest": digests(content)}

    return apply


FORGED = {
    "of an older version": lambda c: torch.sparse_csr_tensor(c["rows"], c["columns"], c["values"], c["size"]),
    "without a digest": lambda c: {k: v for k, v in c.items() if k != "_digest"},
    "of a denoiser": forge(values={"a": 1}),
    "of no size": forge(size="large"),
    "of complex values": lambda c: forge(values=c["values"] + 0j)(c),
    "with columns outside": lambda c: forge(columns=c["columns"] + 10**6)(c),
    "with negative columns": lambda c: forge(columns=-c["columns"])(c),
    "with rows outside": lambda c: forge(rows=c["rows"] * 3)(c),
    "with rows of floats": lambda c: forge(rows=c["rows"].float())(c),
    "of a huge size": forge(size=(2**40, 2**40)),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_caches_name_the_file(cached, kind):
    physics, file = cached
    torch.save(FORGED[kind](torch.load(file, weights_only=True)), file)
    with pytest.raises(ValueError, match="matrix.pt"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    file.write_bytes(b"not a matrix")
    with pytest.raises(ValueError, match="matrix.pt cannot be trusted"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    with pytest.raises(ValueError, match="not a regular file"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file.parent)


def test_a_cache_that_cannot_be_written_costs_a_warning_and_not_the_matrix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="The matrix is not cached: .*file"):
        sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE, cache=tmp_path / "file" / "matrix.pt")
    assert sparse.A(torch.rand(1, *SIZE)).shape[1:] == sparse.measurement_size
